"""CIFAR-10 from torchvision's archive or from class folders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flops_lightning.datamodules.cifar import CIFARDataModule
from flops_lightning.datamodules.images import NORMALIZATIONS, Statistics

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

# Over all pixels of the 50,000 original training images, scaled to 0..1. The standard deviations 0.2023, 0.1994, 0.2010
# that many recipes carry are means of each image's own. Of images stored as JPEG they are up to 0.002 smaller.
STATISTICS: Statistics = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


class CIFAR10DataModule(CIFARDataModule):
    """CIFAR-10: colour images of 32 x 32 pixels in ten classes, 50,000 to learn from and 10,000 to test.

    Read from ``root/cifar-10-batches-py/``, torchvision's archive, or from class folders; :class:`CIFARDataModule` says
    how they lie and how they are split.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """

    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    data_set = "CIFAR-10"
    archive = "cifar-10-batches-py"
    normalizations: ClassVar[Mapping[str, Statistics]] = {"cifar10": STATISTICS, **NORMALIZATIONS}

    def __init__(
        self,
        *,
        root: str = "data/downloads/cifar10",
        normalization: Literal["cifar10", "imagenet", "inception", "backbone"] = "cifar10",
        **settings: Any,
    ) -> None:
        """Check the settings and that ``root`` is there; images are read when they are asked for.

        Args:
            root: Folder of the data set, in one of the two layouts.
            normalization: Mean and standard deviation of the pixels: ``cifar10`` to learn from scratch; for pretrained
                weights those they were trained with, ``imagenet`` or ``inception`` (0.5 each, most of timm's ViTs), or
                ``backbone``, which asks the task's timm model.
            **settings: Those of :class:`CIFARDataModule`.

        Raises:
            SettingError: A setting is outside its range, or ``root`` has neither layout and ``download`` is off.
        """
        super().__init__(root=root, normalization=normalization, **settings)

    @staticmethod
    def opener() -> type[CIFAR10]:
        """The class of torchvision that opens and fetches the archive."""
        from torchvision.datasets import CIFAR10

        return CIFAR10
