import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flops_lightning.allocators import OptimalAllocator, TraceSettings, objective
from flops_lightning.protocol import QueryBudget, SampleStatistics, TraceObservation
from tests.allocators.draws import estimates, normal, traces

D = torch.float64


def exact(trace: Tensor, **more: Any) -> SampleStatistics:
    """A batch whose pilots showed the true traces."""
    return SampleStatistics(loss=torch.ones(trace.shape[-1], dtype=D), trace=trace, **more)


def from_pilots(**settings: Any) -> OptimalAllocator:
    return OptimalAllocator(traces=TraceSettings(source="pilots"), **settings)


def share_of_gain(trace: Tensor, counts: Tensor) -> float:
    """J of the best continuous allocation over J of this one."""
    return float(trace.sqrt().sum().square() / counts.sum() / objective(trace, counts))


# With exact traces


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-12, 1e12])
def test_equal_traces_get_equal_counts(value: float) -> None:
    allocation = from_pilots().allocate(exact(torch.full((7,), value, dtype=D)), QueryBudget((20, 6), multiple=2))
    assert allocation.counts.tolist() == [[20] * 7, [6] * 7]
    assert allocation.diagnostics == {"J_over_J_equal": pytest.approx(1.0), "count_min": 6.0, "count_max": 20.0}


def test_counts_by_hand() -> None:
    trace = torch.tensor([[0.0, 1.0, 9.0], [4.0, 4.0, 16.0]], dtype=D)
    allocation = from_pilots().allocate(exact(trace), QueryBudget((11, 4)))
    # 33 less the floor of 1 in the ratio 1 : 3, and 12 in the ratio 1 : 1 : 2.
    assert allocation.counts.tolist() == [[1, 8, 24], [3, 3, 6]]
    first = (1 / 8 + 9 / 24) / (10 / 11)
    second = (4 / 3 + 4 / 3 + 16 / 6) / (24 / 4)
    assert allocation.diagnostics["J_over_J_equal"] == pytest.approx((first + second) / 2)
    assert (allocation.diagnostics["count_min"], allocation.diagnostics["count_max"]) == (1.0, 24.0)
    without = from_pilots(min_queries=0).allocate(exact(trace), QueryBudget((12, 4)))
    assert without.counts.tolist() == [[0, 9, 27], [3, 3, 6]]


def test_samples_that_are_not_finite_get_the_minimum() -> None:
    trace = torch.tensor([1.0, 4.0, 4.0, math.nan], dtype=D)
    statistics = SampleStatistics(loss=torch.tensor([1.0, math.inf, 1.0, 1.0]), trace=trace)
    assert from_pilots().allocate(statistics, QueryBudget((8,))).counts.tolist() == [[10, 1, 20, 1]]


# Reused pilots


def piloted(trace: Tensor, pilots: int = 4, seed: int = 0, *, reused: bool = True) -> SampleStatistics:
    steep = (1.5 * normal(trace.shape[-1], seed=seed)).exp()
    queries = torch.full_like(trace, float(pilots))
    return exact(trace, trace_queries=queries, predictors={"top_gradient": steep}, pilots_reused=reused)


BOTH = TraceSettings(source="both", prior_strength=5.0)


def test_weight_of_reused_pilots_depends_on_the_prediction_alone() -> None:
    budget = QueryBudget((16, 12))
    trace = traces(24).reshape(2, 12)
    one = OptimalAllocator(traces=BOTH).allocate(piloted(trace), budget)
    other = OptimalAllocator(traces=BOTH).allocate(piloted(trace.flip(1) * 1e3), budget)
    lost = OptimalAllocator(traces=BOTH).allocate(piloted(trace * math.nan), budget)
    assert one.pilot_weight is not None
    for changed in (other, lost):
        assert changed.pilot_weight is not None
        assert torch.equal(one.pilot_weight, changed.pilot_weight)
        assert not torch.equal(one.counts, changed.counts)
    # n / (n + A), A in proportion to the root of the prediction, at least one query and 16 (12) on average.
    steep = piloted(trace).predictors
    assert steep is not None
    implied = 4.0 / one.pilot_weight - 4.0
    torch.testing.assert_close(implied.sum(dim=1), torch.tensor([16.0 * 12, 12.0 * 12], dtype=D))
    root = steep["top_gradient"].sqrt()
    above = implied > 1 + 1e-9
    constant = torch.where(above, implied / root, 0.0).amax(dim=1, keepdim=True)
    torch.testing.assert_close(implied, (constant * root).clamp_min(1.0), rtol=1e-9, atol=0.0)


def test_counts_are_the_best_beside_the_weighted_pilots() -> None:
    # The variance left to the other queries is Tr (1 - w)^2 / A, so A goes in proportion to sqrt(Tr) (1 - w).
    strong = TraceSettings(source="both", prior_strength=1e-9)  # the pilots' traces as they are
    trace, budget = traces(12), QueryBudget((4000,))
    allocation = OptimalAllocator(traces=strong).allocate(piloted(trace, pilots=2000), budget)
    assert allocation.pilot_weight is not None
    left = trace * (1 - allocation.pilot_weight[0]).square()
    best = left.sqrt().sum().square() / (4000 * 12)
    torch.testing.assert_close(objective(left, allocation.counts[0]), best, rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("case", ["not reused", "no pilots", "pilots alone", "prediction alone"])
def test_no_weight_without_a_prediction_and_reused_pilots(case: str) -> None:
    settings = {"pilots alone": TraceSettings(source="pilots"), "prediction alone": TraceSettings()}.get(case, BOTH)
    statistics = piloted(traces(12), pilots=0 if case == "no pilots" else 4, reused=case != "not reused")
    assert OptimalAllocator(traces=settings).allocate(statistics, QueryBudget((16,))).pilot_weight is None


# Learning


SLOPES, RESIDUAL, QUERIES = (1.2, -0.7), 0.5, 20


def world(seed: int, *, size: int = 64) -> tuple[SampleStatistics, Tensor]:
    """Predictors, and traces whose logarithm is linear in theirs but for a residual.

    Nothing the allocator starts with fits: there is no steep predictor.
    """
    generator = torch.Generator().manual_seed(seed)
    x, y, noise = torch.randn(3, 2, size, dtype=D, generator=generator)
    loss = torch.rand(size, dtype=D, generator=generator)
    statistics = SampleStatistics(loss, predictors={"a": (x - 9.0).exp(), "b": y.exp()})
    return statistics, 1e-6 * (SLOPES[0] * x + SLOPES[1] * y + RESIDUAL * noise).exp()


def test_learns_the_traces_from_its_own_queries() -> None:
    allocator, budget = OptimalAllocator(), QueryBudget((QUERIES, QUERIES))
    shares = []
    for i in range(40):
        statistics, trace = world(i)
        counts = allocator.allocate(statistics, budget).counts
        shown = estimates(trace, (counts - 1).clamp_min(1), seed=10_000 + i)
        allocator.observe(TraceObservation(torch.where(counts > 1, shown, math.nan), counts.double()))
        shares.append(sum(share_of_gain(trace[s], counts[s]) for s in range(2)) / 2)
    # With a log-normal residual r, allocating by its median costs E[e^r] / E[e^(r / 2)]^2 = exp(RESIDUAL^2 / 4);
    # knowing the slopes from some 5 to 10 batches costs next to nothing.
    assert float(torch.tensor(shares[5:]).mean()) > 0.98 * math.exp(-(RESIDUAL**2) / 4)
    assert shares[0] < 0.75  # at first the loss alone is known, which says nothing here: the allocation is equal
