"""What CIFAR-10 and CIFAR-100 share: the two layouts that they are read from, and their augmentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flops_lightning.datamodules.augmentation import resize
from flops_lightning.datamodules.files import Listing, Part, list_class_folders
from flops_lightning.datamodules.photos import PhotoDataModule
from flops_lightning.datamodules.sources import ImageSource
from flops_lightning.errors import SettingError

ORIGINAL_SIZE, PADDING = 32, 4  # of the images, and of the crop that augments them, in pixels
SHOWN_CLASSES = 10  # in a message
IN_FOLDERS: tuple[Part, ...] = ("train", "test")


@dataclass(frozen=True)
class CIFARSource(ImageSource):
    """Images of 32 x 32 pixels, a training and a test part, from the first layout that is there.

    - ``root/<archive>/``, the archive that torchvision opens and fetches (170 MB);
    - ``root/train/<class>/*`` and ``root/test/<class>/*``, image files (PNG, JPEG, ...) of any number.

    The order of the images, and with it the split by a seed, differs between the two layouts.

    Attributes:
        archive: Folder of torchvision's archive.
    """

    archive: str = ""
    may_lack_images = False

    def check_folder(self, root: str) -> None:
        """Raise a :class:`SettingError` unless the folder has one of the layouts."""
        if not self._has(root, "."):
            raise SettingError("data.root", root, "is not a folder.", self.remedy(root))
        if not any(self._has(root, name) for name in (self.archive, *IN_FOLDERS)):
            raise SettingError("data.root", root, f"holds no {self.name}.", self.remedy(root))

    def remedy(self, root: str) -> str:
        """Both layouts, with the names of the first classes."""
        names = self.class_names
        shown = names if len(names) <= SHOWN_CLASSES else (*names[:3], "...", names[-1])
        return (
            f"Set data.download: true to fetch {self.archive}/ into it, or put images there as train/NAME/* and "
            f"test/NAME/* with the names {', '.join(shown)}."
        )

    def listings(self, root: str, class_names: tuple[str, ...], *, all_classes: bool) -> Mapping[Part, Listing]:
        """The training and the test part."""
        if self._has(root, self.archive):
            return self._archived(root)
        return {part: list_class_folders(root, part, class_names, remedy=self.remedy(root)) for part in IN_FOLDERS}

    def by_hand(self, root: str) -> str:
        """Where to put the archive."""
        return f"Check the connection, or put {self.torchvision().url} into {root} yourself."

    def augmentation(self, image_size: int) -> list[Any]:
        """A random crop of the image padded by an eighth of its size, mirrored half the time.

        Source: K. He et al., Deep Residual Learning for Image Recognition, 2016, section 4.2.
        """
        from torchvision.transforms import v2

        padding = round(image_size * PADDING / ORIGINAL_SIZE)
        return [resize(image_size), v2.RandomCrop(image_size, padding=padding), v2.RandomHorizontalFlip()]

    def _archived(self, root: str) -> Mapping[Part, Listing]:
        opener = self.torchvision()
        try:
            train, test = opener(root, train=True), opener(root, train=False)
        except (OSError, RuntimeError) as error:
            problem = f"{self.archive}/ is incomplete or damaged."
            raise SettingError("data.root", root, problem, self.remedy(root)) from error
        if tuple(train.classes) != self.class_names:
            has = f"{train.classes[:SHOWN_CLASSES]}{' ...' * (len(train.classes) > SHOWN_CLASSES)}"
            raise SettingError("data.root", root, f"{self.archive}/ has the classes {has}.", self.remedy(root))
        return {"train": Listing([*train.data], train.targets), "test": Listing([*test.data], test.targets)}

    @staticmethod
    def _has(root: str, name: str) -> bool:
        return (Path(root).expanduser() / name).is_dir()


class CIFARDataModule(PhotoDataModule):
    """Small images that are split by numbers; a subclass names its source, normalizations, root and classes."""

    fixed = frozenset({"allow_missing", "split_file", "val_share", "test_share"})

    def __init__(
        self, *, batch_size: int = 64, image_size: int = ORIGINAL_SIZE, val_images: int = 5000, **settings: Any
    ) -> None:
        """Fix the settings that do not apply.

        Args:
            batch_size: Images per batch, all processes together, at least 1.
            image_size: Height and width of the images, in pixels; where it is not 32 they are resized bicubically.
            val_images: Images split off the training part for validation, each class keeping its share; 0 for none.
            **settings: Those of :class:`PhotoDataModule`.
        """
        super().__init__(
            batch_size=batch_size, image_size=image_size, val_images=val_images, val_share=0.0, test_share=0.0,
            split_file=None, allow_missing=False, **settings,
        )  # fmt: skip
