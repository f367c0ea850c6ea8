import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flops_lightning.allocators import (
    BernoulliAllocator,
    CostAwareAllocator,
    EqualAllocator,
    GaussianAllocator,
    OptimalAllocator,
    QueryAllocator,
    TraceSettings,
)
from flops_lightning.allocators.inclusion import LEAST_SHARE, draw_counts, least_expected, systematic_sample
from flops_lightning.allocators.ranks import with_fixed_totals
from flops_lightning.errors import SettingError
from flops_lightning.protocol import QueryBudget, SampleStatistics

PILOTS = TraceSettings(source="pilots")


def statistics(size: int = 40) -> SampleStatistics:
    generator = torch.Generator().manual_seed(size)
    loss, noise = (torch.randn(size, generator=generator).exp() for _ in range(2))
    costs = torch.tensor([1.0, 0.5])
    return SampleStatistics(
        loss=loss, embedding=torch.randn(size, 4, generator=generator), trace=loss.square() * noise,
        predictors={"top_gradient": loss.square()}, counted_costs=costs, scale=torch.ones(2), pilots_reused=False,
    )  # fmt: skip


EVERY: list[QueryAllocator] = [
    EqualAllocator(), OptimalAllocator(traces=PILOTS), GaussianAllocator(), BernoulliAllocator(),
    CostAwareAllocator(traces=PILOTS),
]  # fmt: skip


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.integers(0, 10**6))
@settings(deadline=None, max_examples=200)
def test_as_many_are_drawn_as_their_probabilities_sum_to(probabilities: list[float], seed: int) -> None:
    drawn = systematic_sample(torch.tensor(probabilities).double(), torch.Generator().manual_seed(seed))
    number, expected = int(drawn.sum()), sum(probabilities)
    assert math.floor(expected - 1e-8) <= number <= math.ceil(expected + 1e-8)
    assert not drawn[torch.tensor(probabilities) == 0].any()


def test_each_is_drawn_with_its_probability_and_counts_have_the_expectation() -> None:
    expected = torch.tensor([0.1, 0.25, 0.5, 0.9, 1.0, 1.6, 3.25, 4.4])  # 12 in all
    generator, draws = torch.Generator().manual_seed(0), 4000
    found = torch.stack([draw_counts(expected, generator, unit=1)[0] for _ in range(draws)]).double()
    assert (found.sum(dim=1) == 12).all()
    error = found.std(dim=0) / draws**0.5
    assert ((found.mean(dim=0) - expected).abs() <= 4 * error).all()
    assert ((found - expected).abs() < 1).all()
    counts, inclusion = draw_counts(2 * expected, generator, unit=2)
    assert torch.equal(inclusion, expected.double().clamp(max=1.0))
    assert (counts % 2 == 0).all()


@pytest.mark.parametrize("allocator", EVERY, ids=lambda each: type(each).__name__)
def test_every_allocator_spends_averages_below_one_and_between_whole_numbers(allocator: QueryAllocator) -> None:
    told, budget = statistics(), QueryBudget((0.5, 1.3), sites=("lower", "upper"))
    first, second = allocator.allocate(told, budget), allocator.allocate(told, budget)
    assert first.inclusion is not None
    for allocation in (first, second):
        assert allocation.inclusion is not None
        assert allocation.expected is not None
        whole = 1.0 * 20 + 0.5 * 52 if isinstance(allocator, CostAwareAllocator) else 20.0
        spent = (allocation.expected.sum(dim=1) * torch.tensor([1.0, 0.5])).sum()
        total = float(spent) if isinstance(allocator, CostAwareAllocator) else float(allocation.expected[0].sum())
        assert total == pytest.approx(whole, rel=1e-9)
        assert (allocation.counts.sum(dim=1) - allocation.expected.sum(dim=1)).abs().max() <= 1
        assert torch.equal(allocation.inclusion, allocation.expected.clamp(max=1.0).double())
        assert allocation.inclusion.min() >= LEAST_SHARE * 0.5 - 1e-12
        assert (allocation.counts[allocation.inclusion == 1] > 0).all()
    assert not torch.equal(first.counts, second.counts)
    # Exact resume: the next batch is drawn alike.
    again = type(allocator)(**{"traces": PILOTS} if hasattr(allocator, "traces") else {})
    again.load_state_dict(allocator.state_dict())
    assert torch.equal(again.allocate(told, budget).counts, allocator.allocate(told, budget).counts)
    assert with_fixed_totals(first, (10, 30), multiple=1) is first


def test_a_fraction_is_the_least_expectation_and_shares_are_optimal_above_it() -> None:
    told, least = statistics(), 0.25
    allocation = OptimalAllocator(traces=PILOTS, min_queries=least).allocate(told, QueryBudget((2,)))
    assert told.trace is not None
    assert allocation.expected is not None
    (expected,) = allocation.expected
    root = told.trace.double().sqrt()
    assert expected.min() == least
    assert expected.sum() == pytest.approx(2 * 40)
    above = expected > least
    ratio = (expected / root)[above]
    assert ratio.max() / ratio.min() == pytest.approx(1.0)
    assert (ratio.max() * root[~above] <= least * (1 + 1e-9)).all()
    assert allocation.diagnostics["J_over_J_equal"] < 1


def test_the_least_follows_what_the_budget_pays_for() -> None:
    assert least_expected(QueryBudget((4, 6), multiple=2), 8, 1) == [2, 2]
    assert least_expected(QueryBudget((4.0, 0.5)), 8, 1) == [1, LEAST_SHARE * 0.5]
    assert least_expected(QueryBudget((4,), minimum=2), 8, 0.5) == [0.5]
    with pytest.raises(SettingError, match="min_queries = 5"):
        least_expected(QueryBudget((4,)), 8, 5)
    assert QueryBudget((2.5, 0.01), multiple=2).totals(4) == [10, 2]
    assert QueryBudget((4.0,), multiple=2, minimum=3).unit == 4


def test_mistakes() -> None:
    with pytest.raises(SettingError, match="between two numbers"):
        OptimalAllocator(min_queries=1.5)
    pilots = statistics()
    reused = SampleStatistics(
        pilots.loss, trace=pilots.trace, trace_queries=torch.full((40,), 2.0), predictors=pilots.predictors
    )
    allocator = OptimalAllocator(traces=TraceSettings(source="both"), min_queries=0.25)
    with pytest.raises(SettingError, match=r"min_queries = 0.25.*reused pilots"):
        allocator.allocate(reused, QueryBudget((2,)))
