"""Food101 from torchvision's folder layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from flops_lightning.datamodules.listing import Listing, Part
from flops_lightning.datamodules.photos import DOWNLOADS, PhotoDataModule
from flops_lightning.datamodules.splits import check_image_numbers, hold_out
from flops_lightning.errors import SettingError


class Food101DataModule(PhotoDataModule):
    """Food101: 101,000 photos of dishes in 101 classes, of each 750 to learn from and 250 to test.

    Read from ``root/food-101/images/<class>/*.jpg`` and the lists ``root/food-101/meta/train.json`` and ``test.json``,
    which torchvision opens and, with ``download``, fetches (5 GB). The split is the standard one; images to validate
    with are split off the training part. Labels are the classes of ``train.json`` in alphabetical order.

    Source: L. Bossard et al., Food-101 - Mining Discriminative Components with Random Forests, 2014.
    """

    data_set = "Food101"
    published_classes = 101

    def __init__(self, *, root: str = DOWNLOADS, val_images: int = 5050, **settings: Any) -> None:
        """Check the settings and that the folder is there.

        Args:
            root: Folder that holds ``food-101/``.
            val_images: Images split off the training part to validate with, each class keeping its share; 0 for none.
            **settings: Those of :class:`PhotoDataModule`.

        Raises:
            SettingError: A setting is outside its range, or ``root`` holds no Food101.
        """
        check_image_numbers(val_images=val_images)
        self.val_images = val_images
        super().__init__(root=root, **settings)

    @property
    def folder(self) -> Path:
        """The folder of images and lists."""
        return Path(self.root).expanduser() / "food-101"

    def remedy(self) -> str:
        """What to put where."""
        return (
            f"Put images/ and meta/ of the data set into {self.folder}, or remove what is there and set "
            "data.download: true."
        )

    def find_class_names(self) -> tuple[str, ...]:
        """The classes of the training list."""
        return tuple(sorted(self._list("train")))

    def listings(self) -> Mapping[Part, Listing]:
        """The training list without the images held out, those, and the test list."""
        train, test = self._listing("train"), self._listing("test")
        labels = torch.tensor(train.labels)
        stay, held = hold_out(
            labels, self.val_images, seed=self.split_seed, setting="data.val_images", class_names=self.class_names
        )
        return {"train": train.at(stay), "val": train.at(held), "test": test}

    def fetch(self) -> None:
        """Download through torchvision."""
        from torchvision.datasets import Food101

        Food101(self.root, download=True)

    def _listing(self, part: Literal["train", "test"]) -> Listing:
        listed = self._list(part)
        unknown = sorted(listed.keys() - {*self.class_names})
        if unknown:
            raise SettingError(
                "data.root", self.root, f"meta/{part}.json has the class {unknown[0]!r}, train.json has not.",
                self.remedy(),
            )  # fmt: skip
        labels = {name: label for label, name in enumerate(self.class_names)}
        return Listing.of(
            [
                (str(self.folder / "images" / f"{image}.jpg"), labels[name])
                for name in sorted(listed)
                for image in listed[name]
            ]
        )

    def _list(self, part: Literal["train", "test"]) -> dict[str, list[str]]:
        file = self.folder / "meta" / f"{part}.json"
        try:
            content = json.loads(file.read_text())
            return {str(name): [str(image) for image in images] for name, images in content.items()}
        except (OSError, ValueError, AttributeError, TypeError) as error:
            problem = f"has no {file}" if isinstance(error, OSError) else f"has a damaged {file} ({error})"
            raise SettingError("data.root", self.root, f"{problem}.", self.remedy()) from error
