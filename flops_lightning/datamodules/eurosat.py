"""EuroSAT (RGB) from torchvision's folder layout."""

from typing import Any

from flops_lightning.datamodules.class_names import of_capitals
from flops_lightning.datamodules.photos import PhotoDataModule
from flops_lightning.datamodules.sources import ImageSource

CLASSES = (
    "AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial", "Pasture", "PermanentCrop", "Residential",
    "River", "SeaLake",
)  # fmt: skip


class EuroSATDataModule(PhotoDataModule):
    """EuroSAT: 27,000 satellite images of 64 x 64 pixels in 10 classes of land use, in RGB.

    Read from ``root/eurosat/2750/<class>/*``, torchvision's layout; ``download`` fetches it (90 MB).

    There is no standard split. Unless you give a ``split_file``, 50 % of each class's images are for training, 20 % for
    validation and 30 % for testing (13,500, 5,400 and 8,100), the shares of CoOp's split. CoOp's own file,
    ``split_zhou_EuroSAT.json``, works as well if its paths are below ``2750/``. The data set's authors report several
    splits, among them 80 % and 20 % (``val_share: 0, test_share: 0.2``).

    Source: P. Helber et al., EuroSAT: A Novel Dataset and Deep Learning Benchmark for Land Use and Land Cover
    Classification, 2019.

    Example:
        >>> data = EuroSATDataModule(download=True, val_share=0.0, test_share=0.2)
        >>> data.num_classes, data.class_names[-1]
        (10, 'SeaLake')
    """

    class_names = CLASSES
    source = ImageSource("EuroSAT", "eurosat/2750", CLASSES)
    template = "a centered satellite photo of {}."

    def __init__(self, **settings: Any) -> None:
        """Check the settings (:class:`PhotoDataModule`) and that the folder is there."""
        super().__init__(val_images=0, test_images=0, **settings)

    @property
    def display_names(self) -> tuple[str, ...]:
        """See :attr:`ImageDataModule.display_names`; the folders' names in words, or those of the ``split_file``."""
        return of_capitals(self.class_names)

    @property
    def templates(self) -> tuple[str, ...]:
        """CLIP's three."""
        return tuple(self.template.replace("{}", f"{article}{{}}") for article in ("", "a ", "the "))
