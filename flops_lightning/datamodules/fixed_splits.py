"""Splits of data sets that come without one: by seed and shares, or from a file of CoOp's form."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flops_lightning.datamodules.listing import PARTS, Listing, Part
from flops_lightning.datamodules.splits import hold_out
from flops_lightning.errors import SettingError

VAL_SHARE, TEST_SHARE = 0.2, 0.3
"""Shares of the images of each class, those of CoOp's splits.

Source: K. Zhou et al., Learning to Prompt for Vision-Language Models, 2022, appendix A.
"""


def check_shares(val_share: float, test_share: float) -> None:
    """Refuse what leaves nothing to learn from.

    Raises:
        SettingError: A share is negative, or both together are 1 or more.
    """
    for name, share in (("val_share", val_share), ("test_share", test_share)):
        if not 0 <= share < 1:
            raise SettingError(f"data.{name}", share, "is not in 0 to 1.", "Give a share of the images, as 0.2.")
    if val_share + test_share >= 1:
        raise SettingError(
            "data.test_share", test_share, f"leaves nothing to learn from beside val_share = {val_share}.",
            "Give shares that sum to less than 1.",
        )  # fmt: skip


def split_by_seed(
    images: Listing, *, val_share: float, test_share: float, seed: int, class_names: Sequence[str]
) -> dict[Part, Listing]:
    """Split by chance, each part with the share of every class that the whole has.

    Raises:
        SettingError: A class has too few images.
    """
    labels = torch.tensor(images.labels)

    def hold_out_share(left: Tensor, share: float, setting: str) -> tuple[Tensor, Tensor]:
        size = round(share * len(labels))
        try:
            return hold_out(left, size, seed=seed, setting=setting, class_names=class_names)
        except SettingError as error:
            raise SettingError(
                setting, share, f"{size} images {error.problem}",
                "Use another share, or 0, or a split_file; every class needs an image for each part it is to be in.",
            ) from error  # fmt: skip

    rest, test = hold_out_share(labels, test_share, "data.test_share")
    stay, val = hold_out_share(labels[rest], val_share, "data.val_share")
    return {"train": images.at(rest[stay]), "val": images.at(rest[val]), "test": images.at(test)}


def read_split_file(file: str) -> tuple[tuple[str, ...], Mapping[Part, Listing]]:
    """Read ``{"train": [[path, label, class name], ...], "val": ..., "test": ...}``, the form of CoOp's files.

    Returns:
        Names of the classes in the order of the labels, and the images of each part, with paths as in the file.

    Raises:
        SettingError: The file is missing or has another form.
    """
    path, remedy = Path(file).expanduser(), "Give a JSON file of CoOp's form, or leave split_file out."
    if not path.is_file():
        raise SettingError("data.split_file", file, "is not a file.", remedy)
    try:
        content = json.loads(path.read_text())
        parts = {part: Listing.of([(str(image), int(label)) for image, label, _ in content[part]]) for part in PARTS}
        names = {int(label): str(name) for part in PARTS for _, label, name in content[part]}
    except (ValueError, KeyError, TypeError) as error:
        raise SettingError(
            "data.split_file", file, f"is no split ({type(error).__name__}: {error}).", remedy
        ) from error
    if sorted(names) != list(range(len(names))) or not names:
        raise SettingError("data.split_file", file, "has labels that do not run from 0 on.", remedy)
    return tuple(names[label] for label in range(len(names))), parts
