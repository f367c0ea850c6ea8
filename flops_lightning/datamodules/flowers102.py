"""Flowers102 from torchvision's folder layout."""

from collections.abc import Mapping
from typing import Any

from flops_lightning.datamodules.files import Listing, Part
from flops_lightning.datamodules.photos import PhotoDataModule
from flops_lightning.datamodules.sources import ImageSource
from flops_lightning.errors import SettingError

CLASSES = 102
SETS: dict[Part, str] = {"train": "trnid", "val": "valid", "test": "tstid"}


class Flowers102Source(ImageSource):
    """Images ``root/flowers-102/jpg/image_00001.jpg`` and following; the authors' lists are beside ``jpg/``."""

    def find_class_names(self, root: str) -> tuple[str, ...]:
        """The flowers' names, as torchvision lists them."""
        return tuple(getattr(self.torchvision(), "classes", [str(number + 1) for number in range(CLASSES)]))

    def listings(self, root: str, class_names: tuple[str, ...], *, all_classes: bool) -> Mapping[Part, Listing]:
        """The three sets of ``setid.mat``."""
        labels = self._numbers(root, "imagelabels.mat", "labels")
        sets = {part: self._numbers(root, "setid.mat", name) for part, name in SETS.items()}
        if not (_within(labels, CLASSES) and _within([n for numbers in sets.values() for n in numbers], len(labels))):
            raise SettingError("data.root", root, "has lists of another data set.", self.remedy(root))
        folder = self.folder(root) / "jpg"
        return {
            part: Listing([f"{folder}/image_{n:05d}.jpg" for n in numbers], [labels[n - 1] - 1 for n in numbers])
            for part, numbers in sets.items()
        }

    def _numbers(self, root: str, name: str, variable: str) -> list[int]:
        from scipy.io import loadmat  # comes with scikit-learn

        file = self.folder(root) / name
        if not file.is_file():
            raise SettingError("data.root", root, f"has no {file}.", self.remedy(root))
        try:
            return [int(number) for number in loadmat(file)[variable].ravel()]
        except Exception as error:  # the file may hold anything
            raise SettingError("data.root", root, f"has a damaged {file}.", self.remedy(root)) from error


def _within(numbers: list[int], last: int) -> bool:
    """Whether there are numbers, all from 1 to ``last``."""
    return bool(numbers) and min(numbers) >= 1 and max(numbers) <= last


class Flowers102DataModule(PhotoDataModule):
    """Flowers102: 8,189 photos of flowers in 102 classes, fetched by torchvision with ``download`` (330 MB).

    The split is the standard one: ten images of each class for training, ten for validation, and 6,149 for testing.

    Source: M.-E. Nilsback and A. Zisserman, Automated Flower Classification over a Large Number of Classes, 2008.

    Example:
        >>> data = Flowers102DataModule(download=True, images_per_class=5)
        >>> data.num_classes
        102
    """

    source = Flowers102Source("Flowers102", "flowers-102", contents="jpg/, imagelabels.mat and setid.mat")
    template = "a photo of a {}, a type of flower."

    def __init__(self, **settings: Any) -> None:
        """Check the settings (:class:`PhotoDataModule`) and that the folder is there."""
        super().__init__(val_images=0, test_images=0, val_share=0.0, test_share=0.0, split_file=None, **settings)
