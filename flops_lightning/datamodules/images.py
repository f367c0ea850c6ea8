"""From an image on disk to the tensor a network reads: reading, resizing, augmentation, normalisation, subsets."""

from __future__ import annotations

import tarfile
import zipfile
from collections.abc import Callable, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from flops_lightning.errors import DamagedImageError, SettingError

if TYPE_CHECKING:
    from PIL.Image import Image

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean and std of red, green and blue, 0..1

# What timm's weights were trained with; their `default_cfg` says which. The first is the mean and standard deviation of
# ImageNet's training images, as torchvision and timm round them; the second maps 0..1 to -1..1.
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INCEPTION: Statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


FETCHING_FAILS = (OSError, RuntimeError, EOFError, HTTPException, tarfile.TarError, zipfile.BadZipFile)
"""What a download ends with: no connection or disk, another file than was expected, one cut off."""

NORMALIZATIONS = {"imagenet": IMAGENET, "inception": INCEPTION}
BACKBONE = "backbone"
"""The normalisation that the network was trained with."""


def backbone_statistics(module: object) -> Statistics:
    """Mean and standard deviation that a task's timm backbone was trained with.

    Args:
        module: A LightningModule with the attribute ``backbone``; None where there is none yet.

    Raises:
        SettingError: It has no timm backbone, so nothing is known.
    """
    config = getattr(getattr(module, "backbone", None), "pretrained_cfg", None) or {}
    if "mean" not in config or "std" not in config:
        raise SettingError(
            "data.normalization", BACKBONE, "there is no timm model to ask for its own.",
            "Write imagenet, or inception (0.5 each, most of timm's ViTs), as the weights were trained.",
        )  # fmt: skip
    return tuple(config["mean"]), tuple(config["std"])


class PhotoFiles(Dataset[tuple[Any, int]]):
    """Labelled image files; items are ``(PIL image in RGB, label)``.

    Attributes:
        files: Their paths.
        targets: Their labels.
    """

    def __init__(self, files: Sequence[str], targets: Sequence[int]) -> None:
        """Keep the lists; nothing is read."""
        self.files, self.targets = files, targets

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Image, int]:
        return read_photo(self.files[index]), self.targets[index]


def read_photo(path: str | Path) -> Image:
    """An image in RGB: grey is repeated in three channels, CMYK and palettes are converted, alpha is dropped.

    Of 16 bits a channel the upper 8 are kept. A camera's note on orientation (EXIF) is not followed, as in torchvision
    and timm.

    Raises:
        DamagedImageError: The file is empty, cut off, no image, or one of 32-bit pixels, whose range nobody knows.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return _rgb(image)
    except Image.DecompressionBombError as error:
        raise DamagedImageError(f"{path} is too large to be decoded ({error}). Put a smaller one there.") from error
    except UnidentifiedImageError as error:
        problem = "is no image" if Path(path).stat().st_size else "is empty"
        raise DamagedImageError(f"{path} {problem}. Put the original in its place.") from error
    except Exception as error:  # a damaged file may make PIL raise anything
        raise DamagedImageError(f"{path} cannot be read ({error}). Put the original in its place.") from error


def _rgb(image: Image) -> Image:
    """Three channels of 8 bits.

    Raises:
        ValueError: Pixels have 32 bits.
    """
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


class ImageSubset(Dataset[tuple[Tensor, ...]]):
    """Chosen images of a data set, each transformed when it is asked for.

    Attributes:
        indices: The chosen places in the data set ``(n,)``.
        labels: Their labels ``(n,)``, known without reading an image.
    """

    def __init__(
        self, images: Dataset[Any], labels: Tensor, indices: Tensor, transform: Callable[[Any], Tensor]
    ) -> None:
        """Choose.

        Args:
            images: Items are ``(image, label)``; only the image is used.
            labels: The label of every item ``(m,)``.
            indices: Which items to offer, in this order ``(n,)``.
            transform: Makes of an image the tensor that is offered.
        """
        self._images = images
        self._transform = transform
        self.indices = indices
        self.labels = labels[indices]

    @property
    def files(self) -> Sequence[str] | None:
        """Path of each chosen image; None where the data set is none of files."""
        files = getattr(self._images, "files", None)
        return None if files is None else [files[int(i)] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, _ = self._images[int(self.indices[index])]
        return self._transform(image), self.labels[index]


def image_transform(
    *,
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    augmentation: Sequence[Callable[[Any], Any]] = (),
    crop: Callable[[Any], Any] | None = None,
) -> Callable[[Any], Tensor]:
    """A function from a PIL image in RGB to a float32 tensor ``(3, image_size, image_size)``.

    Resized bicubically with antialiasing and without keeping the aspect ratio, as 8-bit values like PIL does it; then
    augmented, scaled to 0..1, and normalised.

    Args:
        image_size: Height and width of the result, in pixels.
        mean: Subtracted from values between 0 and 1, one number a channel.
        std: The divisor after that, one number a channel.
        augmentation: Transforms of torchvision for an 8-bit image of the final size.
        crop: Makes an 8-bit image of the final size, in place of resizing.
    """
    from torchvision.transforms import v2

    resize = v2.Resize((image_size, image_size), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    to_float = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose(
        [v2.ToImage(), crop or resize, *augmentation, to_float, v2.Normalize(list(mean), list(std)), v2.ToPureTensor()]
    )
