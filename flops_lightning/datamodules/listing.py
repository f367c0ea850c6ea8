"""Which image files there are, and whether they are: lists of files with labels, checked before training begins."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from flops_lightning.errors import DamagedImageError, SettingError

Part = Literal["train", "val", "test"]
PARTS: tuple[Part, ...] = ("train", "val", "test")
NEEDED: dict[str, Part] = {"fit": "train", "validate": "val", "test": "test", "predict": "test"}
VERBS: dict[Part, str] = {"train": "train", "val": "validate", "test": "test"}
THREADS = 16  # that ask for the size of files: on network drives each answer takes a while
CHUNK = 1000  # files that a thread asks for at a time: of one each, a million would take a minute and 2 GB


@dataclass(frozen=True)
class Listing:
    """Labelled image files, in a fixed order.

    Attributes:
        files: Their paths.
        labels: One for each.
    """

    files: Sequence[str] = ()
    labels: Sequence[int] = ()

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, int]]) -> Listing:
        """Of (path, label) pairs."""
        return cls([file for file, _ in pairs], [label for _, label in pairs])

    def at(self, places: Tensor) -> Listing:
        """Those at certain places ``(n,)``."""
        return Listing([self.files[i] for i in places.tolist()], [self.labels[i] for i in places.tolist()])


def present(
    parts: Mapping[Part, Listing], class_names: Sequence[str], *, root: str, remedy: str, allow_missing: bool | None
) -> dict[Part, Listing]:
    """Of the listed files those that are there.

    Args:
        parts: What should be there.
        class_names: Names of the classes, in the order of the labels.
        root: What ``data.root`` is, for the errors.
        remedy: How the data set should be laid out, for the errors.
        allow_missing: Warn of missing files and of classes without any image to learn from, instead of refusing them.
            None refuses them, of a data set that has no such setting.

    Raises:
        SettingError: A file is missing or listed twice, or a class has no image to learn from; the first is named.
        DamagedImageError: A file is empty; the first is named.
    """
    listed = Counter(file for listing in parts.values() for file in listing.files)
    if twice := [file for file, times in listed.items() if times > 1]:
        raise SettingError("data.root", root, f"its lists have {twice[0]} more than once.", remedy)
    found, missing = {}, []
    for part, listing in parts.items():
        with ThreadPoolExecutor(THREADS) as threads:
            chunks = [listing.files[start : start + CHUNK] for start in range(0, len(listing.files), CHUNK)]
            sizes = [size for chunk in threads.map(_sizes, chunks) for size in chunk]
        if 0 in sizes:
            raise DamagedImageError(f"{listing.files[sizes.index(0)]} is empty. Put the original in its place.")
        triples = list(zip(listing.files, listing.labels, sizes, strict=True))
        missing += [file for file, _, size in triples if size is None]
        found[part] = Listing.of([(file, label) for file, label, size in triples if size is not None])
    learnt = {*found["train"].labels}
    unlearnt = [name for label, name in enumerate(class_names) if label not in learnt] if parts["train"].files else []
    problem = ""
    if missing:
        problem = f"{len(missing)} listed images are missing, the first is {missing[0]}"
    elif unlearnt:
        problem = f"{len(unlearnt)} classes have no image to learn from, the first is {unlearnt[0]!r}"
    if problem and not allow_missing:
        way_round = "" if allow_missing is None else " data.allow_missing: true goes on without them."
        raise SettingError("data.root", root, f"{problem}.", f"{remedy}{way_round}")
    if problem:
        warnings.warn(
            f"data.allow_missing: {len(missing)} listed images are missing under {root}, and {len(unlearnt)} of "
            f"{len(class_names)} classes have no image to learn from.", stacklevel=2,
        )  # fmt: skip
    return found


def refuse_empty(stage: str, parts: Mapping[Part, Listing], *, root: str, remedy: str) -> None:
    """Refuse a stage that would run over no image, which the Trainer does in silence.

    Raises:
        SettingError: The part that the stage reads is empty.
    """
    part = NEEDED.get(stage)
    if part is not None and not parts[part].files:
        split_off = " They are split off the training images (val_images, val_share)." if part == "val" else ""
        raise SettingError("data.root", root, f"has no images to {VERBS[part]} with.", f"{remedy}{split_off}")


def _sizes(files: Sequence[str]) -> list[int | None]:
    """Size of each file in bytes; None if there is none."""
    return [_size(file) for file in files]


def _size(file: str) -> int | None:
    try:
        return os.stat(file).st_size  # noqa: PTH116 - a Path for each of a million files takes ten seconds
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:  # it is there, and closed to us
        raise DamagedImageError(f"{file} cannot be read ({error.strerror}). See to its permissions.") from error
