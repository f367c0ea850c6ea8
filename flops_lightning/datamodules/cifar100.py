"""CIFAR-100 from torchvision's archive or from class folders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from flops_lightning.datamodules.augmentation import NORMALIZATIONS, Statistics
from flops_lightning.datamodules.cifar import CIFARDataModule, CIFARSource

CLASSES = (
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl", "boy",
    "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair", "chimpanzee", "clock",
    "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin", "elephant", "flatfish",
    "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion",
    "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange",
    "orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy", "porcupine",
    "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk",
    "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank",
    "telephone", "television", "tiger", "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale",
    "willow_tree", "wolf", "woman", "worm",
)  # fmt: skip
# Over all pixels of the 50,000 original training images, scaled to 0..1.
STATISTICS: Statistics = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


class CIFAR100DataModule(CIFARDataModule):
    """CIFAR-100: colour images of 32 x 32 pixels in 100 classes, 500 of each to train and 100 to test.

    Labels are the fine ones, not the 20 superclasses. Read from ``root/cifar-100-python/``, torchvision's archive, or
    from class folders (:class:`CIFARSource`). Validation images are split off before ``images_per_class`` chooses.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Example:
        >>> data = CIFAR100DataModule(download=True, normalization="inception")
        >>> data.num_classes, data.class_names[52], data.mean
        (100, 'oak_tree', (0.5, 0.5, 0.5))
    """

    class_names = CLASSES
    source = CIFARSource("CIFAR-100", class_names=CLASSES, archive="cifar-100-python")
    normalizations: ClassVar[Mapping[str, Statistics]] = {"cifar100": STATISTICS, **NORMALIZATIONS}

    def __init__(
        self,
        *,
        root: str = "data/downloads/cifar100",
        normalization: Literal["cifar100", "imagenet", "inception", "backbone"] = "cifar100",
        **settings: Any,
    ) -> None:
        """Check the settings and that ``root`` is there; images are read when they are asked for.

        Args:
            root: Folder of the data set, in one of the two layouts.
            normalization: Mean and standard deviation of the pixels: ``cifar100`` to train from scratch; for pretrained
                weights those they were trained with, ``imagenet``, ``inception`` or ``backbone``.
            **settings: Those of :class:`CIFARDataModule` and :class:`PhotoDataModule`.
        """
        super().__init__(root=root, normalization=normalization, **settings)
