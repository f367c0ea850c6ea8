"""What the data sets of photos share: settings, a check of the folder before training, splits, transforms."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from flops_lightning.datamodules.augmentation import RandAugmentSettings
from flops_lightning.datamodules.images import FETCHING_FAILS, ImageSubset, PhotoFiles, image_transform
from flops_lightning.datamodules.listing import PARTS, Listing, Part, present, refuse_empty
from flops_lightning.datamodules.splits import choose_per_class
from flops_lightning.datamodules.stored_images import StoredImageDataModule, look_into
from flops_lightning.errors import SettingError

DOWNLOADS = "data/downloads"


class PhotoDataModule(StoredImageDataModule):
    """Loaders over image files of any size and mode, resized to a square.

    A subclass says which files there are (``listings``) and what their classes are called (``find_class_names``).

    Grey, CMYK, palette and transparent images are converted to RGB when they are read (alpha is dropped, of 16 bits the
    upper 8 are kept). Files that are missing, empty or cut off are errors that name the first of them: :meth:`check`
    finds the missing and empty ones in seconds, before training begins, and decodes a few; one that is damaged further
    inside stops the run when it is read.

    Attributes:
        published_classes: Number of classes of the whole data set, for as long as it has not been fetched.
    """

    published_classes: int

    def __init__(
        self,
        *,
        root: str = DOWNLOADS,
        batch_size: int = 128,
        num_workers: int = 0,
        image_size: int = 224,
        images_per_class: int = 0,
        split_seed: int = 0,
        allow_missing: bool = False,
        augment: bool = False,
        rand_augment: RandAugmentSettings | None = None,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
        normalization: Literal["backbone", "imagenet", "inception"] = "backbone",
        download: bool = False,
    ) -> None:
        """Check the settings and that the data set is there.

        Args:
            root: Folder that holds the data set in torchvision's layout.
            batch_size: Images per batch, all processes together, at least 1.
            num_workers: Processes that load beside each training process; 0 loads inside it.
            image_size: Height and width of the images, in pixels; all are resized to this square, bicubically.
            images_per_class: Training images of each class to learn from; 0 uses all.
            split_seed: Chooses the images of the settings that choose; independent of the seed of the run. From 0 to
                2**32 - 1.
            allow_missing: Leave out listed images that are not there, and classes without any, and say how many;
                otherwise the first one is an error.
            augment: Crop training images at random (8 % to 100 % of the area, 3:4 to 4:3) and mirror half of them.
            rand_augment: RandAugment of training images, after that; None for none.
            mixup_alpha: MixUp of training batches, with shares from ``Beta(alpha, alpha)``, for example 0.2; 0 for
                none. Labels become probabilities.
            cutmix_alpha: The same for CutMix, for example 1.0. Where both are on, each batch draws one of the two.
            normalization: Mean and standard deviation of the pixels: ``backbone`` asks the task's timm model for those
                that its weights were trained with; ``imagenet`` and ``inception`` (0.5 each) set them.
            download: Fetch the data set into ``root`` unless it is there and whole, where torchvision can.

        Raises:
            SettingError: A setting is outside its range, or ``root`` does not hold the data set and ``download`` is
                off.
        """
        super().__init__(
            root=root, image_size=image_size, images_per_class=images_per_class, split_seed=split_seed, augment=augment,
            normalization=normalization, download=download, batch_size=batch_size, num_workers=num_workers,
            rand_augment=rand_augment, mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha,
        )  # fmt: skip
        self.allow_missing = allow_missing
        self._checked: Mapping[Part, Listing] | None = None
        try:
            self.class_names = self.find_class_names() if download else self._find_class_names()
        except SettingError as error:
            if not download or error.setting != "data.root":
                raise  # what the root lacks is fetched later

    # -- what a subclass says ------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def folder(self) -> Path:
        """The folder that is there if the data set is."""

    @abstractmethod
    def remedy(self) -> str:
        """How the data set should lie there, and how to get it: for errors."""

    @abstractmethod
    def find_class_names(self) -> tuple[str, ...]:
        """Names in the order of the labels; the folder is there."""

    @abstractmethod
    def listings(self) -> Mapping[Part, Listing]:
        """The images to train, validate and test with; whether all are there is looked at afterwards.

        Raises:
            SettingError: The data set is not whole.
        """

    def fetch(self) -> None:
        """Download the data set through torchvision.

        Raises:
            SettingError: torchvision cannot.
        """
        raise SettingError("data.download", True, f"torchvision cannot fetch {self.data_set}.", self.remedy())

    # -- Lightning's hooks ---------------------------------------------------------------------------------------------

    @property
    def num_classes(self) -> int:
        """Number of classes; labels run from 0 to one less."""
        return len(self.class_names) if hasattr(self, "class_names") else self.published_classes

    def prepare_data(self) -> None:
        """Fetch the data set if asked to; in one process only.

        Raises:
            SettingError: It could not be fetched.
        """
        if not self.download:
            return
        try:
            self.fetch()
        except FETCHING_FAILS as error:
            raise SettingError(
                "data.download", True, f"{self.data_set} could not be fetched ({error}).",
                f"Check the connection. {self.remedy()}",
            ) from error  # fmt: skip

    def setup(self, stage: str) -> None:
        """Check and split the images; the same for every stage.

        Raises:
            SettingError: The data set is not whole or has no images for the stage, or ``normalization`` cannot be
                found out.
            DamagedImageError: An image is empty or cannot be read.
        """
        parts = self.check()
        refuse_empty(stage, parts, root=self.root, remedy=self.remedy())
        self.find_statistics()
        self.train_set, self.val_set, self.test_set = (self._subset(parts[part], part) for part in PARTS)

    def check(self) -> Mapping[Part, Listing]:
        """Look at every file's name and size and into a few, in seconds; once, and then the answer is kept.

        Returns:
            The images of each part, with their paths.

        Raises:
            SettingError: A file or a class is missing; the first is named.
            DamagedImageError: An image is empty or cannot be read; the first is named.
        """
        if self._checked is None:
            start = time.monotonic()
            self.class_names = self._find_class_names()
            parts = present(
                self.listings(), self.class_names, root=self.root, remedy=self.remedy(),
                allow_missing=self.allow_missing,
            )  # fmt: skip
            look_into([file for part in PARTS for file in parts[part].files])
            labels = torch.tensor(parts["train"].labels, dtype=torch.long)
            chosen = choose_per_class(
                labels, torch.arange(len(labels)), self.images_per_class, seed=self.split_seed,
                class_names=self.class_names,
            ) if len(labels) else labels  # fmt: skip
            self._checked = {**parts, "train": parts["train"].at(chosen)}
            self.tell_counts({part: len(self._checked[part].files) for part in PARTS}, start=start)
        return self._checked

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _find_class_names(self) -> tuple[str, ...]:
        if not self.folder.is_dir():
            raise SettingError("data.root", self.root, f"has no folder {self._below()}.", self.remedy())
        return self.find_class_names()

    def _below(self) -> str:
        root = Path(self.root).expanduser()
        return f"{self.folder.relative_to(root)}/" if self.folder != root else "of that name"

    def _subset(self, listing: Listing, part: Part) -> ImageSubset:
        labels = torch.tensor(listing.labels, dtype=torch.long)
        settings: dict[str, Any] = {"image_size": self.image_size, "mean": self.mean, "std": self.std}
        if part == "train":
            settings |= self._augmentation()
        images = PhotoFiles(listing.files, listing.labels)
        return ImageSubset(images, labels, torch.arange(len(labels)), image_transform(**settings))

    def _augmentation(self) -> dict[str, Any]:
        from torchvision.transforms import v2

        found: dict[str, Any] = {"augmentation": []}
        if self.augment:
            cubic = v2.InterpolationMode.BICUBIC
            found["crop"] = v2.RandomResizedCrop(self.image_size, interpolation=cubic, antialias=True)
            found["augmentation"].append(v2.RandomHorizontalFlip())
        if self.rand_augment is not None:
            found["augmentation"].append(self.rand_augment.transform())
        return found
