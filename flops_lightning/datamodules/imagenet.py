"""ImageNet (ILSVRC 2012) from class folders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flops_lightning.datamodules.class_folders import class_folders, list_class_folders
from flops_lightning.datamodules.listing import Listing, Part
from flops_lightning.datamodules.photos import PhotoDataModule
from flops_lightning.datamodules.splits import check_image_numbers, hold_out
from flops_lightning.errors import SettingError

WNID = re.compile(r"n\d{8}")


class ImageNetDataModule(PhotoDataModule):
    """ImageNet: 1,281,167 photos in 1,000 classes to learn from, and the 50,000 of the validation part to test with.

    Read from ``root/train/<wnid>/*`` and ``root/val/<wnid>/*``; labels are the places of the folders' names (WordNet
    ids) in alphabetical order, which is the order of every published ImageNet classifier. No development kit is needed.
    A part of the classes, the same in both folders, works as well. The test part's labels are not public, so published
    accuracies, the paper's among them, are of ``val``, which is ``test`` here; images to validate with are split off
    the training part. Without ``train/`` there is only ``test`` (and ``predict``).

    Source: O. Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, 2015.
    """

    data_set = "ImageNet"
    published_classes = 1000

    def __init__(self, *, root: str = "data/downloads/imagenet", val_images: int = 10000, **settings: Any) -> None:
        """Check the settings and that the folders are there.

        Args:
            root: Folder with ``train/`` and ``val/``.
            val_images: Images split off the training part to validate with, each class keeping its share; 0 for none.
            **settings: Those of :class:`PhotoDataModule`; there is no download.

        Raises:
            SettingError: A setting is outside its range, or ``root`` holds no ImageNet.
        """
        check_image_numbers(val_images=val_images)
        if settings.get("download"):
            raise SettingError("data.download", True, "ImageNet takes an account to fetch.", self.remedy())
        self.val_images = val_images
        super().__init__(root=root, **settings)

    @property
    def folder(self) -> Path:
        """The folder of the training images; of the validation images where there is no other."""
        root = Path(self.root).expanduser()
        return root / "train" if (root / "train").is_dir() else root / "val"

    def remedy(self) -> str:
        """What to put where."""
        return "Put the images there as train/WNID/*.JPEG and val/WNID/*.JPEG (data/README.md says how)."

    def find_class_names(self) -> tuple[str, ...]:
        """The folders' names.

        Raises:
            SettingError: One is no WordNet id: these are images of something else.
        """
        names = class_folders(self.folder, root=self.root, remedy=self.remedy())
        strange = [name for name in names if not WNID.fullmatch(name)]
        if strange:
            raise SettingError(
                "data.root", self.root, f"{self.folder.name}/ has {strange[0]}/, which is no WordNet id.", self.remedy()
            )
        return names

    def listings(self) -> Mapping[Part, Listing]:
        """``train/`` without the images held out, those, and ``val/``."""
        root, remedy = Path(self.root).expanduser(), self.remedy()
        strict = not self.allow_missing
        found: dict[Part, Listing] = {"train": Listing(), "val": Listing(), "test": Listing()}
        if (root / "val").is_dir():
            found["test"] = list_class_folders(self.root, "val", self.class_names, remedy=remedy, all_classes=strict)
        if (root / "train").is_dir():
            train = list_class_folders(self.root, "train", self.class_names, remedy=remedy, all_classes=strict)
            stay, held = hold_out(
                torch.tensor(train.labels), self.val_images, seed=self.split_seed, setting="data.val_images",
                class_names=self.class_names,
            )  # fmt: skip
            found |= {"train": train.at(stay), "val": train.at(held)}
        return found
