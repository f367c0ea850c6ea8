"""Images of your own, in class folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

from flops_lightning.datamodules.augmentation import backbone_size, image_transform, resize
from flops_lightning.datamodules.files import (
    PARTS,
    ImageSubset,
    Listing,
    Part,
    class_folders,
    list_class_folders,
    present,
    read_some,
)
from flops_lightning.datamodules.photos import PhotoDataModule
from flops_lightning.datamodules.sources import ImageSource
from flops_lightning.datamodules.splits import TEST_SHARE, VAL_SHARE, split_by_shares
from flops_lightning.errors import SettingError, check_path, check_whole

LAYOUT = (
    "Lay it out as train/CLASS/*, val/CLASS/* and test/CLASS/*, or as CLASS/* alone, from which val_share and "
    "test_share are split off."
)
OTHER_NAMES: dict[str, Part] = {
    "training": "train", "valid": "val", "validation": "val", "testing": "test", **{part: part for part in PARTS},
}  # fmt: skip
"""Names of folders that stand for a part, in small letters."""
SIZE = 224
"""Height and width of images where no model tells its own."""


class ImageFolderSource(ImageSource):
    """``root/{train,val,test}/<class>/*``, or ``root/<class>/*`` without a split."""

    def remedy(self, root: str) -> str:
        """What to put where."""
        return LAYOUT

    def parts(self, root: str) -> list[Part]:
        """The folders of parts that are there; none where the class folders lie in the root itself."""
        top = Path(root).expanduser()
        # A class may have the name of a part (train, of trains), but its folder holds images and not folders.
        there: list[Part] = [part for part in PARTS if (top / part).is_dir()]
        return there if any(_holds_folders(top / part) for part in there) else []

    def find_class_names(self, root: str) -> tuple[str, ...]:
        """The folders' names, in alphabetical order."""
        parts, top = self.parts(root), Path(root).expanduser()
        if parts and "train" not in parts:
            raise SettingError("data.root", root, f"has a folder {parts[0]}/, but no folder train/.", LAYOUT)
        found = class_folders(top, root=root, remedy=LAYOUT)
        for name in found:
            part = OTHER_NAMES.get(name.lower())
            if part is not None and name not in parts and _holds_folders(top / name):
                raise SettingError("data.root", root, f"{name}/ is not the name of a part.", f"Rename it {part}/.")
        names = class_folders(top / "train", root=root, remedy=LAYOUT) if parts else found
        if len(names) == 1:
            folder = top / "train" if parts else top
            deeper = f"Give {top / names[0]} as the root." if not parts and _holds_folders(top / names[0]) else LAYOUT
            raise SettingError("data.root", root, f"{folder.name}/ has one class alone, {names[0]}/.", deeper)
        return names

    def listings(self, root: str, class_names: tuple[str, ...], *, all_classes: bool) -> Mapping[Part, Listing]:
        """The images of the parts that are there; ``train`` alone where there are no folders of parts."""
        folders: dict[Part, str] = {part: part for part in self.parts(root)} or {"train": "."}
        return {
            part: list_class_folders(
                root, folder, class_names, remedy=LAYOUT, all_classes=all_classes and part == "train"
            )
            for part, folder in folders.items()
        }  # fmt: skip


def _holds_folders(folder: Path) -> bool:
    return any(entry.is_dir() and not entry.name.startswith(".") for entry in folder.iterdir())


class ImageFolderDataModule(PhotoDataModule):
    """Your own images, in one folder per class, named after the class.

    Read from ``root/train/<class>/*``, ``root/val/<class>/*`` and ``root/test/<class>/*``. Missing parts are split off
    the training images, stratified by class; so are both if ``root`` itself holds the class folders. Labels are the
    positions of the folders' names in alphabetical order. :class:`PhotoDataModule` says what else the folders may
    contain, and which images are converted.

    Args:
        root: Folder that holds the images.
        image_size: Height and width to resize the images to, in pixels; 0: the size that the model was built for.
        val_share: Share of each class's images for validation, if there is no ``val/``; None: 0.2.
        test_share: Share of each class's images for testing, if there is no ``test/``; None: 0.3.
        predict_root: Folder with unlabelled images, also in its subfolders, which ``predict`` reads instead of the test
            images; all labels in its batches are -1.
        **settings: Those of :class:`PhotoDataModule`, except those of downloads and of numbers of images.

    Raises:
        SettingError: The folders are missing or not laid out as above, or a share cannot be split off.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as root:
        ...     for name in ("cat", "dog"):
        ...         (Path(root) / name).mkdir()
        ...     data = ImageFolderDataModule(root=root)
        >>> data.class_names
        ('cat', 'dog')
    """

    source = ImageFolderSource("images of your own")

    def __init__(
        self, *, root: str, image_size: int = 0, val_share: float | None = None, test_share: float | None = None,
        predict_root: str | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        """Check the settings and that the folders are there."""
        check_path("data.root", root, LAYOUT)
        check_whole("data.image_size", image_size, 0, "Give pixels, for example 32, or 0 for the model's.")
        root, self.size_of_model = str(root), image_size == 0
        self.source.check_folder(root)
        folders, shares = self.source.parts(root), {"val": val_share, "test": test_share}
        for part, share in shares.items():
            given = f"{root} has a folder {part}/" if part in folders else "the split_file says which images they are"
            if share is not None and (part in folders or settings.get("split_file") is not None):
                raise SettingError(f"data.{part}_share", share, f"has no effect: {given}.", "Leave it out.")
        usual = {"val": VAL_SHARE, "test": TEST_SHARE}
        split_off = {p: usual[p] if share is None else share for p, share in shares.items()}
        if predict_root is not None:
            check_path("data.predict_root", predict_root, "Give a folder of images.")
            if not Path(predict_root).expanduser().is_dir():
                raise SettingError("data.predict_root", predict_root, "is not a folder.", "Give a folder of images.")
        self.predict_root = predict_root
        super().__init__(
            root=root, image_size=image_size or SIZE, val_images=0, test_images=0, download=False,
            val_share=0.0 if "val" in folders else split_off["val"],
            test_share=0.0 if "test" in folders else split_off["test"], **settings,
        )  # fmt: skip

    def setup(self, stage: str) -> None:
        """Check and split the images; the same for every stage, but for ``predict`` those of ``predict_root``."""
        if self.size_of_model:
            self.image_size = backbone_size(getattr(self.trainer, "lightning_module", None)) or SIZE
        unlabelled = stage == "predict" and self.predict_root is not None
        super().setup("" if unlabelled else stage)
        if unlabelled:
            self.predict_set = ImageSubset(
                self._unlabelled(), image_transform([resize(self.image_size)], self.mean, self.std)
            )

    def predict_dataloader(self) -> DataLoader[Any]:
        """The images of ``predict_root`` in the order of their paths, or the test images."""
        return super().predict_dataloader() if self.predict_root is None else self._loader(self.predict_set)

    def _unlabelled(self) -> Listing:
        """The images below ``predict_root``, without hidden ones."""
        from torchvision.datasets.folder import IMG_EXTENSIONS

        root, remedy = str(self.predict_root), "Give a folder of images."
        top = Path(root).expanduser()
        found = (file for file in top.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS and file.is_file())
        files = sorted(
            str(file) for file in found if not any(name.startswith(".") for name in file.relative_to(top).parts)
        )
        if not files:
            raise SettingError("data.predict_root", root, "has no images.", remedy)
        images: dict[Part, Listing] = {"train": Listing(), "val": Listing(), "test": Listing(files, [-1] * len(files))}
        parts = present(images, (), root=root, remedy=remedy, allow_missing=None)
        read_some(parts)
        return parts["test"]

    def _split(self) -> Mapping[Part, Listing]:
        if self.split_file is not None:
            return super()._split()
        found = dict(self.source.listings(self.root, self.class_names, all_classes=not self.allow_missing))
        self._split_off = {part: f"{part}_share" for part in PARTS[1:] if part not in found}
        split = split_by_shares(
            found.pop("train"), val_share=self.val_share, test_share=self.test_share, seed=self.split_seed,
            class_names=self.class_names,
        )  # fmt: skip
        return {**split, **found}
