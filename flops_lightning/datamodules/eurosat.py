"""EuroSAT (RGB) from torchvision's folder layout."""

from __future__ import annotations

from flops_lightning.datamodules.unsplit import UnsplitDataModule

NAMES = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop", "Residential",
    "River", "SeaLake",
)  # fmt: skip


class EuroSATDataModule(UnsplitDataModule):
    """EuroSAT: 27,000 satellite images of 64 x 64 pixels in 10 classes of land use, in RGB.

    Read from ``root/eurosat/2750/<class>/*``, which torchvision opens and, with ``download``, fetches (90 MB).

    There is no standard split. Unless ``split_file`` names one, half of each class's images train, a fifth validate and
    three tenths test: 13,500, 5,400 and 8,100 images, the shares of CoOp's split (``split_zhou_EuroSAT.json``, which
    works as well if its paths are below ``2750/``). The data set's authors report on several shares, 80 % and 20 %
    among them (``val_share: 0, test_share: 0.2``).

    Source: P. Helber et al., EuroSAT: A Novel Dataset and Deep Learning Benchmark for Land Use and Land Cover
    Classification, 2019.
    """

    data_set = "EuroSAT"
    published_classes = 10
    images_below = "eurosat/2750"
    known_class_names = NAMES

    def fetch(self) -> None:
        """Download through torchvision."""
        from torchvision.datasets import EuroSAT

        EuroSAT(self.root, download=True)
