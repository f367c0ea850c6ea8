"""Which images train, validate and test: splits that keep every class's share, and small training sets."""

import json
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path

import torch
from torch import Tensor

from flops_lightning.datamodules.files import PARTS, Listing, Part
from flops_lightning.errors import SettingError

VAL_SHARE, TEST_SHARE = 0.2, 0.3
"""Shares of the images of each class, those of CoOp's splits.

Source: K. Zhou et al., Learning to Prompt for Vision-Language Models, 2022, appendix A.
"""


def check_split_seed(split_seed: int) -> None:
    """Raise a :class:`SettingError` unless scikit-learn accepts the seed."""
    if isinstance(split_seed, bool) or not isinstance(split_seed, Integral) or not 0 <= split_seed < 2**32:
        raise SettingError("data.split_seed", split_seed, "is not a seed.", "Use a number from 0 to 2**32 - 1.")


def check_shares(val_share: float, test_share: float) -> None:
    """Raise a :class:`SettingError` if a share is negative, or both together leave no image to train on."""
    for name, share in (("val_share", val_share), ("test_share", test_share)):
        if isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share < 1:
            raise SettingError(f"data.{name}", share, "is not in 0 to 1.", "Give a share of the images, as 0.2.")
    if val_share + test_share >= 1:
        problem = f"leaves no images to train on beside val_share = {val_share}."
        raise SettingError("data.test_share", test_share, problem, "Give shares that sum to less than 1.")


def hold_out(
    labels: Tensor, size: int, *, seed: int, setting: str, class_names: Sequence[str] = ()
) -> tuple[Tensor, Tensor]:
    """Split the places ``0..n-1`` of images in two, each part with the share of every class that the whole has.

    The split is a function of ``labels (n,)``, ``size`` (0 holds out none) and ``seed`` alone.

    Returns:
        The places of the images that stay and of those held out, each in ascending order.
    """
    from sklearn.model_selection import train_test_split

    places = torch.arange(len(labels))
    if size == 0 or not len(labels):
        return places, places[:0]
    present, counts = labels.unique(return_counts=True)
    fewest, most = len(counts), len(labels) - len(counts)
    if counts.min() < 2 or not fewest <= size <= most:
        alone = class_names[int(present[counts.argmin()])] if class_names and counts.min() < 2 else ""
        raise SettingError(
            setting, size, f"cannot be taken evenly out of {len(labels)} images in {len(counts)} classes"
            + (f": {alone} has one." if alone else "."),
            f"Use a number from {fewest} to {most}, or 0." if counts.min() >= 2 and fewest <= most
            else "Use 0, or add images: every class needs two.",
        )  # fmt: skip
    stay, held = train_test_split(places.numpy(), test_size=size, stratify=labels.numpy(), random_state=seed)
    return torch.from_numpy(stay).sort().values, torch.from_numpy(held).sort().values


def split_by_numbers(
    train: Listing, test: Listing, *, val_images: int, test_images: int, seed: int, class_names: Sequence[str]
) -> dict[Part, Listing]:
    """Split ``val_images`` off the training part, and keep ``test_images`` of the test part; 0 keeps all."""
    stay, held = hold_out(
        torch.tensor(train.labels), val_images, seed=seed, setting="data.val_images", class_names=class_names
    )
    if test_images and test_images != len(test.labels):
        labels = torch.tensor(test.labels)
        _, some = hold_out(labels, test_images, seed=seed, setting="data.test_images", class_names=class_names)
        test = test.at(some)
    return {"train": train.at(stay), "val": train.at(held), "test": test}


def split_by_shares(
    images: Listing, *, val_share: float, test_share: float, seed: int, class_names: Sequence[str]
) -> dict[Part, Listing]:
    """Split at random, each part with the share of every class that the whole has."""
    labels = torch.tensor(images.labels)

    def hold_out_share(left: Tensor, share: float, setting: str) -> tuple[Tensor, Tensor]:
        size = round(share * len(labels))
        try:
            return hold_out(left, size, seed=seed, setting=setting, class_names=class_names)
        except SettingError as error:
            remedy = "Use another share, or 0, or a split_file; every class needs an image for each of its parts."
            raise SettingError(setting, share, f"{size} images {error.problem}", remedy) from error

    rest, test = hold_out_share(labels, test_share, "data.test_share")
    stay, val = hold_out_share(labels[rest], val_share, "data.val_share")
    return {"train": images.at(rest[stay]), "val": images.at(rest[val]), "test": images.at(test)}


def read_split_file(file: str) -> tuple[tuple[str, ...], Mapping[Part, Listing]]:
    """Read ``{"train": [[path, label, class name], ...], "val": ..., "test": ...}``, the form of CoOp's files.

    Returns:
        Names of the classes in the order of the labels, and the images of each part, with paths as in the file.
    """
    path, remedy = Path(file).expanduser(), "Give a JSON file of CoOp's form, or leave split_file out."
    if not path.is_file():
        raise SettingError("data.split_file", file, "is not a file.", remedy)
    try:
        content = json.loads(path.read_text())
        parts = {part: Listing.of([(str(image), int(label)) for image, label, _ in content[part]]) for part in PARTS}
        names = {int(label): str(name) for part in PARTS for _, label, name in content[part]}
    except (ValueError, KeyError, TypeError) as error:
        problem = f"is not a split ({type(error).__name__}: {error})."
        raise SettingError("data.split_file", file, problem, remedy) from error
    if sorted(names) != list(range(len(names))) or not names:
        raise SettingError("data.split_file", file, "has labels that do not run from 0 on.", remedy)
    return tuple(names[label] for label in range(len(names))), parts


def choose_per_class(
    listing: Listing, per_class: int, *, seed: int, class_names: Sequence[str], kind: str = "training",
    setting: str = "data.images_per_class", fewer: bool = False, beside: str = "",
) -> Listing:  # fmt: skip
    """Choose the same number of images of every class, in their order; a smaller choice is part of every larger one.

    0 chooses all. A class that has fewer is refused, or with ``fewer`` keeps all of its images, and a warning tells
    how many there are. ``beside``: what can be done about a class without any, beside choosing 0.
    """
    if per_class == 0 or (kind == "training" and not len(listing.files)):
        return listing
    labels = torch.tensor(listing.labels, dtype=torch.long)
    counts = labels.bincount(minlength=len(class_names))
    fewest, lacking = int(counts.min()), class_names[int(counts.argmin())]
    if per_class > fewest:
        has = f"{lacking} has {fewest} {kind} images"
        if not fewer:
            others = ", not counting those for validation" if kind == "training" else ""
            less = f"at most {fewest}, or 0 for all" if fewest else f"0{beside}"
            raise SettingError(setting, per_class, f"{has}{others}.", f"Use {less}.")
        found = int(counts.clamp(max=per_class).sum())
        warnings.warn(
            f"{setting} = {per_class}: {int((counts < per_class).sum())} of {len(class_names)} classes have fewer "
            f"images, {has}. {found} {kind} images are used in the place of {per_class * len(class_names)}.",
            stacklevel=2,
        )
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    of_class = [shuffled[labels[shuffled] == label][:per_class] for label in range(len(class_names))]
    return listing.at(torch.cat(of_class).sort().values)
