"""Noise of natural images, keyed by image: the same for any batch size, order and number of processes.

It is drawn on the CPU from (seed, kind of noise, index of the image). Severities of Gaussian and of uniform noise
therefore differ by their scale and not by their luck.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from flops_lightning.errors import check_at_least, check_positive
from flops_lightning.noise.keys import NoiseKey, row_seeds
from flops_lightning.robustness.pixels import check_pixels


class Corruption(ABC):
    """Noise of one kind and strength, on pixels in [0, 1].

    Attributes:
        name: Of the kind.
        severities: Usual strengths, from gentle to severe.
        severity: The strength of this one.

    Example:
        >>> import torch
        >>> from flops_lightning.robustness import GaussianNoise
        >>> images, noise = torch.rand(3, 1, 4, 4), GaussianNoise(0.08)
        >>> torch.equal(noise(images, index=[5, 6, 7])[1:], noise(images[1:], index=[6, 7]))
        True
    """

    name: ClassVar[str]
    severities: ClassVar[tuple[float, ...]]
    severity: float

    def __call__(self, pixels: Tensor, index: Sequence[int], *, seed: int = 0) -> Tensor:
        """The images with noise, clamped to [0, 1].

        Args:
            pixels: Images ``(b, c, h, w)`` in [0, 1].
            index: Number of each image in its data set, ``b`` of them.
            seed: Chooses the noise of the whole data set.

        Raises:
            SettingError: The pixels do not lie in [0, 1].
        """
        check_pixels(pixels)
        places = np.asarray(index, dtype=np.int64)
        seeds = row_seeds(NoiseKey(seed, 0, f"corruption/{self.name}"), places, np.zeros_like(places))
        generator, images = torch.Generator(), pixels.detach().float().cpu().clamp(0, 1)
        noisy = [self._draw(image, generator.manual_seed(s)) for image, s in zip(images, seeds, strict=True)]
        return (torch.stack(noisy) if noisy else images).clamp(0, 1).to(pixels)

    @abstractmethod
    def _draw(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """One image ``(c, h, w)`` with noise, not clamped."""


class GaussianNoise(Corruption):
    """Gaussian noise of standard deviation ``std`` on every pixel and channel.

    Its severities are two gentle ones for images of 32 pixels, then those of ImageNet-C (D. Hendrycks and T.
    Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations, 2019).

    Example:
        >>> import torch
        >>> from flops_lightning.robustness import GaussianNoise
        >>> grey = torch.full((2, 3, 64, 64), 0.5)
        >>> round(float(GaussianNoise(0.04)(grey, index=[0, 1]).std()), 2)
        0.04
    """

    name = "gaussian"
    severities = (0.02, 0.04, 0.08, 0.12, 0.18, 0.26, 0.38)

    def __init__(self, std: float) -> None:
        check_at_least("std", std, 0, "Write for example 0.08; pixels lie between 0 and 1.")
        self.std = self.severity = std

    def _draw(self, image: Tensor, generator: torch.Generator) -> Tensor:
        return image + self.std * torch.randn(image.shape, generator=generator)


class UniformNoise(Corruption):
    """Uniform noise of standard deviation ``std``: between ``-sqrt(3) std`` and ``sqrt(3) std``.

    Example:
        >>> import torch
        >>> from flops_lightning.robustness import UniformNoise
        >>> grey = torch.full((1, 3, 64, 64), 0.5)
        >>> round(float((UniformNoise(0.1)(grey, index=[7]) - grey).abs().max()), 2)
        0.17
    """

    name = "uniform"
    severities = GaussianNoise.severities

    def __init__(self, std: float) -> None:
        check_at_least("std", std, 0, "Write for example 0.08; pixels lie between 0 and 1.")
        self.std = self.severity = std

    def _draw(self, image: Tensor, generator: torch.Generator) -> Tensor:
        return image + math.sqrt(3) * self.std * (2 * torch.rand(image.shape, generator=generator) - 1)


class PoissonNoise(Corruption):
    """Shot noise: a pixel of value 1 counts ``photons`` on average, ``x' = Poisson(photons x) / photons``.

    Its variance is ``x / photons``. Severities are two gentle ones, then those of ImageNet-C.

    Example:
        >>> import torch
        >>> from flops_lightning.robustness import PoissonNoise
        >>> bool(PoissonNoise(25)(torch.zeros(1, 3, 8, 8), index=[0]).any())  # no light, no noise
        False
    """

    name = "poisson"
    severities = (500, 250, 60, 25, 12, 5, 3)

    def __init__(self, photons: float) -> None:
        check_positive("photons", photons, "Write the photons of a pixel of value 1, for example 60 (3 is severe).")
        self.photons = self.severity = photons

    def _draw(self, image: Tensor, generator: torch.Generator) -> Tensor:
        return torch.poisson(self.photons * image, generator=generator) / self.photons


CORRUPTIONS: dict[str, Any] = {kind.name: kind for kind in (GaussianNoise, UniformNoise, PoissonNoise)}
"""Kinds of noise by name; each is called with its severity."""
