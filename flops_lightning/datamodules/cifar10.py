"""CIFAR-10 from torchvision's archive or from class folders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from flops_lightning.datamodules.augmentation import NORMALIZATIONS, Statistics
from flops_lightning.datamodules.cifar import CIFARDataModule, CIFARSource

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Over all pixels of the 50,000 original training images, scaled to 0..1. The standard deviations 0.2023, 0.1994, 0.2010
# that many recipes carry are means of each image's own. Of images stored as JPEG they are up to 0.002 smaller.
STATISTICS: Statistics = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))


class CIFAR10DataModule(CIFARDataModule):
    """CIFAR-10: colour images of 32 x 32 pixels in ten classes, 50,000 to train and 10,000 to test.

    Read from ``root/cifar-10-batches-py/``, torchvision's archive, or from class folders (:class:`CIFARSource`).
    Validation images are split off the training part before ``images_per_class`` chooses from the rest, so accuracies
    of runs with different ``images_per_class`` compare, and smaller training sets are parts of larger ones.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Example:
        >>> data = CIFAR10DataModule(download=True, batch_size=128)
        >>> data.num_classes, data.class_names[3], data.std
        (10, 'cat', (0.247, 0.2435, 0.2616))
    """

    class_names = CLASSES
    source = CIFARSource("CIFAR-10", class_names=CLASSES, archive="cifar-10-batches-py")
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
            normalization: Mean and standard deviation of the pixels: ``cifar10`` to train from scratch; for pretrained
                weights those they were trained with, ``imagenet``, ``inception`` or ``backbone``.
            **settings: Those of :class:`CIFARDataModule` and :class:`PhotoDataModule`.
        """
        super().__init__(root=root, normalization=normalization, **settings)
