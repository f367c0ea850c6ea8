"""Flowers102 from torchvision's folder layout."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from flops_lightning.datamodules.listing import Listing, Part
from flops_lightning.datamodules.photos import PhotoDataModule
from flops_lightning.errors import SettingError

CLASSES = 102
SETS: dict[Part, str] = {"train": "trnid", "val": "valid", "test": "tstid"}


class Flowers102DataModule(PhotoDataModule):
    """Flowers102: 8,189 photos of flowers in 102 classes.

    Read from ``root/flowers-102/jpg/image_00001.jpg`` and following, with the authors' ``imagelabels.mat`` and
    ``setid.mat`` beside ``jpg/``, which torchvision opens and, with ``download``, fetches (330 MB). The split is the
    standard one: ten images of each class train, ten validate, and 6,149 test.

    Source: M.-E. Nilsback and A. Zisserman, Automated Flower Classification over a Large Number of Classes, 2008.
    """

    data_set = "Flowers102"
    published_classes = CLASSES

    @property
    def folder(self) -> Path:
        """The folder of images and lists."""
        return Path(self.root).expanduser() / "flowers-102"

    def remedy(self) -> str:
        """What to put where."""
        return (
            f"Put jpg/, imagelabels.mat and setid.mat into {self.folder}, or remove what is there and set "
            "data.download: true."
        )

    def find_class_names(self) -> tuple[str, ...]:
        """The flowers' names, as torchvision lists them."""
        from torchvision.datasets import Flowers102

        return tuple(getattr(Flowers102, "classes", [str(number + 1) for number in range(CLASSES)]))

    def listings(self) -> Mapping[Part, Listing]:
        """The three sets of ``setid.mat``."""
        labels = self._numbers("imagelabels.mat", "labels")
        sets = {part: self._numbers("setid.mat", name) for part, name in SETS.items()}
        numbers = [number for part in sets.values() for number in part]
        if not (_within(labels, CLASSES) and _within(numbers, len(labels))):
            raise SettingError("data.root", self.root, "has lists of another data set.", self.remedy())
        return {
            part: Listing.of([(str(self.folder / "jpg" / f"image_{n:05d}.jpg"), labels[n - 1] - 1) for n in numbers])
            for part, numbers in sets.items()
        }

    def fetch(self) -> None:
        """Download through torchvision."""
        from torchvision.datasets import Flowers102

        Flowers102(self.root, download=True)

    def _numbers(self, name: str, variable: str) -> list[int]:
        from scipy.io import loadmat  # comes with scikit-learn

        file = self.folder / name
        if not file.is_file():
            raise SettingError("data.root", self.root, f"has no {file}.", self.remedy())
        try:
            return [int(number) for number in loadmat(file)[variable].ravel()]
        except Exception as error:  # the file may hold anything
            raise SettingError("data.root", self.root, f"has a damaged {file}.", self.remedy()) from error


def _within(numbers: list[int], last: int) -> bool:
    """Whether there are numbers and all count from 1 to ``last``."""
    return bool(numbers) and min(numbers) >= 1 and max(numbers) <= last
