"""What CIFAR-10 and CIFAR-100 share: two layouts, a check before training, splits, transforms."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from flops_lightning.datamodules.augmentation import RandAugmentSettings
from flops_lightning.datamodules.class_folders import list_class_folders
from flops_lightning.datamodules.images import FETCHING_FAILS, ImageSubset, PhotoFiles, image_transform
from flops_lightning.datamodules.listing import PARTS, Listing, Part, present
from flops_lightning.datamodules.splits import check_image_numbers, choose_per_class, hold_out
from flops_lightning.datamodules.stored_images import StoredImageDataModule, look_into
from flops_lightning.errors import SettingError

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

IN_FILES: tuple[Part, ...] = ("train", "test")  # the parts that the data sets come in
ORIGINAL_SIZE, PADDING = 32, 4  # of the images, and of the crop that augments them, in pixels
SHOWN_CLASSES = 10  # in a message


class Chosen(NamedTuple):
    """Images of one part.

    Attributes:
        images: The opened images that they are among.
        labels: The labels of all of those ``(m,)``.
        places: Which of them are chosen ``(n,)``, in ascending order.
    """

    images: CIFAR10 | PhotoFiles
    labels: Tensor
    places: Tensor


class CIFARDataModule(StoredImageDataModule):
    """Loaders over 60,000 colour images of 32 x 32 pixels, 50,000 to learn from and 10,000 to test.

    Read from either layout, the first that is there:

    - ``root/<archive>/``, the archive that torchvision opens and, with ``download``, fetches (170 MB);
    - ``root/train/<class>/*`` and ``root/test/<class>/*``, image files (PNG, JPEG, ...) of any number.

    Validation images are split off the training part before ``images_per_class`` chooses from the rest, so accuracies
    of runs with different ``images_per_class`` compare, and the smaller training sets are parts of the larger ones. The
    split is a function of the layout's order of images: it differs between the two layouts.

    Attributes:
        archive: Folder of torchvision's archive.
    """

    archive: ClassVar[str]

    def __init__(
        self,
        *,
        root: str,
        normalization: str,
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
        download: bool = False,
    ) -> None:
        """Check the settings and that ``root`` is there; images are read when they are asked for.

        Args:
            root: Folder of the data set, in one of the two layouts.
            normalization: Mean and standard deviation of the pixels, a name of ``normalizations`` or ``backbone``.
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
            download: Fetch the archive into ``root`` unless it is there and whole.

        Raises:
            SettingError: A setting is outside its range, or ``root`` has neither layout and ``download`` is off.
        """
        super().__init__(
            root=root, image_size=image_size, images_per_class=images_per_class, split_seed=split_seed, augment=augment,
            normalization=normalization, download=download, batch_size=batch_size, num_workers=num_workers,
            rand_augment=rand_augment, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha,
        )  # fmt: skip
        check_image_numbers(val_images=val_images, test_images=test_images)
        self.val_images = val_images
        self.test_images = test_images
        self._checked: Mapping[Part, Chosen] | None = None
        if not download:
            self._check_layout()

    @staticmethod
    @abstractmethod
    def opener() -> type[CIFAR10]:
        """The class of torchvision that opens and fetches the archive."""

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Fetch the archive if asked to; in one process only.

        Raises:
            SettingError: It could not be fetched.
        """
        if not self.download:
            return
        opener = self.opener()
        try:
            opener(self.root, download=True)
        except FETCHING_FAILS as error:
            raise SettingError(
                "data.download", True, f"the archive could not be fetched ({error}).",
                f"Check the connection, or put {opener.url} into {self.root} yourself.",
            ) from error  # fmt: skip

    def setup(self, stage: str) -> None:
        """Find and split the images; the same for every stage.

        Raises:
            SettingError: The data set is incomplete or damaged, has other classes, or too few images for a setting; or
                ``normalization`` cannot be found out.
            DamagedImageError: An image file is empty or cannot be read.
        """
        parts = self.check()
        self.find_statistics()
        augmentation = shift_and_mirror(self.image_size) if self.augment else []
        if self.rand_augment is not None:
            augmentation.append(self.rand_augment.transform())
        plain = image_transform(image_size=self.image_size, mean=self.mean, std=self.std)
        augmented = image_transform(image_size=self.image_size, mean=self.mean, std=self.std, augmentation=augmentation)
        self.train_set = ImageSubset(*parts["train"], augmented)
        self.val_set = ImageSubset(*parts["val"], plain)
        self.test_set = ImageSubset(*parts["test"], plain)

    def check(self) -> Mapping[Part, Chosen]:
        """Open and split the data set, in seconds; once, and then the answer is kept.

        Of an archive the checksums are looked at, of class folders every file's name and size, and into a few.

        Returns:
            The images of each part.

        Raises:
            SettingError: The data set is incomplete or damaged, has other classes, or too few images for a setting.
            DamagedImageError: An image file is empty or cannot be read; the first is named.
        """
        if self._checked is None:
            start = time.monotonic()
            train, test = self._unpacked() if self._has(self.archive) else self._files()
            labels, test_labels = torch.tensor(train.targets), torch.tensor(test.targets)
            rest, val_places = hold_out(labels, self.val_images, seed=self.split_seed, setting="data.val_images")
            places = choose_per_class(
                labels, rest, self.images_per_class, seed=self.split_seed, class_names=self.class_names
            )
            everything, some = hold_out(
                test_labels, self.test_images, seed=self.split_seed, setting="data.test_images"
            )  # fmt: skip
            self._checked = {
                "train": Chosen(train, labels, places),
                "val": Chosen(train, labels, val_places),
                "test": Chosen(test, test_labels, some if self.test_images else everything),
            }
            self.tell_counts({part: len(self._checked[part].places) for part in PARTS}, start=start)
        return self._checked

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _unpacked(self) -> tuple[CIFAR10, CIFAR10]:
        """To learn from and to test with, from the archive."""
        opener = self.opener()
        try:
            train, test = opener(self.root, train=True), opener(self.root, train=False)
        except (OSError, RuntimeError) as error:
            raise SettingError(
                "data.root", self.root, f"{self.archive}/ is incomplete or damaged.", self._remedy()
            ) from error
        if tuple(train.classes) != self.class_names:
            has = f"{train.classes[:SHOWN_CLASSES]}{' ...' * (len(train.classes) > SHOWN_CLASSES)}"
            raise SettingError("data.root", self.root, f"{self.archive}/ has the classes {has}.", self._remedy())
        return train, test

    def _files(self) -> tuple[PhotoFiles, PhotoFiles]:
        """To learn from and to test with, from class folders."""
        self._check_layout()
        remedy = self._remedy()
        listings: dict[Part, Listing] = {
            part: list_class_folders(self.root, part, self.class_names, remedy=remedy) for part in IN_FILES
        }
        found = present(listings, self.class_names, root=self.root, remedy=remedy, allow_missing=None)
        look_into([file for part in IN_FILES for file in found[part].files])
        train, test = (PhotoFiles(found[part].files, found[part].labels) for part in IN_FILES)
        return train, test

    def _has(self, name: str) -> bool:
        return (Path(self.root).expanduser() / name).is_dir()

    def _check_layout(self) -> None:
        if not self._has("."):
            raise SettingError("data.root", self.root, "is not a folder.", self._remedy())
        if not any(self._has(name) for name in (self.archive, *IN_FILES)):
            raise SettingError("data.root", self.root, f"holds no {self.data_set}.", self._remedy())

    def _remedy(self) -> str:
        names = self.class_names
        shown = names if len(names) <= SHOWN_CLASSES else (*names[:3], "...", names[-1])
        return (
            f"Set data.download: true to fetch {self.archive}/ into it, or put images there as train/NAME/* and "
            f"test/NAME/* with the names {', '.join(shown)}."
        )


def shift_and_mirror(image_size: int) -> list[torch.nn.Module]:
    """The usual augmentation of CIFAR: a crop of the image padded by 4 of its 32 pixels, mirrored half the time.

    Source: K. He et al., Deep Residual Learning for Image Recognition, 2016, section 4.2.
    """
    from torchvision.transforms import v2

    padding = round(image_size * PADDING / ORIGINAL_SIZE)
    return [v2.RandomCrop(image_size, padding=padding), v2.RandomHorizontalFlip()]
