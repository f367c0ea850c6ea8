"""Images in one folder per class, read by torchvision's ``ImageFolder`` and checked against the classes expected."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flops_lightning.errors import SettingError

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder


def open_class_folders(root: str, part: str, class_names: Sequence[str], *, remedy: str) -> ImageFolder:
    """Open ``root/part/<class>/*``; labels follow ``class_names``, which are in alphabetical order.

    Args:
        root: The folder that ``data.root`` names.
        part: Name of the folder in it that holds the class folders.
        class_names: Names that the class folders must have, all of them and no other.
        remedy: How the data set should be laid out, for the error.

    Raises:
        SettingError: The folder or a class folder is missing, one has no images, or there is a folder too many.
    """
    from torchvision.datasets import ImageFolder

    folder = Path(root).expanduser() / part
    if not folder.is_dir():
        raise SettingError("data.root", root, f"has no folder {part}/.", remedy)
    found = {entry.name for entry in folder.iterdir() if entry.is_dir()}
    missing, unknown = sorted({*class_names} - found), sorted(found - {*class_names})
    if missing or unknown:
        problem = f"lacks {_some(missing)}" if missing else f"has folders of no class, {_some(unknown)}"
        raise SettingError("data.root", root, f"{part}/ {problem}.", remedy)
    images = ImageFolder(str(folder), allow_empty=True)
    empty = sorted({*range(len(class_names))} - {*images.targets})
    if empty:
        names = _some([class_names[label] for label in empty])
        raise SettingError("data.root", root, f"{part}/ has no images of {names}.", remedy)
    return images


def _some(names: Sequence[str], shown: int = 5) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
