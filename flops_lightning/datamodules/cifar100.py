"""CIFAR-100 from torchvision's archive or from class folders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from flops_lightning.datamodules.cifar import CIFARDataModule
from flops_lightning.datamodules.images import NORMALIZATIONS, Statistics

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR100

# Over all pixels of the 50,000 original training images, scaled to 0..1.
STATISTICS: Statistics = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


class CIFAR100DataModule(CIFARDataModule):
    """CIFAR-100: colour images of 32 x 32 pixels in 100 classes, of each 500 to learn from and 100 to test.

    Labels are the fine ones, not the 20 superclasses. Read from ``root/cifar-100-python/``, torchvision's archive, or
    from class folders; :class:`CIFARDataModule` says how they lie and how they are split.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """

    class_names = (
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
    data_set = "CIFAR-100"
    archive = "cifar-100-python"
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
            normalization: Mean and standard deviation of the pixels: ``cifar100`` to learn from scratch; for pretrained
                weights those they were trained with, ``imagenet`` or ``inception`` (0.5 each, most of timm's ViTs), or
                ``backbone``, which asks the task's timm model.
            **settings: Those of :class:`CIFARDataModule`.

        Raises:
            SettingError: A setting is outside its range, or ``root`` has neither layout and ``download`` is off.
        """
        super().__init__(root=root, normalization=normalization, **settings)

    @staticmethod
    def opener() -> type[CIFAR100]:
        """The class of torchvision that opens and fetches the archive."""
        from torchvision.datasets import CIFAR100

        return CIFAR100
