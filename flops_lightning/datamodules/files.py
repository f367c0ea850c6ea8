"""Image files: lists of them with labels, the check that they are there, and reading one."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flops_lightning.errors import DamagedImageError, SettingError

if TYPE_CHECKING:
    from PIL.Image import Image

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
READ_AT_START = 32  # images, spread over the data set, that are decoded before a run begins
THREADS = 16  # that ask for the size of files: on network drives each answer takes a while
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how such a file begins
CHUNK = 1000  # files that a thread asks for at a time: of one each, a million would take a minute and 2 GB


@dataclass(frozen=True)
class Listing:
    """Labelled images in a fixed order.

    Attributes:
        files: Paths of image files; or the images themselves, arrays ``(h, w, 3)`` of 8 bits.
        labels: One for each.
    """

    files: Sequence[Any] = ()
    labels: Sequence[int] = ()

    @classmethod
    def of(cls, pairs: Sequence[tuple[Any, int]]) -> "Listing":
        """A listing of (path, label) pairs."""
        return cls([file for file, _ in pairs], [label for _, label in pairs])

    @property
    def on_disk(self) -> bool:
        """Whether there are images, and all of them are files."""
        return len(self.files) > 0 and isinstance(self.files[0], str)

    def at(self, places: Tensor) -> "Listing":
        """The images at ``places (n,)``."""
        return Listing([self.files[i] for i in places.tolist()], [self.labels[i] for i in places.tolist()])


class ImageSubset(Dataset[tuple[Tensor, ...]]):
    """The images of a listing, each read and transformed when it is asked for; items are ``(image, label)``.

    Attributes:
        labels: Their labels ``(n,)``, known without reading an image.
        files: Their paths; None where they are not files.
    """

    def __init__(self, listing: Listing, transform: Callable[[Any], Tensor]) -> None:
        self._images = listing.files
        self._transform = transform
        self.labels = torch.tensor(listing.labels, dtype=torch.long)
        self.files = listing.files if listing.on_disk or not len(listing.files) else None

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        from PIL.Image import fromarray

        image = self._images[index]
        return self._transform(read_photo(image) if isinstance(image, str) else fromarray(image)), self.labels[index]


def read_photo(path: str | Path) -> "Image":
    """Read an image as RGB: grey is repeated in three channels, CMYK and palettes are converted, alpha is dropped.

    Of 16 bits a channel the upper 8 are kept. The orientation that a camera notes (EXIF) is not followed, as in
    torchvision and timm.

    Raises:
        DamagedImageError: The file is empty, cut off, too large, not an image, or one of 32-bit pixels, whose range is
            unknown.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return _rgb(image)
    except Image.DecompressionBombError as error:
        raise DamagedImageError(f"{path} is too large to be decoded ({error}). Put a smaller one there.") from error
    except UnidentifiedImageError as error:
        with Path(path).open("rb") as stream:
            start = stream.read(4)
        problem = f"{'is not an image' if start else 'is empty'}. Put the original in its place."
        if start in TIFF:
            problem = "is a TIFF of a kind that Pillow does not read (of 13 bands, for example). Convert it to RGB."
        raise DamagedImageError(f"{path} {problem}") from error
    except Exception as error:  # a damaged file may make PIL raise anything
        raise DamagedImageError(f"{path} cannot be read ({error}). Put the original in its place.") from error


def _rgb(image: "Image") -> "Image":
    """Three channels of 8 bits."""
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if image.mode in ("I", "F") and not sixteen_bits:
        raise ValueError("pixels of 32 bits; convert it to 8")
    if sixteen_bits:  # PIL would cut values off at 255
        import numpy as np
        from PIL.Image import fromarray

        image = fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    if "transparency" in image.info:
        image = image.convert("RGBA")  # PIL warns of palettes with transparency otherwise
    return image.convert("RGB")


def class_folders(folder: Path, *, root: str, remedy: str) -> tuple[str, ...]:
    """Names of the class folders in ``folder``, in alphabetical order, without hidden ones."""
    names = sorted(entry.name for entry in folder.glob("*/") if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise SettingError("data.root", root, f"has no class folders in {folder.name}/.", remedy)
    return tuple(names)


def list_class_folders(
    root: str, part: str, class_names: Sequence[str], *, remedy: str, all_classes: bool = True,
    left_out: Sequence[str] = (),
) -> Listing:  # fmt: skip
    """List the images ``root/part/<class>/*``, class by class, without hidden files; labels follow ``class_names``.

    ``left_out`` are folders that may be there and are not classes; without ``all_classes`` some may lack images.
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


def present(
    parts: Mapping[Part, Listing], class_names: Sequence[str], *, root: str, remedy: str, allow_missing: bool | None
) -> dict[Part, Listing]:
    """Keep the listed files that are there.

    Missing files and classes without training images are refused, or with ``allow_missing`` named in a warning; None
    is for a data set that has no such setting. Files that are empty or listed twice are always refused.
    """
    listed = Counter(file for listing in parts.values() if listing.on_disk for file in listing.files)
    if twice := [file for file, times in listed.items() if times > 1]:
        raise SettingError("data.root", root, f"its lists have {twice[0]} more than once.", remedy)
    found: dict[Part, Listing] = {**parts}
    missing: list[str] = []
    for part, listing in parts.items():
        if not listing.on_disk:
            continue
        sizes = file_sizes(listing.files)
        if 0 in sizes:
            raise DamagedImageError(f"{listing.files[sizes.index(0)]} is empty. Put the original in its place.")
        triples = list(zip(listing.files, listing.labels, sizes, strict=True))
        missing += [file for file, _, size in triples if size is None]
        found[part] = Listing.of([(file, label) for file, label, size in triples if size is not None])
    trained = {*found["train"].labels}
    untrained = [name for label, name in enumerate(class_names) if label not in trained] if parts["train"].files else []
    problem = ""
    if missing:
        problem = f"{len(missing)} listed images are missing, the first is {missing[0]}"
    elif untrained:
        problem = f"{len(untrained)} classes have no training image, the first is {untrained[0]!r}"
    if problem and not allow_missing:
        way_round = "" if allow_missing is None else " data.allow_missing: true goes on without them."
        raise SettingError("data.root", root, f"{problem}.", f"{remedy}{way_round}")
    if problem:
        warnings.warn(
            f"data.allow_missing: {len(missing)} listed images are missing under {root}, and {len(untrained)} of "
            f"{len(class_names)} classes have no training image.", stacklevel=2,
        )  # fmt: skip
    return found


def file_sizes(files: Sequence[str]) -> list[int | None]:
    """Size of each file in bytes; None for a file that is missing."""
    chunks = [files[start : start + CHUNK] for start in range(0, len(files), CHUNK)]
    with ThreadPoolExecutor(THREADS) as threads:
        return [size for chunk in threads.map(lambda some: [_size(file) for file in some], chunks) for size in chunk]


def _size(file: str) -> int | None:
    try:
        return os.stat(file).st_size  # noqa: PTH116 - a Path for each of a million files takes ten seconds
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DamagedImageError(f"{file} cannot be read ({error.strerror}). Check its permissions.") from error


def read_some(parts: Mapping[Part, Listing]) -> None:
    """Decode a few files, spread over all parts."""
    files = [file for part in PARTS if parts[part].on_disk for file in parts[part].files]
    for file in files[:: max(1, len(files) // READ_AT_START)]:
        read_photo(file)
