"""Keyed noise: the same for the same key, and independent in every part of the key."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from flops_lightning.noise.keys import NoiseKey, row_seeds, standard_normal

KEY = NoiseKey(seed=3, draw=5, site="blocks.1", rank=0)
CPU = torch.device("cpu")


def noise(key: NoiseKey, samples: list[int], queries: list[int], size: int = 8) -> Tensor:
    seeds = row_seeds(key, np.array(samples), np.array(queries))
    return standard_normal(seeds, (size,), device=CPU, dtype=torch.float64)


def correlation_matrix(rows: Tensor) -> Tensor:
    """Uncentred: the mean is known to be zero. Entries off the diagonal have the standard error 1 / sqrt(size)."""
    return rows @ rows.T / rows.shape[1]


def test_neighbouring_keys_are_independent():
    """All pairs of 288 keys that differ by little: seeds, draws, sites, ranks, samples and queries."""
    size, samples, queries = 3000, [0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 2] * 3
    keys = [
        NoiseKey(seed, draw, site, rank)
        for seed, draw, site, rank in itertools.product((0, 1), (0, 1, 2, 3), ("blocks.0", "blocks.1"), (0, 1))
    ]
    rows = torch.cat([noise(key, samples, queries, size) for key in keys])
    z = correlation_matrix(rows)[tuple(torch.triu_indices(len(rows), len(rows), 1))] * size**0.5
    assert float(z.abs().max()) < 5.5  # 41328 pairs: one beyond 5.5 in 600 runs of independent noise
    # Spread of the correlations: their mean square is 1 with standard error sqrt(2 / pairs).
    assert abs(float(z.square().mean()) - 1) < 4 * (2 / len(z)) ** 0.5
    assert abs(float(z.mean())) < 4 / len(z) ** 0.5


def test_moments():
    rows = noise(KEY, [0] * 400, list(range(400)), 501)
    z = rows.flatten()
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        error = (variance / len(z)) ** 0.5
        assert abs(float((z**power).mean()) - moment) < 4 * error, power
    # Nor may the place within the row matter, the last ones least of all (they do not fill a vector register).
    assert float((rows.mean(0).abs() * 400**0.5).max()) < 5
    assert float(((rows.var(0) - 1).abs() / (2 / 400) ** 0.5).max()) < 5.5


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, seed=4),
        replace(KEY, seed=3 + 2**32),
        replace(KEY, seed=-3),
        replace(KEY, draw=6),
        replace(KEY, site="blocks.10"),
        replace(KEY, rank=1),
        # The same numbers in other places
        replace(KEY, seed=5, draw=3),
        replace(KEY, draw=0, rank=5),
    ],
)
def test_every_part_of_the_key_counts(other):
    ours, theirs = noise(KEY, [0, 1], [1, 0], 3000), noise(other, [0, 1], [1, 0], 3000)
    z = correlation_matrix(torch.cat([ours, theirs])) * 3000**0.5
    assert float(z[:2, 2:].abs().max()) < 4.5
    assert abs(float(z[0, 1])) < 4.5  # (sample 0, query 1) and (sample 1, query 0)


def test_seeds_hardly_collide():
    """10^5 rows over 2^32 seeds: 1.2 coinciding pairs are expected, 9 or more have a probability of 10^-5."""
    samples, queries = np.divmod(np.arange(100_000), 100)
    seeds = row_seeds(KEY, samples, queries)
    assert min(seeds) >= 0
    assert max(seeds) < 2**32
    assert len(seeds) - len(set(seeds)) < 9
