"""Keyed noise: every row's direction is a pure function of its key, never of the order in which rows are drawn.

So an estimate is the same whatever the chunk size and however rows are packed, and a direction can be drawn again
instead of being kept. A row has a key of 64 bits; torch's generator takes 32 of them as its seed, Philox all
(:mod:`flops_lightning.noise.generators`).
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.noise.generators import GeneratorSetting, generator_on, philox_normals
from flops_lightning.transfers import to_device


@dataclass(frozen=True)
class NoiseKey:
    """What all rows of one site in one step have in common.

    Attributes:
        seed: The run's seed.
        draw: The draw counter: one for each batch, skipped ones included.
        site: Name of the site (with the module's name where a site perturbs several).
        rank: Rank of the process.
        generator: What makes numbers of the rows' keys.
    """

    seed: int
    draw: int
    site: str
    rank: int = 0
    generator: GeneratorSetting = "auto"


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    # splitmix64's finaliser (Steele, Lea & Flood 2014): neighbouring keys become unrelated seeds.
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def row_keys(key: NoiseKey, samples: NDArray[np.int64], directions: NDArray[np.int64]) -> NDArray[np.int64]:
    """``(r,)`` keys of the rows, 64 bits each.

    Args:
        key: Shared part of the key.
        samples: ``(r,)`` place of each row's sample in the rank's batch.
        directions: ``(r,)`` index of each row's direction among those of its sample.
    """
    state = np.full(samples.shape, key.seed & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
    site = zlib.crc32(key.site.encode())
    with np.errstate(over="ignore"):
        for part in (key.draw, site, key.rank, samples, directions):
            word = np.asarray(part, dtype=np.uint64)
            state = _mix(state * np.uint64(0x9E3779B97F4A7C15) + word + np.uint64(1))
    return state.view(np.int64)


def row_seeds(key: NoiseKey, samples: NDArray[np.int64], directions: NDArray[np.int64]) -> list[int]:
    """One seed a row, below 2^32 (what torch's CPU generator takes in); see :func:`row_keys`."""
    return [int(seed) for seed in row_keys(key, samples, directions).view(np.uint64) >> np.uint64(32)]


def normal_rows(
    key: NoiseKey, samples: NDArray[np.int64], directions: NDArray[np.int64], shape: tuple[int, ...], *,
    device: torch.device, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``(r, *shape)`` standard normals in float32 or better, each row a function of its key alone."""
    if generator_on(device, key.generator) == "torch":
        return standard_normal(row_seeds(key, samples, directions), shape, device=device, dtype=dtype)
    keys = to_device(row_keys(key, samples, directions), device)
    return philox_normals(keys, math.prod(shape), torch.promote_types(dtype, torch.float32)).view(len(keys), *shape)


def split_into(flat: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Views of ``flat`` with these shapes, by name."""
    parts = flat.split([math.prod(shape) for shape in shapes.values()])
    return {name: part.view(tuple(shape)) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def standard_normal(seeds: list[int], shape: tuple[int, ...], *, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``(r, *shape)`` standard normal noise in float32 or better, row ``r`` drawn from ``seeds[r]`` alone."""
    generator = torch.Generator(device=device)
    noise = torch.empty((len(seeds), *shape), device=device, dtype=torch.promote_types(dtype, torch.float32))
    for row, seed in zip(noise, seeds, strict=True):
        row.normal_(generator=generator.manual_seed(seed))
    return noise
