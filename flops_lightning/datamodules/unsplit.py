"""What data sets of class folders without a split share: Caltech101 and EuroSAT."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from flops_lightning.datamodules.class_folders import list_class_folders
from flops_lightning.datamodules.fixed_splits import (
    TEST_SHARE,
    VAL_SHARE,
    check_shares,
    read_split_file,
    split_by_seed,
)
from flops_lightning.datamodules.listing import Listing, Part
from flops_lightning.datamodules.photos import DOWNLOADS, PhotoDataModule


class UnsplitDataModule(PhotoDataModule):
    """One folder of class folders, split by shares and seed, or by a file.

    Attributes:
        images_below: Where the class folders lie, below the root.
        known_class_names: Their names, in alphabetical order.
        left_out: Folders there that are no class.
    """

    images_below: ClassVar[str]
    known_class_names: ClassVar[tuple[str, ...]]
    left_out: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        *,
        root: str = DOWNLOADS,
        split_file: str | None = None,
        val_share: float = VAL_SHARE,
        test_share: float = TEST_SHARE,
        **settings: Any,
    ) -> None:
        """Check the settings and that the folder is there.

        Args:
            root: Folder that holds the data set in torchvision's layout.
            split_file: A split to use instead of the shares, JSON in the form of CoOp's ``split_zhou_*.json``.
            val_share: Share of each class's images to validate with, chosen by ``split_seed``.
            test_share: Share of each class's images to test with, chosen by ``split_seed``.
            **settings: Those of :class:`PhotoDataModule`.

        Raises:
            SettingError: A setting is outside its range, the split file has another form, or ``root`` does not hold
                the data set.
        """
        check_shares(val_share, test_share)
        self.split_file, self.val_share, self.test_share = split_file, val_share, test_share
        super().__init__(root=root, **settings)

    @property
    def folder(self) -> Path:
        """The folder of the class folders."""
        return Path(self.root).expanduser() / self.images_below

    def remedy(self) -> str:
        """What to put where."""
        return f"Put the class folders into {self.folder}, or remove what is there and set data.download: true."

    def listings(self) -> Mapping[Part, Listing]:
        """The images of each part."""
        if self.split_file is not None:
            _, parts = read_split_file(self.split_file)
            return {
                part: Listing([str(self.folder / file) for file in listing.files], listing.labels)
                for part, listing in parts.items()
            }
        images = list_class_folders(
            self.root, self.images_below, self.class_names, remedy=self.remedy(), all_classes=not self.allow_missing,
            left_out=self.left_out,
        )  # fmt: skip
        return split_by_seed(
            images, val_share=self.val_share, test_share=self.test_share, seed=self.split_seed,
            class_names=self.class_names,
        )  # fmt: skip

    def find_class_names(self) -> tuple[str, ...]:
        """Names of the split file, or of the data set."""
        return self.known_class_names if self.split_file is None else read_split_file(self.split_file)[0]
