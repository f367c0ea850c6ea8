"""Which coordinates are measured in a step: a random mask whose density differs from tensor to tensor."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from flops_lightning.noise.keys import NoiseKey, row_seeds

Masks = Mapping[str, NDArray[np.int64]]
"""Ascending indices into each flattened tensor, by name, of the tensors that are in the mask."""


def inclusion_probabilities(
    sizes: Mapping[str, int], ratios: Mapping[str, float], coordinates: int
) -> dict[str, float]:
    """Probability with which each entry of a tensor is in the mask: ``c r_l / sum_m r_m n_m``.

    Args:
        sizes: Number of entries ``n`` of each tensor.
        ratios: Relative density ``r`` of each tensor, between 0 and 1.
        coordinates: Size ``c`` of the mask, at most ``sum_m r_m n_m``.
    """
    total = sum(ratios[name] * size for name, size in sizes.items())
    return {name: coordinates * ratios[name] / total for name in sizes}


def draw_masks(sizes: Mapping[str, int], probabilities: Mapping[str, float], *, seed: int, draw: int) -> Masks:
    """A mask of a fixed size, a pure function of ``(seed, draw)``.

    How many coordinates a tensor gets is its expected number rounded down or up at random (systematic sampling: one
    uniform number for all tensors), so that an entry is in the mask with exactly its probability. Rounding by largest
    remainder would never measure a tensor whose expected number stays small, such as a bias. Within a tensor,
    coordinates are drawn uniformly and without replacement.

    Args:
        sizes: Number of entries of each tensor.
        probabilities: Those of :func:`inclusion_probabilities`.
        seed: The run's seed.
        draw: Number of the mask.
    """
    expected = np.array([probabilities[name] * size for name, size in sizes.items()])
    # Rounded, because a sum that misses a whole number by 1e-12 could ask a full tensor for one entry too many.
    edges = np.floor(np.round(expected.cumsum(), 9) + _generator(seed, draw, "").random()).astype(np.int64)
    counts = np.diff(edges, prepend=0)
    return {
        name: np.sort(_generator(seed, draw, name).choice(size, count, replace=False, shuffle=False))
        for (name, size), count in zip(sizes.items(), counts.tolist(), strict=True)
        if count
    }


def _generator(seed: int, draw: int, name: str) -> np.random.Generator:
    # Without the rank: the mean over ranks of gradients under one mask is the gradient of all samples under that mask.
    first = np.zeros(1, dtype=np.int64)
    return np.random.default_rng(row_seeds(NoiseKey(seed, draw, f"coordinates.{name}"), first, first))
