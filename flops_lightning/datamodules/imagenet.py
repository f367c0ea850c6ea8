"""ImageNet (ILSVRC 2012) from class folders."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flops_lightning.datamodules.class_names import imagenet_names, imagenet_templates
from flops_lightning.datamodules.files import Listing, Part, class_folders, list_class_folders
from flops_lightning.datamodules.photos import PhotoDataModule
from flops_lightning.datamodules.sources import ImageSource
from flops_lightning.errors import SettingError

WNID = re.compile(r"n\d{8}")


class ImageNetSource(ImageSource):
    """``root/train/<wnid>/*`` and ``root/val/<wnid>/*``, which is the test part here."""

    def folder(self, root: str) -> Path:
        """The folder of the training images; of the validation images where there is no other."""
        top = Path(root).expanduser()
        return top / "train" if (top / "train").is_dir() else top / "val"

    def remedy(self, root: str) -> str:
        """What to put where."""
        return "Put the images there as train/WNID/*.JPEG and val/WNID/*.JPEG (data/README.md says how)."

    def find_class_names(self, root: str) -> tuple[str, ...]:
        """The folders' names."""
        folder, remedy = self.folder(root), self.remedy(root)
        names = class_folders(folder, root=root, remedy=remedy)
        strange = [name for name in names if not WNID.fullmatch(name)]
        if strange:
            problem = f"{folder.name}/ has {strange[0]}/, which is not a WordNet id."
            raise SettingError("data.root", root, problem, remedy)
        return names

    def listings(self, root: str, class_names: tuple[str, ...], *, all_classes: bool) -> Mapping[Part, Listing]:
        """The images of the folders that are there."""
        top, remedy = Path(root).expanduser(), self.remedy(root)
        folders: dict[Part, str] = {"test": "val", "train": "train"}
        return {
            part: list_class_folders(root, name, class_names, remedy=remedy, all_classes=all_classes)
            if (top / name).is_dir() else Listing()
            for part, name in folders.items()
        }  # fmt: skip


class ImageNetDataModule(PhotoDataModule):
    """ImageNet: 1,281,167 photos in 1,000 classes for training, and the 50,000 of the validation part for testing.

    Read from ``root/train/<wnid>/*`` and ``root/val/<wnid>/*``. Labels are the positions of the folders' names (WordNet
    ids) in alphabetical order, as in every published ImageNet classifier. No development kit is needed. A subset of the
    classes, the same in both folders, works as well. The test part's labels are not public, so published accuracies,
    the paper's among them, are for ``val``, which is ``test`` here; ``val_images`` are split off the training part.
    Without ``train/`` there is only ``test`` (and ``predict``).

    Source: O. Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, 2015.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as root:
        ...     (Path(root) / "val" / "n01440764").mkdir(parents=True)
        ...     (Path(root) / "val" / "n01443537").mkdir()
        ...     data = ImageNetDataModule(root=root)
        >>> data.class_names
        ('n01440764', 'n01443537')
    """

    source = ImageNetSource("ImageNet")

    @property
    def display_names(self) -> tuple[str, ...]:
        """CLIP's names of the classes; see :func:`imagenet_names`."""
        return imagenet_names(self.class_names)

    @property
    def templates(self) -> tuple[str, ...]:
        """CLIP's 80."""
        return imagenet_templates()

    def __init__(self, *, root: str = "data/downloads/imagenet", val_images: int = 10000, **settings: Any) -> None:
        """Check the settings (:class:`PhotoDataModule`; ``download`` is refused) and that the folders are there."""
        if settings.get("download"):
            problem = "ImageNet takes an account to fetch."
            raise SettingError("data.download", True, problem, self.source.remedy(root))
        super().__init__(
            root=root, val_images=val_images, test_images=0, val_share=0.0, test_share=0.0, split_file=None, **settings
        )
