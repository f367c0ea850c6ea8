import math

import pytest
import torch
from torch import Tensor

from flops_lightning.allocators.objective import (
    effective_counts,
    equal_objective,
    estimated_gain_optimal,
    gain_optimal,
    objective,
    optimal_shares,
)  # fmt: skip
from tests.allocators.draws import estimates, traces


def best_shares(trace: Tensor) -> Tensor:
    return optimal_shares(trace) / optimal_shares(trace).sum()


def test_gain_is_the_ratio_of_the_objectives() -> None:
    trace, total = traces(12, seed=3), 100.0
    ratio = equal_objective(trace, total) / objective(trace, total * best_shares(trace))
    torch.testing.assert_close(gain_optimal(trace), ratio, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(equal_objective(trace, total), objective(trace, torch.full_like(trace, total / 12)))


def test_extreme_batches() -> None:
    flat, one_hot = torch.full((5,), 3.0), torch.tensor([0.0, 0.0, 7.0, 0.0])
    assert float(gain_optimal(flat)) == 1.0
    torch.testing.assert_close(float(gain_optimal(one_hot)), 4.0)
    assert best_shares(one_hot).tolist() == [0.0, 0.0, 1.0, 0.0]
    # Samples of trace zero cost nothing, even without queries.
    assert float(objective(one_hot, torch.tensor([0, 0, 7, 0]))) == 1.0
    assert float(objective(one_hot, torch.tensor([7, 0, 0, 0]))) == math.inf
    zero = torch.zeros(4)
    assert float(gain_optimal(zero)) == 1.0
    assert optimal_shares(zero).tolist() == [0.0] * 4  # every allocation is optimal


def test_effective_counts_by_hand() -> None:
    counts, pilots = torch.tensor([[5, 8, 0, 4, 0, 0]]), torch.tensor([[3, 0, 0, 2, 2, 2]])
    weight = torch.tensor([3 / 8, 0.7, 0.5, 0.5, 1.0, 0.5], dtype=torch.float64)
    # At w = n / (n + A) pilots and others are worth as much as any 8 queries; without pilots the weight does nothing;
    # without others all rests on the pilots, and nothing is known where they leave them a weight.
    expected = torch.tensor([[8.0, 8.0, 0.0, 1 / (0.25 / 2 + 0.25 / 4), 2.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(effective_counts(counts, pilots, weight), expected)
    shifted = effective_counts(torch.tensor(5), torch.tensor(3), torch.linspace(0, 1, 101, dtype=torch.float64))
    assert float(shifted.max()) < 8.0  # n / (n + A) is the best weight, and no hundredth


@pytest.mark.parametrize("freedom", [1, 2, 5, 20])
def test_estimated_gain_of_equal_traces_is_one_where_the_naive_one_is_not(freedom: int) -> None:
    size = 400_000
    trace = estimates(torch.full((size,), 3.0, dtype=torch.float64), freedom, seed=freedom)
    gain = float(estimated_gain_optimal(trace, torch.full((size,), freedom)))
    # The gain is about b sum t / (sum r)^2, so to first order its error is the mean of t / E t - 2 r / E r + 1.
    root = trace.sqrt()
    standard_error = float((trace / trace.mean() - 2 * root / root.mean()).std()) / math.sqrt(size)
    assert 1.0 <= gain < 1.0 + 4 * standard_error
    # E sqrt(chi^2_n) = sqrt(2) Gamma((n + 1) / 2) / Gamma(n / 2): the naive gain reads 1.57, 1.27, 1.10, 1.03.
    mean_root = math.sqrt(2 / freedom) * math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    naive = float(gain_optimal(trace))
    assert abs(naive - 1 / mean_root**2) < 4 * naive * standard_error
    assert naive > gain + 10 * standard_error


def test_estimated_gain_where_freedom_differs_and_traces_are_missing() -> None:
    repeats, size = 400, 1000
    trace = traces(size, seed=5).square()
    freedom = torch.tensor([1, 3, 8, 0]).repeat(size // 4)
    found = estimates(trace.expand(repeats, -1), freedom.clamp_min(1))
    found[:, 4] = math.nan
    known = (freedom > 0) & (torch.arange(size) != 4)
    gains = estimated_gain_optimal(found, freedom.expand(repeats, -1))
    standard_error = float(gains.std()) / math.sqrt(repeats)
    assert abs(float(gains.mean()) - float(gain_optimal(trace[known]))) < 4 * standard_error


def test_estimated_gain_at_its_ends() -> None:
    many = torch.full((4,), 1_000_000)
    exact = traces(4)
    torch.testing.assert_close(estimated_gain_optimal(exact, many), gain_optimal(exact), rtol=1e-5, atol=0.0)
    # Never below 1, nor above the number of samples, however noisy.
    lone = torch.tensor([[0.0, 0.0, 7.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(estimated_gain_optimal(lone, torch.ones(2, 4)), torch.tensor([4.0, 1.0]).double())
    # Nothing known, or nothing but zero.
    for trace, freedom in ((torch.zeros(3), torch.ones(3)), (torch.full((3,), math.nan), torch.ones(3))):
        assert float(estimated_gain_optimal(trace, freedom)) == 1.0
    assert float(estimated_gain_optimal(torch.ones(3), torch.zeros(3))) == 1.0
