from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from flops_lightning.allocators.held_back import average_ranks, rank_correlation


def numbers(*shape: int, seed: int = 0, levels: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if levels:
        return torch.randint(levels, shape, generator=generator).double()
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def test_ties_share_the_mean_of_their_ranks() -> None:
    assert average_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0, 3.0])).tolist() == [4.0, 1.0, 4.0, 2.0, 4.0]
    assert average_ranks(torch.tensor([[7.0, 7.0], [2.0, 1.0]])).tolist() == [[1.5, 1.5], [2.0, 1.0]]


@pytest.mark.parametrize("levels", [0, 4])
def test_every_line_agrees_with_torchmetrics(levels: int) -> None:
    a = numbers(5, 40, levels=levels)
    b = (a + 2 * numbers(5, 40, seed=1)).round() if levels else a + numbers(5, 40, seed=1)
    expected = torch.stack([spearman_corrcoef(x, y) for x, y in zip(a, b, strict=True)]).double()
    torch.testing.assert_close(rank_correlation(a, b), expected, rtol=1e-6, atol=1e-6)
    assert float(expected.std()) > 0.01


def test_one_line_is_compared_with_each_of_a_table() -> None:
    a, b = numbers(3, 9), numbers(9, seed=1)
    each = torch.stack([rank_correlation(line, b) for line in a])
    assert torch.equal(rank_correlation(a, b), each)
    assert torch.equal(rank_correlation(b[None], a), each)


def test_pairs_that_are_not_finite_are_left_out() -> None:
    a, b = numbers(2, 20, levels=6), numbers(2, 20, seed=1)
    kept = torch.ones(20, dtype=torch.bool)
    kept[[0, 3, 4, 11]] = False
    a[:, 0], a[:, 3], b[:, 4], b[:, 11] = math.inf, math.nan, -math.inf, math.nan
    expected = rank_correlation(a[:, kept], b[:, kept])
    assert torch.equal(rank_correlation(a, b), expected)
    assert bool((expected.abs() < 1).all())


def test_there_is_none_of_two_pairs_or_of_constants() -> None:
    for a, b in (
        ([1.0, 2.0], [1.0, 2.0]),
        ([1.0, 2.0, math.nan, 4.0], [1.0, 2.0, 3.0, math.inf]),
        ([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, math.nan]),
    ):
        assert math.isnan(rank_correlation(torch.tensor(a), torch.tensor(b)))
