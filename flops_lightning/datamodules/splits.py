"""Which images train, validate and test: splits that keep the share of every class, and small training sets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flops_lightning.errors import SettingError


def check_split_seed(split_seed: int) -> None:
    """Refuse what is not a seed.

    Raises:
        SettingError: ``split_seed`` is negative, or 2**32 or more.
    """
    if not 0 <= split_seed < 2**32:
        raise SettingError("data.split_seed", split_seed, "is not a seed.", "Use a number from 0 to 2**32 - 1.")


def check_image_numbers(**numbers: int) -> None:
    """Refuse numbers of images below 0.

    Args:
        **numbers: By the name of the setting.

    Raises:
        SettingError: One is negative.
    """
    for name, number in numbers.items():
        if number < 0:
            raise SettingError(f"data.{name}", number, "is negative.", "Give a number of images, or 0.")


def hold_out(
    labels: Tensor, size: int, *, seed: int, setting: str, class_names: Sequence[str] = ()
) -> tuple[Tensor, Tensor]:
    """Split the places ``0..n-1`` of images in two, each part with the share of every class that the whole has.

    Args:
        labels: The images' labels ``(n,)``.
        size: Images to hold out; 0 holds out none.
        seed: Chooses which; the split is a function of ``labels``, ``size`` and ``seed`` alone.
        setting: Name of the setting that ``size`` comes from.
        class_names: Names of the classes, in the order of the labels, for the error; may be left out.

    Returns:
        The places of the images that stay and of those held out, each in ascending order.

    Raises:
        SettingError: A part would have fewer images than there are classes, or a class has one image only.
    """
    from sklearn.model_selection import train_test_split

    places = torch.arange(len(labels))
    if size == 0:
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


def choose_per_class(
    labels: Tensor, places: Tensor, per_class: int, *, seed: int, class_names: Sequence[str]
) -> Tensor:
    """Choose the same number of images of every class; a smaller choice is part of every larger one.

    Args:
        labels: The labels of all images ``(m,)``.
        places: Where in ``labels`` the images to choose from are ``(n,)``.
        per_class: Images to choose of each class; 0 chooses all of ``places``.
        seed: Chooses which.
        class_names: Names of the classes, in the order of the labels.

    Returns:
        The places of the chosen images, in ascending order.

    Raises:
        SettingError: A class has fewer images.
    """
    if per_class == 0:
        return places
    counts = labels[places].bincount(minlength=len(class_names))
    fewest = int(counts.min())
    if per_class > fewest:
        raise SettingError(
            "data.images_per_class", per_class,
            f"{class_names[int(counts.argmin())]} has {fewest} training images, those for validation not counted.",
            f"Use at most {fewest}, or 0 for all.",
        )  # fmt: skip
    shuffled = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))]
    of_class = [shuffled[labels[shuffled] == label][:per_class] for label in range(len(class_names))]
    return torch.cat(of_class).sort().values
