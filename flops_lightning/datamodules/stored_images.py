"""What data sets of stored images share: settings with their checks, statistics of pixels, a look into a few files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from flops_lightning.datamodules.base import ImageDataModule
from flops_lightning.datamodules.images import BACKBONE, NORMALIZATIONS, Statistics, backbone_statistics, read_photo
from flops_lightning.datamodules.listing import PARTS, Part
from flops_lightning.datamodules.splits import check_image_numbers, check_split_seed
from flops_lightning.errors import SettingError

READ_AT_START = 32  # images, spread over the data set, that are decoded before a run begins


class StoredImageDataModule(ImageDataModule):
    """Loaders over colour images that lie in a folder or can be fetched into it.

    Attributes:
        data_set: Name of the data set, for messages.
        normalizations: Mean and standard deviation by the name that ``normalization`` knows them by.
    """

    in_chans = 3
    data_set: ClassVar[str]
    normalizations: ClassVar[Mapping[str, Statistics]] = NORMALIZATIONS

    def __init__(
        self,
        *,
        root: str,
        image_size: int,
        images_per_class: int,
        split_seed: int,
        augment: bool,
        normalization: str,
        download: bool,
        **loading: Any,
    ) -> None:
        """Check and keep the settings; a subclass says what they do to its images.

        Args:
            root: Folder of the data set.
            image_size: Height and width of the images, in pixels.
            images_per_class: Training images of each class to learn from; 0 uses all.
            split_seed: Chooses the images of the settings that choose. From 0 to 2**32 - 1.
            augment: Augment training images.
            normalization: Mean and standard deviation of the pixels, a name of ``normalizations`` or ``backbone``.
            download: Fetch the data set unless it is there and whole.
            **loading: Settings of :class:`ImageDataModule`.

        Raises:
            SettingError: A setting is outside its range.
        """
        super().__init__(**loading)
        if image_size < 1:
            raise SettingError("data.image_size", image_size, "is below 1.", "Give pixels, for example 32 or 224.")
        check_image_numbers(images_per_class=images_per_class)
        check_split_seed(split_seed)
        if normalization != BACKBONE and normalization not in self.normalizations:
            known = ", ".join((*self.normalizations, BACKBONE))
            raise SettingError("data.normalization", normalization, "is not known.", f"Use one of {known}.")
        self.root = root
        self.image_size = image_size
        self.images_per_class = images_per_class
        self.split_seed = split_seed
        self.augment = augment
        self.normalization = normalization
        if normalization != BACKBONE:
            self.mean, self.std = self.normalizations[normalization]
        self.download = download

    def find_statistics(self) -> None:
        """Ask the task for mean and standard deviation, where ``normalization`` leaves them to its backbone.

        Raises:
            SettingError: It has no timm backbone.
        """
        if self.normalization == BACKBONE:
            self.mean, self.std = backbone_statistics(getattr(self.trainer, "lightning_module", None))

    def tell_counts(self, counts: Mapping[Part, int], *, start: float) -> None:
        """Say what a check has found.

        Args:
            counts: Images of each part.
            start: When it began, by ``time.monotonic``.
        """
        listed = ", ".join(f"{counts[part]:,} {part}" for part in PARTS)
        seconds = time.monotonic() - start
        rank_zero_info(f"{self.data_set}: {listed} images, {self.num_classes} classes (checked in {seconds:.1f} s)")


def look_into(files: Sequence[str]) -> None:
    """Decode a few images, spread over all of them.

    Raises:
        DamagedImageError: One of the few cannot be read.
    """
    for file in files[:: max(1, len(files) // READ_AT_START)]:
        read_photo(file)
