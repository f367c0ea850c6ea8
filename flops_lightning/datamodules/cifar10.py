"""CIFAR-10 from torchvision's archive or from class folders."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from flops_lightning.datamodules.augmentation import RandAugmentSettings
from flops_lightning.datamodules.base import ImageDataModule
from flops_lightning.datamodules.class_folders import open_class_folders
from flops_lightning.datamodules.images import IMAGENET, INCEPTION, ImageSubset, Statistics, image_transform
from flops_lightning.datamodules.splits import check_split_seed, choose_per_class, hold_out
from flops_lightning.errors import SettingError

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10, ImageFolder

ARCHIVE = "cifar-10-batches-py"
# Over all pixels of the 50,000 original training images, scaled to 0..1. The standard deviations 0.2023, 0.1994, 0.2010
# that many recipes carry are means of each image's own. Of images stored as JPEG they are up to 0.002 smaller.
STATISTICS: Statistics = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
NORMALIZATIONS = {"cifar10": STATISTICS, "imagenet": IMAGENET, "inception": INCEPTION}
ORIGINAL_SIZE, PADDING = 32, 4  # of the images, and of the crop that augments them, in pixels


class CIFAR10DataModule(ImageDataModule):
    """CIFAR-10: colour images of 32 x 32 pixels in ten classes, 50,000 to learn from and 10,000 to test.

    Read from either layout, the first that is there:

    - ``root/cifar-10-batches-py/``, the archive that torchvision opens and, with ``download``, fetches (170 MB);
    - ``root/train/<class>/*`` and ``root/test/<class>/*``, image files (PNG, JPEG, ...) of any number.

    Validation images are split off the training part before ``images_per_class`` chooses from the rest, so accuracies
    of runs with different ``images_per_class`` compare, and the smaller training sets are parts of the larger ones. The
    split is a function of the layout's order of images: it differs between the two layouts.

    Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
    """

    class_names = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    in_chans = 3

    def __init__(
        self,
        *,
        root: str = "data/downloads/cifar10",
        batch_size: int = 64,
        num_workers: int = 0,
        image_size: int = ORIGINAL_SIZE,
        images_per_class: int = 0,
        val_images: int = 5000,
        test_images: int = 0,
        split_seed: int = 0,
        augment: bool = False,
        rand_augment: RandAugmentSettings | None = None,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        normalization: Literal["cifar10", "imagenet", "inception"] = "cifar10",
        download: bool = False,
    ) -> None:
        """Check the settings and that ``root`` is there; images are read when they are asked for.

        Args:
            root: Folder of the data set, in one of the two layouts.
            batch_size: Images per batch, all processes together, at least 1.
            num_workers: Processes that load beside each training process; 0 loads inside it.
            image_size: Height and width of the images, in pixels; where it is not 32 they are resized bicubically.
            images_per_class: Training images of each class to learn from; 0 uses all.
            val_images: Images split off the training part to validate with, each class keeping its share; 0 for none.
            test_images: Images of the test part to test with, each class keeping its share; 0 uses all, which is what
                published accuracies are measured on.
            split_seed: Chooses the images of the three settings above; independent of the seed of the run, so that runs
                with different seeds are measured on the same images. From 0 to 2**32 - 1.
            augment: Shift training images at random by up to an eighth of their size, on black, and mirror half of
                them. Like the next three drawn by seed, epoch and image: neither resuming a run nor ``num_workers``
                changes it.
            rand_augment: RandAugment of training images, after that; None for none.
            mixup_alpha: MixUp of training batches, with shares from ``Beta(alpha, alpha)``, for example 0.2; 0 for
                none. Labels become probabilities.
            cutmix_alpha: The same for CutMix, for example 1.0. Where both are on, each batch draws one of the two.
            normalization: Mean and standard deviation of the pixels: ``cifar10`` to learn from scratch; for pretrained
                weights those they were trained with, ``imagenet`` or ``inception`` (0.5 each, most of timm's ViTs).
            download: Fetch the archive into ``root`` unless it is there and whole.

        Raises:
            SettingError: A setting is outside its range, or ``root`` has neither layout and ``download`` is off.
        """
        super().__init__(
            batch_size=batch_size, num_workers=num_workers, rand_augment=rand_augment, mixup_alpha=mixup_alpha,
            cutmix_alpha=cutmix_alpha,
        )  # fmt: skip
        if image_size < 1:
            raise SettingError("data.image_size", image_size, "is below 1.", "Give pixels, for example 32 or 224.")
        sizes = {"images_per_class": images_per_class, "val_images": val_images, "test_images": test_images}
        for name, number in sizes.items():
            if number < 0:
                raise SettingError(f"data.{name}", number, "is negative.", "Give a number of images, or 0.")
        check_split_seed(split_seed)
        if normalization not in NORMALIZATIONS:
            known = ", ".join(NORMALIZATIONS)
            raise SettingError("data.normalization", normalization, "is not known.", f"Use one of {known}.")
        self.root = root
        self.image_size = image_size
        self.images_per_class = images_per_class
        self.val_images = val_images
        self.test_images = test_images
        self.split_seed = split_seed
        self.augment = augment
        self.mean, self.std = NORMALIZATIONS[normalization]
        self.download = download
        if not download:
            self._check_layout()

    def prepare_data(self) -> None:
        """Fetch the archive if asked to; in one process only.

        Raises:
            SettingError: It could not be fetched.
        """
        if not self.download:
            return
        from torchvision.datasets import CIFAR10

        try:
            CIFAR10(self.root, download=True)
        except (OSError, RuntimeError) as error:  # no connection or disk; another file than was expected
            raise SettingError(
                "data.download", True, f"the archive could not be fetched ({error}).",
                f"Check the connection, or put {CIFAR10.url} into {self.root} yourself.",
            ) from error  # fmt: skip

    def setup(self, stage: str) -> None:
        """Find and split the images; the same for every stage. The archive takes a second, class folders half of one.

        Raises:
            SettingError: The data set is incomplete or damaged, has other classes, or too few images for a setting.
        """
        train, test = self._open("train"), self._open("test")
        train_labels, test_labels = torch.tensor(train.targets), torch.tensor(test.targets)
        rest, val_places = hold_out(train_labels, self.val_images, seed=self.split_seed, setting="data.val_images")
        train_places = choose_per_class(
            train_labels, rest, self.images_per_class, seed=self.split_seed, class_names=self.class_names
        )
        test_places = self._test_places(test_labels)

        plain = image_transform(image_size=self.image_size, mean=self.mean, std=self.std)
        augmentation = shift_and_mirror(self.image_size) if self.augment else []
        if self.rand_augment is not None:
            augmentation.append(self.rand_augment.transform())
        augmented = image_transform(image_size=self.image_size, mean=self.mean, std=self.std, augmentation=augmentation)
        self.train_set = ImageSubset(train, train_labels, train_places, augmented)
        self.val_set = ImageSubset(train, train_labels, val_places, plain)
        self.test_set = ImageSubset(test, test_labels, test_places, plain)

    def _test_places(self, labels: Tensor) -> Tensor:
        everything, chosen = hold_out(labels, self.test_images, seed=self.split_seed, setting="data.test_images")
        return chosen if self.test_images else everything

    def _open(self, part: Literal["train", "test"]) -> CIFAR10 | ImageFolder:
        """One part of the data set, in the layout that is there."""
        if not self._has(ARCHIVE):
            self._check_layout()
            return open_class_folders(self.root, part, self.class_names, remedy=self._remedy())
        from torchvision.datasets import CIFAR10

        try:
            images = CIFAR10(self.root, train=part == "train")
        except (OSError, RuntimeError) as error:
            raise SettingError(
                "data.root", self.root, f"{ARCHIVE}/ is incomplete or damaged.", self._remedy()
            ) from error
        if tuple(images.classes) != self.class_names:
            raise SettingError("data.root", self.root, f"{ARCHIVE}/ has the classes {images.classes}.", self._remedy())
        return images

    def _has(self, name: str) -> bool:
        return (Path(self.root).expanduser() / name).is_dir()

    def _check_layout(self) -> None:
        if not self._has("."):
            raise SettingError("data.root", self.root, "is not a folder.", self._remedy())
        if not any(self._has(name) for name in (ARCHIVE, "train", "test")):
            raise SettingError("data.root", self.root, "holds no CIFAR-10.", self._remedy())

    def _remedy(self) -> str:
        return (
            f"Set data.download: true to fetch {ARCHIVE}/ into it, or put images there as train/NAME/* and test/NAME/* "
            f"with the names {', '.join(self.class_names)}."
        )


def shift_and_mirror(image_size: int) -> list[torch.nn.Module]:
    """The usual augmentation of CIFAR-10: a crop of the image padded by 4 of its 32 pixels, mirrored half the time.

    Source: K. He et al., Deep Residual Learning for Image Recognition, 2016, section 4.2.
    """
    from torchvision.transforms import v2

    padding = round(image_size * PADDING / ORIGINAL_SIZE)
    return [v2.RandomCrop(image_size, padding=padding), v2.RandomHorizontalFlip()]
