"""From an image on disk to the tensor a network reads: resizing, augmentation, normalisation, subsets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]  # mean and std of red, green and blue, 0..1

# What timm's weights were trained with; their `default_cfg` says which. The first is the mean and standard deviation of
# ImageNet's training images, as torchvision and timm round them; the second maps 0..1 to -1..1.
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INCEPTION: Statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


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

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        image, _ = self._images[int(self.indices[index])]
        return self._transform(image), self.labels[index]


def image_transform(
    *, image_size: int, mean: Sequence[float], std: Sequence[float], augmentation: Sequence[Callable[[Any], Any]] = ()
) -> Callable[[Any], Tensor]:
    """A function from a PIL image in RGB to a float32 tensor ``(3, image_size, image_size)``.

    Resized bicubically with antialiasing and without keeping the aspect ratio, as 8-bit values like PIL does it; then
    augmented, scaled to 0..1, and normalised.

    Args:
        image_size: Height and width of the result, in pixels.
        mean: Subtracted from values between 0 and 1, one number a channel.
        std: The divisor after that, one number a channel.
        augmentation: Transforms of torchvision for an 8-bit image of the final size.
    """
    from torchvision.transforms import v2

    resize = v2.Resize((image_size, image_size), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    to_float = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose(
        [v2.ToImage(), resize, *augmentation, to_float, v2.Normalize(list(mean), list(std)), v2.ToPureTensor()]
    )
