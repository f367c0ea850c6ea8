"""What data sets of stored images share: settings, a check of the folder before training, splits, transforms."""

import time
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from flops_lightning.datamodules import augmentation, splits
from flops_lightning.datamodules.augmentation import BACKBONE, NORMALIZATIONS, Statistics, image_transform
from flops_lightning.datamodules.base import ImageDataModule
from flops_lightning.datamodules.files import PARTS, ImageSubset, Listing, Part, present, read_some
from flops_lightning.datamodules.sources import ImageSource
from flops_lightning.datamodules.splits import TEST_SHARE, VAL_SHARE
from flops_lightning.errors import SettingError, check_choice, check_flag, check_path, check_whole

NEEDED: dict[str, tuple[Part, str]] = {
    "fit": ("train", "train"), "validate": ("val", "validate"), "test": ("test", "test"), "predict": ("test", "test"),
}  # fmt: skip
"""The part that a stage reads, and the verb for it."""


class PhotoDataModule(ImageDataModule):
    """Loaders over colour images of any size and mode, resized to a square.

    A subclass names the ``source`` of its images, and fixes the settings that do not apply to it.

    Grey, CMYK, palette and transparent images are converted to RGB when they are read (alpha is dropped, of 16 bits the
    upper 8 are kept). Files that are missing, empty or cut off are errors that name the first of them: :meth:`check`
    finds the missing and empty ones in seconds, before training begins, and decodes a few; one that is damaged further
    inside stops the run when it is read.

    Attributes:
        source: Where the images are, which ones exist, and how to get them.
        normalizations: Mean and standard deviation for each value of ``normalization``.

    Args:
        root: Folder that holds the data set.
        image_size: Height and width of the images, in pixels; all are resized to this square, bicubically.
        images_per_class: Training images per class; 0 uses all. ``split_seed`` 1, 2 and 3 give three different draws.
        val_images_per_class: Validation images per class; 0 uses all. CoOp uses 4, with 16 for training. They are
            chosen from the validation part, which is split off the training part if the data set has none.
        val_images: Images split off the training part for validation, stratified by class; 0 for none.
        test_images: Images of the test part for testing, stratified by class; 0 uses all, as published accuracies do.
        val_share: Share of each class's images for validation.
        test_share: Share of each class's images for testing.
        split_file: A split to use instead of the shares, a JSON file in the format of CoOp's ``split_zhou_*.json``.
        split_seed: Seed for choosing the images of the settings above; independent of the seed of the run, so that runs
            with different seeds are tested on the same images. From 0 to 2**32 - 1.
        allow_missing: Leave out missing images and classes without any, and log how many; otherwise the first one is an
            error, and so is a class with fewer images than requested.
        augment: Augment training images: photos are cropped at random (8 % to 100 % of the area, 3:4 to 4:3), the
            images of CIFAR shifted by up to an eighth of their size, on black; half of them are mirrored.
        normalization: Mean and standard deviation of the pixels: ``backbone`` uses those with which the task's timm
            model was trained; ``imagenet``, ``inception`` (0.5 each, most of timm's ViTs) and ``clip`` set
            them.
        download: Download the data set into ``root`` unless it is complete, if torchvision can.
    """

    in_chans = 3
    source: ImageSource
    normalizations: ClassVar[Mapping[str, Statistics]] = NORMALIZATIONS

    def __init__(
        self, *, root: str = "data/downloads", batch_size: int = 128, image_size: int = 224, images_per_class: int = 0,
        val_images_per_class: int = 0, val_images: int = 0, test_images: int = 0, val_share: float = VAL_SHARE,
        test_share: float = TEST_SHARE, split_file: str | None = None, split_seed: int = 0,
        allow_missing: bool = False, augment: bool = False,
        normalization: Literal["backbone", "imagenet", "inception", "clip"] = "backbone", download: bool = False,
        **loading: Any,
    ) -> None:  # fmt: skip
        """Check the settings and that the data set is there; images are read when they are asked for."""
        super().__init__(batch_size=batch_size, **loading)
        check_path("data.root", root, "Give the folder that holds the images.")
        if split_file is not None:
            check_path("data.split_file", split_file, "Give a JSON file of CoOp's form, or leave it out.")
        check_whole("data.image_size", image_size, 1, "Give pixels, for example 32 or 224.")
        for name, flag in {"allow_missing": allow_missing, "augment": augment, "download": download}.items():
            check_flag(f"data.{name}", flag)
        numbers = {
            "images_per_class": images_per_class, "val_images_per_class": val_images_per_class,
            "val_images": val_images, "test_images": test_images,
        }  # fmt: skip
        for name, number in numbers.items():
            check_whole(f"data.{name}", number, 0, "Give a number of images, or 0.")
        splits.check_shares(val_share, test_share)
        splits.check_split_seed(split_seed)
        check_choice("data.normalization", normalization, [*self.normalizations, BACKBONE])
        self.root, self.download, self.allow_missing = str(root), download, allow_missing
        self.image_size, self.augment, self.normalization = image_size, augment, normalization
        self.images_per_class, self.val_images_per_class = images_per_class, val_images_per_class
        self.val_images, self.test_images = val_images, test_images
        self.val_share, self.test_share = val_share, test_share
        self.split_file, self.split_seed = split_file, split_seed
        if normalization != BACKBONE:
            self.mean, self.std = self.normalizations[normalization]
        self._parts: Mapping[Part, Listing] | None = None
        self._split_off: Mapping[Part, str] = {}  # settings that choose the images of a part
        try:
            if not download:
                self.source.check_folder(root)
            self.class_names = self._find_class_names()
        except SettingError as error:
            if not download or error.setting != "data.root":
                raise  # what the root lacks is fetched later

    def prepare_data(self) -> None:
        """Fetch the data set if asked to; in one process only."""
        if self.download:
            self.source.fetch(self.root)

    def setup(self, stage: str) -> None:
        """Check and split the images; the same for every stage."""
        parts = self.check()
        part, verb = NEEDED.get(stage, (None, ""))
        if part is not None and not len(parts[part].files):  # the Trainer would run over no image without a word
            name, problem = self._split_off.get(part, "root"), f"has no images to {verb} with."
            if name == "root" or not parts["train"].files:
                raise SettingError("data.root", self.root, problem, self.source.remedy(self.root))
            remedy = f"List some as {part}." if name == "split_file" else "Set it above 0 to split some off the others."
            raise SettingError(f"data.{name}", getattr(self, name), problem, remedy)
        if self.normalization == BACKBONE:
            self.mean, self.std = augmentation.backbone_statistics(getattr(self.trainer, "lightning_module", None))
        plain = [augmentation.resize(self.image_size)]
        augmented = self.source.augmentation(self.image_size) if self.augment else plain
        if self.rand_augment is not None:
            augmented = [*augmented, self.rand_augment.transform()]
        self.train_set, self.val_set, self.test_set = (
            ImageSubset(parts[part], image_transform(augmented if part == "train" else plain, self.mean, self.std))
            for part in PARTS
        )

    def check(self) -> Mapping[Part, Listing]:
        """Check every file's name and size and decode a few, in seconds; the second call returns the same answer.

        Raises:
            SettingError: A file or a class is missing (the first is named), or there are too few images for a setting.
            DamagedImageError: An image is empty or cannot be read; the first is named.
        """
        if self._parts is None:
            start = time.monotonic()
            self.source.check_folder(self.root)
            self.class_names = self._find_class_names()
            parts = present(
                self._split(), self.class_names, root=self.root, remedy=self.source.remedy(self.root),
                allow_missing=self.allow_missing if self.source.may_lack_images else None,
            )  # fmt: skip
            read_some(parts)
            by: dict[str, Any] = {"seed": self.split_seed, "class_names": self.class_names, "fewer": self.allow_missing}
            parts["train"] = splits.choose_per_class(parts["train"], self.images_per_class, **by)
            few = self.val_images_per_class if parts["train"].files else 0  # there is a test part alone
            share = self._split_off.get("val", "split_file")
            beside = "" if share == "split_file" else f", or split some off with {share}"
            parts["val"] = splits.choose_per_class(
                parts["val"], few, kind="validation", setting="data.val_images_per_class", beside=beside, **by
            )
            self._parts = parts
            counts = ", ".join(f"{len(parts[part].files):,} {part}" for part in PARTS)
            seconds = time.monotonic() - start
            line = f"{self.source.name}: {counts} images, {self.num_classes} classes (checked in {seconds:.1f} s)"
            rank_zero_info(line)
        return self._parts

    def _find_class_names(self) -> tuple[str, ...]:
        if self.split_file is not None:
            return splits.read_split_file(self.split_file)[0]
        return self.source.find_class_names(self.root)

    def _split(self) -> Mapping[Part, Listing]:
        if self.split_file is not None:
            self._split_off = dict.fromkeys(PARTS, "split_file")
            folder = self.source.folder(self.root)
            parts = splits.read_split_file(self.split_file)[1].items()
            return {part: Listing([str(folder / file) for file in each.files], each.labels) for part, each in parts}
        found = self.source.listings(self.root, self.class_names, all_classes=not self.allow_missing)
        by: dict[str, Any] = {"seed": self.split_seed, "class_names": self.class_names}
        if "val" in found:
            return found
        if "test" in found:
            self._split_off = {"val": "val_images"}
            by |= {"val_images": self.val_images, "test_images": self.test_images}
            return splits.split_by_numbers(found["train"], found["test"], **by)
        self._split_off = {"val": "val_share", "test": "test_share"}
        return splits.split_by_shares(found["train"], val_share=self.val_share, test_share=self.test_share, **by)
