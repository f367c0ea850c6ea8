"""CIFAR-10 and CIFAR-100, from torchvision's archives or from class folders."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from flops_lightning.datamodules.augmentation import NORMALIZATIONS, Statistics, resize
from flops_lightning.datamodules.files import Listing, Part, list_class_folders
from flops_lightning.datamodules.photos import PhotoDataModule
from flops_lightning.datamodules.sources import ImageSource
from flops_lightning.errors import SettingError

ORIGINAL_SIZE, PADDING = 32, 4  # of the images, and of the crop that augments them, in pixels
SHOWN_CLASSES = 10  # in a message
IN_FOLDERS: tuple[Part, ...] = ("train", "test")

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR100_CLASSES = (
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
# Over all pixels of the 50,000 original training images, scaled to 0..1. The standard deviations 0.2023, 0.1994, 0.2010
# that many recipes use for CIFAR-10 are means of each image's own. JPEG copies have up to 0.002 less.
CIFAR10_STATISTICS: Statistics = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100_STATISTICS: Statistics = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


@dataclass(frozen=True)
class CIFARSource(ImageSource):
    """Images of 32 x 32 pixels, a training and a test part, from the first layout that is there.

    - ``root/<archive>/``, the archive that torchvision opens and fetches (170 MB);
    - ``root/train/<class>/*`` and ``root/test/<class>/*``, image files (PNG, JPEG, ...) of any number.

    The order of the images, and with it the split by a seed, differs between the two layouts.

    Attributes:
        archive: Folder of torchvision's archive.
    """

    archive: str = ""
    may_lack_images = False

    def check_folder(self, root: str) -> None:
        """Raise a :class:`SettingError` unless the folder has one of the layouts."""
        if not self._has(root, "."):
            raise SettingError("data.root", root, "is not a folder.", self.remedy(root))
        if not any(self._has(root, name) for name in (self.archive, *IN_FOLDERS)):
            raise SettingError("data.root", root, f"holds no {self.name}.", self.remedy(root))

    def remedy(self, root: str) -> str:
        """Both layouts, with the names of the first classes."""
        names = self.class_names
        shown = names if len(names) <= SHOWN_CLASSES else (*names[:3], "...", names[-1])
        return (
            f"Set data.download: true to fetch {self.archive}/ into it, or put images there as train/NAME/* and "
            f"test/NAME/* with the names {', '.join(shown)}."
        )

    def listings(self, root: str, class_names: tuple[str, ...], *, all_classes: bool) -> Mapping[Part, Listing]:
        """The training and the test part."""
        if self._has(root, self.archive):
            return self._archived(root)
        return {part: list_class_folders(root, part, class_names, remedy=self.remedy(root)) for part in IN_FOLDERS}

    def by_hand(self, root: str) -> str:
        """Where to put the archive."""
        return f"Check the connection, or put {self.torchvision().url} into {root} yourself."

    def augmentation(self, image_size: int) -> list[Any]:
        """A random crop of the image padded by an eighth of its size, mirrored half the time.

        Source: K. He et al., Deep Residual Learning for Image Recognition, 2016, section 4.2.
        """
        from torchvision.transforms import v2

        padding = round(image_size * PADDING / ORIGINAL_SIZE)
        return [resize(image_size), v2.RandomCrop(image_size, padding=padding), v2.RandomHorizontalFlip()]

    def _archived(self, root: str) -> Mapping[Part, Listing]:
        opener = self.torchvision()
        try:
            train, test = opener(root, train=True), opener(root, train=False)
        except (OSError, RuntimeError) as error:
            problem = f"{self.archive}/ is incomplete or damaged."
            raise SettingError("data.root", root, problem, self.remedy(root)) from error
        if tuple(train.classes) != self.class_names:
            has = f"{train.classes[:SHOWN_CLASSES]}{' ...' * (len(train.classes) > SHOWN_CLASSES)}"
            raise SettingError("data.root", root, f"{self.archive}/ has the classes {has}.", self.remedy(root))
        return {"train": Listing([*train.data], train.targets), "test": Listing([*test.data], test.targets)}

    @staticmethod
    def _has(root: str, name: str) -> bool:
        return (Path(root).expanduser() / name).is_dir()


class CIFARDataModule(PhotoDataModule):
    """Base of CIFAR-10 and CIFAR-100, whose validation and test images are set by number.

    Args:
        normalization: Mean and standard deviation of the pixels: the data set's own (``cifar10`` or ``cifar100``) to
            train from scratch; for pretrained weights ``backbone``, ``imagenet`` or ``inception``, as they were
            trained.
    """

    def __init__(
        self, *, batch_size: int = 64, image_size: int = ORIGINAL_SIZE, val_images: int = 5000, **settings: Any
    ) -> None:
        """Fix the settings that do not apply."""
        super().__init__(
            batch_size=batch_size, image_size=image_size, val_images=val_images, val_share=0.0, test_share=0.0,
            split_file=None, allow_missing=False, **settings,
        )  # fmt: skip


class CIFAR10DataModule(CIFARDataModule):
    """CIFAR-10: colour images of 32 x 32 pixels in ten classes, 50,000 to train and 10,000 to test.

    Read from ``root/cifar-10-batches-py/``, torchvision's archive, or from class folders (:class:`CIFARSource`).
    Validation images are split off the training part before ``images_per_class`` chooses from the rest. Accuracies of
    runs with different ``images_per_class`` are therefore comparable, and smaller training sets are subsets of larger
    ones.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Example:
        >>> data = CIFAR10DataModule(download=True, batch_size=128)
        >>> data.num_classes, data.class_names[3], data.std
        (10, 'cat', (0.247, 0.2435, 0.2616))
    """

    class_names = CIFAR10_CLASSES
    source = CIFARSource("CIFAR-10", class_names=CIFAR10_CLASSES, archive="cifar-10-batches-py")
    normalizations: ClassVar[Mapping[str, Statistics]] = {"cifar10": CIFAR10_STATISTICS, **NORMALIZATIONS}

    def __init__(
        self, *, root: str = "data/downloads/cifar10",
        normalization: Literal["cifar10", "imagenet", "inception", "backbone"] = "cifar10", **settings: Any,
    ) -> None:  # fmt: skip
        """Check the settings (:class:`PhotoDataModule`) and that ``root`` is there."""
        super().__init__(root=root, normalization=normalization, **settings)


class CIFAR100DataModule(CIFARDataModule):
    """CIFAR-100: like :class:`CIFAR10DataModule`, with 100 classes, 500 images of each to train and 100 to test.

    Labels are the fine ones, not the 20 superclasses. torchvision's archive is ``root/cifar-100-python/``.

    Example:
        >>> data = CIFAR100DataModule(download=True, normalization="inception")
        >>> data.num_classes, data.class_names[52], data.mean
        (100, 'oak_tree', (0.5, 0.5, 0.5))
    """

    class_names = CIFAR100_CLASSES
    source = CIFARSource("CIFAR-100", class_names=CIFAR100_CLASSES, archive="cifar-100-python")
    normalizations: ClassVar[Mapping[str, Statistics]] = {"cifar100": CIFAR100_STATISTICS, **NORMALIZATIONS}

    def __init__(
        self, *, root: str = "data/downloads/cifar100",
        normalization: Literal["cifar100", "imagenet", "inception", "backbone"] = "cifar100", **settings: Any,
    ) -> None:  # fmt: skip
        """Check the settings (:class:`PhotoDataModule`) and that ``root`` is there."""
        super().__init__(root=root, normalization=normalization, **settings)
