"""Where the images of a data set lie, which there are, and how to get them; no Lightning here."""

import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, ClassVar

from flops_lightning.datamodules.files import Listing, Part, list_class_folders
from flops_lightning.errors import SettingError

FETCHING_FAILS = (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError, zipfile.BadZipFile)
"""What a download ends with: no connection or disk, another file than was expected, one cut off."""


@dataclass(frozen=True)
class ImageSource:
    """One folder of class folders ``root/below/<class>/*`` without a split, as torchvision lays it out and fetches it.

    Other layouts are subclasses.

    Attributes:
        name: Name of the data set, for messages; without hyphens that of torchvision's class.
        below: The data set's folder, below the root.
        class_names: Names of the classes, in the order of the labels; empty where they are found in the folder.
        contents: What belongs into the folder, for messages.
        left_out: Folders that may be there and are not classes.
        may_lack_images: Whether the data set can be used in part.
    """

    name: str
    below: str = ""
    class_names: tuple[str, ...] = ()
    contents: str = "the class folders"
    left_out: tuple[str, ...] = ()
    may_lack_images: ClassVar[bool] = True

    def folder(self, root: str) -> Path:
        """The folder that is there if the data set is."""
        return Path(root).expanduser() / self.below

    def check_folder(self, root: str) -> None:
        """Raise a :class:`SettingError` if the folder is not there."""
        folder, top = self.folder(root), Path(root).expanduser()
        if not folder.is_dir():
            below = f"{folder.relative_to(top)}/" if folder != top else "of that name"
            raise SettingError("data.root", root, f"has no folder {below}.", self.remedy(root))

    def remedy(self, root: str) -> str:
        """How to lay out the data set and how to get it, for errors."""
        return f"Put {self.contents} into {self.folder(root)}, or remove what is there and set data.download: true."

    def find_class_names(self, root: str) -> tuple[str, ...]:
        """Names in the order of the labels."""
        return self.class_names

    def listings(self, root: str, class_names: tuple[str, ...], *, all_classes: bool) -> Mapping[Part, Listing]:
        """The images of the parts that the data set comes in; whether all are there is checked afterwards.

        Returns:
            By part: ``train`` alone where there is no split, ``train`` and ``test``, or all three.
        """
        images = list_class_folders(
            root, self.below, class_names, remedy=self.remedy(root), all_classes=all_classes, left_out=self.left_out
        )
        return {"train": images}

    def torchvision(self) -> Any:
        """The class of torchvision that opens and fetches the data set."""
        import torchvision.datasets

        return getattr(torchvision.datasets, self.name.replace("-", ""))

    def fetch(self, root: str) -> None:
        """Download through torchvision unless the data set is there and whole."""
        try:
            self.torchvision()(root, download=True)
        except FETCHING_FAILS as error:
            problem = f"{self.name} could not be fetched ({error})."
            raise SettingError("data.download", True, problem, self.by_hand(root)) from error

    def by_hand(self, root: str) -> str:
        """What to do where the download fails."""
        return f"Check the connection. {self.remedy(root)}"

    def augmentation(self, image_size: int) -> list[Any]:
        """Transforms of torchvision for an 8-bit image: a random part of it, resized, and mirrored half the time.

        Source: C. Szegedy et al., Going Deeper with Convolutions, 2015, section 6.
        """
        from torchvision.transforms import v2

        cubic = v2.InterpolationMode.BICUBIC
        return [v2.RandomResizedCrop(image_size, interpolation=cubic, antialias=True), v2.RandomHorizontalFlip()]
