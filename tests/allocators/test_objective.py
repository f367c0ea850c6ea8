from __future__ import annotations

import math

import torch
from torch import Tensor

from flops_lightning.allocators.objective import equal_objective, gain_optimal, objective, optimal_shares


def traces(seed: int = 0, batch_size: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, dtype=torch.float64, generator=generator).exp()


def test_objective_is_the_variance_of_the_batch_gradient() -> None:
    # Independent queries of d-dimensional gradients whose covariance is (Tr_b / d) I, A_b of them each.
    trace, counts, repeats, dimension = traces(batch_size=4), torch.tensor([1, 2, 5, 9]), 20_000, 3
    generator = torch.Generator().manual_seed(1)
    mean = torch.zeros(repeats, dimension, dtype=torch.float64)
    for scale, number in zip((trace / dimension).sqrt(), counts.tolist(), strict=True):
        queries = torch.randn(repeats, number, dimension, dtype=torch.float64, generator=generator)
        mean += scale * queries.mean(dim=1) / len(trace)
    squares = mean.square().sum(dim=1)
    standard_error = float(squares.std()) / math.sqrt(repeats)
    assert abs(float(squares.mean()) - float(objective(trace, counts)) / len(trace) ** 2) < 4 * standard_error


def test_optimal_shares_reach_theorem_2_with_equality() -> None:
    # The right-hand side of Theorem 2 without its common factor: sum_{j<k} (sqrt(Tr_j) - sqrt(Tr_k))^2 / A0.
    trace, total = traces(), 240.0
    root = trace.sqrt()
    bound = (root[:, None] - root[None, :]).square().triu().sum() / total
    gained = equal_objective(trace, total) - objective(trace, total * optimal_shares(trace))
    torch.testing.assert_close(gained, bound, rtol=1e-12, atol=0.0)


def test_theorem_2_is_an_upper_bound_for_every_other_allocation() -> None:
    trace, total = traces(), 240.0
    best = objective(trace, total * optimal_shares(trace))
    generator = torch.Generator().manual_seed(2)
    shares = torch.rand(1000, len(trace), dtype=torch.float64, generator=generator) + 1e-3
    near = optimal_shares(trace) * (1 + 0.01 * torch.randn(1000, len(trace), dtype=torch.float64, generator=generator))
    for others in (shares, near):
        assert bool((objective(trace, total * others / others.sum(dim=1, keepdim=True)) > best).all())


def test_gain_is_the_ratio_of_the_objectives() -> None:
    trace, total = traces(3), 100.0
    ratio = equal_objective(trace, total) / objective(trace, total * optimal_shares(trace))
    torch.testing.assert_close(gain_optimal(trace), ratio, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(equal_objective(trace, total), objective(trace, torch.full_like(trace, total / 12)))


def test_extreme_batches() -> None:
    flat, one_hot = torch.full((5,), 3.0), torch.tensor([0.0, 0.0, 7.0, 0.0])
    assert float(gain_optimal(flat)) == 1.0
    torch.testing.assert_close(float(gain_optimal(one_hot)), 4.0)
    assert optimal_shares(one_hot).tolist() == [0.0, 0.0, 1.0, 0.0]
    # Samples of trace zero cost nothing, even without queries.
    assert float(objective(one_hot, torch.tensor([0, 0, 7, 0]))) == 1.0
    assert float(objective(one_hot, torch.tensor([7, 0, 0, 0]))) == math.inf
    zero = torch.zeros(4)
    assert float(gain_optimal(zero)) == 1.0
    assert optimal_shares(zero).tolist() == [0.25] * 4
