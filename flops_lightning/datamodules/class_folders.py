"""Images in one folder per class, found by torchvision's ``ImageFolder`` and checked against the classes expected."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from flops_lightning.datamodules.listing import Listing
from flops_lightning.errors import SettingError


def class_folders(folder: Path, *, root: str, remedy: str) -> tuple[str, ...]:
    """Names of the class folders in a folder, in alphabetical order; hidden ones are none.

    Args:
        folder: It is there, or not.
        root: What ``data.root`` is, for the error.
        remedy: How the data set should be laid out, for the error.

    Raises:
        SettingError: There are none.
    """
    names = sorted(entry.name for entry in folder.glob("*/") if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise SettingError("data.root", root, f"has no class folders in {folder.name}/.", remedy)
    return tuple(names)


def list_class_folders(
    root: str,
    part: str,
    class_names: Sequence[str],
    *,
    remedy: str,
    all_classes: bool = True,
    left_out: Sequence[str] = (),
) -> Listing:
    """The images ``root/part/<class>/*``, class by class; labels follow ``class_names``. Hidden files are none.

    Args:
        root: The folder that ``data.root`` names.
        part: Name of the folder in it that holds the class folders; may be a path of several.
        class_names: Names that the class folders may have, and no other.
        remedy: How the data set should be laid out, for the error.
        all_classes: Whether every class must have a folder with images.
        left_out: Folders that are no class and may be there.

    Raises:
        SettingError: The folder is missing, a class folder is missing or has no images, or there is a folder too many.
    """
    from torchvision.datasets import ImageFolder

    folder = Path(root).expanduser() / part
    if not folder.is_dir():
        raise SettingError("data.root", root, f"has no folder {part}/.", remedy)
    found = {*class_folders(folder, root=root, remedy=remedy)} - {*left_out}
    missing, unknown = sorted({*class_names} - found), sorted(found - {*class_names})
    if unknown or (missing and all_classes):
        extra = f"has folders of no class, {_some(unknown)}" if unknown else ""
        lack = f"lacks {_some(missing)}" if missing and all_classes else ""
        problem = "; it ".join(filter(None, (extra, lack)))
        raise SettingError("data.root", root, f"{part}/ {problem}.", remedy)
    images = ImageFolder(str(folder), allow_empty=True)
    labels = {place: class_names.index(name) for name, place in images.class_to_idx.items() if name in class_names}
    start = len(str(folder))
    kept = [
        (file, labels[place])
        for file, place in images.samples
        if place in labels and f"{os.sep}." not in file[start:]  # as in .ipynb_checkpoints/ and ._copied_by_macOS.jpg
    ]
    empty = sorted({*range(len(class_names))} - {label for _, label in kept})
    if empty and all_classes:
        names = _some([class_names[label] for label in empty])
        raise SettingError("data.root", root, f"{part}/ has no images of {names}.", remedy)
    if not kept:
        raise SettingError("data.root", root, f"{part}/ has no images.", remedy)
    return Listing.of(kept)


def _some(names: Sequence[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
