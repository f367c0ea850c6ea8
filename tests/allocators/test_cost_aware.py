import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flops_lightning.allocators import CostAwareAllocator, OptimalAllocator, QueryBudget, TraceSettings
from flops_lightning.allocators.cost_aware import cheapest_counts
from flops_lightning.allocators.trace_estimator import TraceEstimator
from flops_lightning.errors import SettingError
from flops_lightning.protocol import SampleStatistics, TraceObservation
from tests.allocators.draws import normal, traces

D = torch.float64
PILOTS = TraceSettings(source="pilots")
BUDGET = QueryBudget((20, 20))


def statistics(sites: int = 2, size: int = 12, *, seed: int = 0, **more: Any) -> SampleStatistics:
    """A batch with exact traces, costs that fall from bottom to top, and scales of one."""
    given_ = {
        "trace": traces(sites, size, seed=seed),
        "counted_costs": torch.linspace(0.9, 0.2, sites, dtype=D),
        "scale": torch.ones(sites, dtype=D),
    }
    return SampleStatistics(loss=torch.ones(size, dtype=D), **(given_ | more))


def variance(trace: Tensor, counts: Tensor) -> float:
    return float((trace / counts).sum())


# The split itself


class Table:
    """A tiny problem, and every integer table that solves it."""

    def __init__(self, draw: st.DrawFn) -> None:
        value = st.one_of(st.floats(1e-3, 1e3), st.sampled_from([0.0, 1.0]))
        self.variance = torch.tensor([[draw(value) for _ in range(2)] for _ in range(2)], dtype=D)
        self.costs = torch.tensor([draw(st.sampled_from([1.0, 0.5, 0.3, 1e-4])) for _ in range(2)], dtype=D)
        self.multiple = draw(st.sampled_from([1, 2]))
        self.least = self.multiple * draw(st.integers(1, 2))
        most = [self.least + self.multiple * draw(st.integers(0, 5)) for _ in range(2)]
        self.most = torch.tensor(most, dtype=D)
        self.total = float(self.costs.sum()) * 2 * self.least * draw(st.floats(1.0, 3.0))
        one = [torch.arange(self.least, high + 1, self.multiple, dtype=D) for high in most for _ in range(2)]
        self.tables = torch.cartesian_prod(*one).view(-1, 2, 2)

    def best(self, total: float) -> float:
        """Least J of all tables that cost at most this."""
        cost = (self.costs[:, None] * self.tables).sum(dim=(1, 2))
        values = (self.variance / self.tables).sum(dim=(1, 2))
        return float(values[cost <= total * (1 + 1e-9)].min())


tables = st.composite(Table)


@given(tables())
@settings(max_examples=120)
def test_as_good_as_any_integer_table_that_costs_one_multiple_less(table: Table) -> None:
    bounds = {"least": table.least, "most": table.most, "multiple": table.multiple}
    counts = cheapest_counts(table.variance, table.costs, table.total, **bounds)
    assert counts.dtype == torch.int64
    assert float((table.costs[:, None] * counts).sum()) <= table.total * (1 + 1e-9)
    assert bool(((counts >= table.least) & (counts <= table.most[:, None]) & (counts % table.multiple == 0)).all())
    reached, least = variance(table.variance, counts), float(table.costs.sum()) * 2 * table.least
    assert reached >= table.best(table.total) * (1 - 1e-9)
    # Spent by the ratio of what it saves to what it costs, each step is the best one; only the last may not fit.
    reduced = max(least, table.total - table.multiple * float(table.costs.max()))
    assert reached <= table.best(reduced) * (1 + 1e-9)


def test_continuous_optimum_by_hand() -> None:
    # sqrt(V / c) = 1, 2; 4, 2 at costs 4 and 1: with A = k times that, 4 k (1 + 2) + k (4 + 2) = 18 k.
    values = torch.tensor([[4.0, 16.0], [16.0, 4.0]], dtype=D)
    costs, most = torch.tensor([4.0, 1.0], dtype=D), torch.full((2,), 1e9, dtype=D)
    assert cheapest_counts(values, costs, 180.0, least=1, most=most, multiple=1).tolist() == [[10, 20], [40, 20]]
    # The same with costs of samples: sqrt(V / c) = 1, 4; 2, 2.
    of_samples = torch.tensor([[4.0, 1.0], [4.0, 1.0]], dtype=D)
    assert cheapest_counts(values, of_samples, 180.0, least=1, most=most, multiple=1).tolist() == [[10, 40], [20, 20]]
    # With two of them capped 4 k + 2 k = 70 is left: 11.7 and 23.3, rounded down and the rest spent where it can be.
    capped = cheapest_counts(values, costs, 180.0, least=1, most=torch.tensor([20.0, 30.0]), multiple=1)
    assert capped.tolist() == [[11, 20], [30, 26]]


# The allocator


def test_one_site_is_the_neyman_allocation() -> None:
    told = statistics(1, 32)
    budget = QueryBudget((200,))
    costly = CostAwareAllocator(traces=PILOTS).allocate(replace(told, scale=None), budget).counts
    neyman = OptimalAllocator(traces=PILOTS).allocate(told, budget).counts
    assert int((costly - neyman).abs().max()) <= 1
    assert int(costly.sum()) == int(neyman.sum())


@given(
    st.integers(0, 10_000), st.integers(1, 3), st.integers(1, 6), st.sampled_from([1, 2]), st.integers(0, 3),
    st.sampled_from([0.0, 1.5, 1e-6]), st.booleans(),
)  # fmt: skip
@settings(max_examples=80)
def test_never_more_compute_than_the_budget(
    seed: int, sites: int, size: int, multiple: int, minimum: int, compute: float, silent: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    costs = 10.0 ** (-5.0 * torch.rand(sites, dtype=D, generator=generator))
    trace = (3.0 * normal(sites, size, seed=seed)).exp() * (not silent)
    own = multiple * torch.randint(2, 15, (sites,), generator=generator)
    budget = QueryBudget(tuple(own.tolist()), multiple=multiple, minimum=minimum)
    told = statistics(sites, size, trace=trace, counted_costs=costs)
    charged = costs.clamp_min(1e-4 * float(costs.max()))
    total = float((charged * own).sum())
    least = -(-max(minimum, 1) // multiple) * multiple
    allocator = CostAwareAllocator(traces=PILOTS, compute=compute * total)
    if (compute or 1.0) * total < float(charged.sum()) * least:
        with pytest.raises(SettingError, match="does not pay for"):
            allocator.allocate(told, budget)
        return
    allocation = allocator.allocate(told, budget)
    counts, available = allocation.counts, (compute or 1.0) * total * size
    spent = float((charged[:, None] * counts).sum())
    assert spent <= available * (1 + 1e-9)
    assert allocation.diagnostics["compute_used"] == pytest.approx(spent / available)
    assert int(counts.min()) >= least
    assert bool((counts % multiple == 0).all())
    assert bool((counts <= (10 * own).clamp_min(least)[:, None]).all())


def test_compute_that_pays_for_just_the_least_is_enough_and_so_is_the_remedy() -> None:
    # 0.1 + 0.2 + 0.7 summed in different orders differ in the last digit.
    for costs in itertools.permutations([0.1, 0.2, 0.7, 0.31237]):
        told, budget = statistics(4, 7, counted_costs=torch.tensor(costs, dtype=D)), QueryBudget((3,) * 4)
        enough = CostAwareAllocator(traces=PILOTS, min_queries=3)
        assert enough.allocate(told, budget).counts.tolist() == [[3] * 7] * 4
        with pytest.raises(SettingError, match=r"compute = 0.5: does not pay for 3 queries") as caught:
            CostAwareAllocator(traces=PILOTS, compute=0.5, min_queries=3).allocate(told, budget)
        assert caught.value.remedy.startswith("Lower min_queries, or write at least ")
        least = float(caught.value.remedy.split()[-1].rstrip("."))
        assert least == pytest.approx(3 * sum(costs), rel=2e-3)
        enough = CostAwareAllocator(traces=PILOTS, compute=least, min_queries=3)
        assert enough.allocate(told, budget).counts.tolist() == [[3] * 7] * 4


def test_floor_cap_and_multiple() -> None:
    told = statistics(2, 12, trace=(4.0 * normal(2, 12)).exp())
    allocator = CostAwareAllocator(traces=PILOTS, min_queries=3, max_queries=51)
    allocation = allocator.allocate(told, QueryBudget((20, 20), multiple=2))
    diagnostics, counts = allocation.diagnostics, allocation.counts.double()
    assert (int(counts.min()), int(counts.max())) == (4, 50)
    assert (diagnostics["count_min"], diagnostics["count_max"]) == (4.0, 50.0)
    assert (diagnostics["queries/0"], diagnostics["queries/1"]) == pytest.approx(counts.mean(dim=1).tolist())
    # The default cap is ten times a site's own budget.
    lone = torch.full((2, 12), 1e-12, dtype=D)
    lone[:, 0] = 1.0
    counts = CostAwareAllocator(traces=PILOTS).allocate(replace(told, trace=lone), QueryBudget((6, 8))).counts
    assert counts.amax(dim=1).tolist() == [60, 80]


def test_costs_are_those_that_were_chosen() -> None:
    told = statistics(counted_costs=torch.tensor([0.9, 0.1], dtype=D), measured_costs=torch.tensor([0.3, 0.2], dtype=D))
    given_ = {name: getattr(told, name).tolist() for name in ("counted_costs", "measured_costs")}
    counts = {}
    for costs, name in (("flops", "counted_costs"), ("measured", "measured_costs")):
        allocator = CostAwareAllocator(traces=PILOTS, costs=costs)  # type: ignore[arg-type]
        assert allocator.requests == {"trace", "trace_queries", "scale", name}
        counts[costs] = allocator.allocate(told, BUDGET).counts
        same = CostAwareAllocator(traces=PILOTS, costs="given", given_costs=given_[name])
        assert same.requests == {"trace", "trace_queries", "scale"}
        assert torch.equal(same.allocate(replace(told, **{name: None}), BUDGET).counts, counts[costs])
    assert not torch.equal(counts["flops"], counts["measured"])
    # Only the ratio of the costs matters.
    scaled = CostAwareAllocator(traces=PILOTS, costs="given", given_costs=[7 * c for c in given_["counted_costs"]])
    assert torch.equal(scaled.allocate(told, BUDGET).counts, counts["flops"])


def test_costs_of_zero() -> None:
    told = statistics(counted_costs=torch.tensor([1.0, 0.0], dtype=D))
    floored = statistics(counted_costs=torch.tensor([1.0, 1e-4], dtype=D))
    free, cheap = (CostAwareAllocator(traces=PILOTS).allocate(each, BUDGET).counts for each in (told, floored))
    assert torch.equal(free, cheap)
    assert free[1].tolist() == [200] * 12  # capped
    nothing = CostAwareAllocator(traces=PILOTS).allocate(statistics(counted_costs=torch.zeros(2, dtype=D)), BUDGET)
    ones = CostAwareAllocator(traces=PILOTS, costs="given", given_costs=[1, 1]).allocate(statistics(), BUDGET)
    assert torch.equal(nothing.counts, ones.counts)


def test_traces_are_compared_in_the_chosen_metric() -> None:
    told = statistics(scale=torch.tensor([1.0, 9.0], dtype=D), preconditioned_scale=torch.tensor([4.0, 0.5], dtype=D))
    assert told.trace is not None
    for metric, name in (("parameters", "scale"), ("preconditioned", "preconditioned_scale")):
        allocator = CostAwareAllocator(traces=PILOTS, metric=metric)  # type: ignore[arg-type]
        assert name in allocator.requests
        scale = getattr(told, name)
        ready = replace(told, trace=told.trace * scale[:, None], scale=torch.ones(2, dtype=D))
        plain = CostAwareAllocator(traces=PILOTS).allocate(ready, BUDGET)
        allocation = allocator.allocate(told, BUDGET)
        assert torch.equal(allocation.counts, plain.counts)
        own = variance(ready.trace, torch.full((2, 12), 20.0))  # type: ignore[arg-type]
        expected = variance(ready.trace, allocation.counts) / own  # type: ignore[arg-type]
        assert allocation.diagnostics["J_over_J_own"] == pytest.approx(expected)


@pytest.mark.parametrize("compute", [0.0, 11.0, 44.0])
def test_nothing_to_choose_by_keeps_the_modules_own_split(compute: float) -> None:
    told = statistics(trace=torch.zeros(2, 12, dtype=D), counted_costs=torch.tensor([0.9, 0.2], dtype=D))
    allocation = CostAwareAllocator(traces=PILOTS, compute=compute).allocate(told, QueryBudget((20, 20)))
    # 20 (0.9 + 0.2) = 22 is what the own budgets cost.
    queries = 20 * (compute or 22.0) / 22.0
    assert allocation.counts.double().mean(dim=1).tolist() == pytest.approx([queries] * 2)
    if not compute:
        assert allocation.counts.tolist() == [[20] * 12] * 2
    uneven = CostAwareAllocator(traces=PILOTS).allocate(told, QueryBudget((8, 30)))
    assert uneven.counts.tolist() == [[8] * 12, [30] * 12]


def test_pilots_that_are_reused_leave_less_to_do() -> None:
    settings_ = TraceSettings(source="both", prior_strength=3.0)
    told = statistics(
        trace_queries=torch.tensor([[40.0], [0.0]]).expand(2, 12), predictors={"top_gradient": traces(12)}
    )
    seen = TraceObservation(traces(2, 12, seed=5), torch.full((2, 12), 20.0))
    estimator, allocator = TraceEstimator(settings_), CostAwareAllocator(traces=settings_)
    estimator.estimate(told.on_cpu(), sites=2)
    allocator.allocate(told, BUDGET)
    for each in (estimator, allocator):
        each.observe(seen)  # type: ignore[attr-defined]
    allocation, estimate = allocator.allocate(told, BUDGET), estimator.estimate(told.on_cpu(), sites=2)
    assert estimate.prediction is not None
    assert told.counted_costs is not None
    total = float(told.counted_costs.sum()) * 20 * 12
    settled = {"costs": told.counted_costs, "total": total, "least": 1, "most": torch.full((2,), 200.0), "multiple": 1}
    # The weight is n / (n + A) with A the counts for the prediction: fixed before the pilots are seen.
    alone = cheapest_counts(estimate.prediction, **settled)
    weight = estimate.pilots / (estimate.pilots + alone)
    torch.testing.assert_close(allocation.pilot_weight, weight)
    assert weight[1].tolist() == [0.0] * 12
    # What is left to the other queries is Tr (1 - w)^2 / A.
    assert torch.equal(allocation.counts, cheapest_counts(estimate.trace * (1 - weight).square(), **settled))
    assert allocator.allocate(replace(told, pilots_reused=False), BUDGET).pilot_weight is None


def test_before_anything_is_learned_sites_keep_their_own_queries() -> None:
    told = statistics(predictors={"top_gradient": traces(12)}, scale=torch.tensor([100.0, 1.0]))
    counts = CostAwareAllocator().allocate(told, BUDGET).counts
    average = counts.double().mean(dim=1)
    torch.testing.assert_close(average, torch.tensor(BUDGET.queries_per_sample).double(), atol=0.5, rtol=0.0)
    assert int(counts[0].max()) > 2 * int(counts[0].min())  # and split them by the prediction


def test_learns_which_site_is_worth_its_cost() -> None:
    # The upper site's queries cost a tenth and are ten times as noisy: sqrt(V / c) is ten times as large.
    allocator = CostAwareAllocator(max_queries=1000)
    for i in range(4):
        known = traces(32, seed=i)
        told = statistics(size=32, predictors={"top_gradient": known}, counted_costs=torch.tensor([1.0, 0.1]))
        counts = allocator.allocate(told, QueryBudget((50, 50))).counts
        allocator.observe(TraceObservation(known * torch.tensor([[1.0], [10.0]]), counts.double()))
    # 55 a sample of compute, at k (1 + 0.1 * 10): 27.5 and 275.
    assert counts.double().mean(dim=1).tolist() == pytest.approx([27.5, 275.0], rel=0.02)


# Refusals

ONE_SITE = {"trace": torch.tensor([[1.0] * 12, [math.nan] * 12], dtype=D)}


@pytest.mark.parametrize(
    ("kwargs", "changed", "setting", "message"),
    [
        ({"costs": "euros"}, None, "costs", "'euros': is not one of the choices. Choose from flops, measured, given"),
        ({"metric": "hessian"}, None, "metric", "'hessian': is not one .* Choose from parameters, preconditioned"),
        ({"given_costs": [1]}, None, "given_costs", r"\[1\]: does not go with costs: flops"),
        ({"costs": "given"}, None, "given_costs", r"\[\]: does not go with costs: given. Write one cost for each site"),
        ({"costs": "given", "given_costs": [1, 0]}, None, "given_costs", "= 0: must be a number above 0. Write"),
        ({"compute": -1.0}, None, "compute", "-1.0: must be 0 or more. Write 0"),
        ({"min_queries": 0}, None, "min_queries", "0: must be 1 or more. Write 1 or more"),
        ({"max_queries": -1}, None, "max_queries", "-1: is below min_queries = 1. Write 0 for the default"),
        ({"min_queries": 5, "max_queries": 4}, None, "max_queries", "4: is below min_queries = 5"),
        ({"traces": TraceSettings(window=0)}, None, "traces.window", "0: cannot tell how traces"),
        ({}, {"counted_costs": None}, "costs", "'flops': needs one cost for each of 2 sites, and .* returned none"),
        ({"costs": "measured"}, {}, "costs", "'measured': needs one cost for each of 2 sites, and .* returned none"),
        ({}, {"counted_costs": torch.ones(3)}, "costs", "'flops': needs one cost for each of 2 sites, and there are 3"),
        ({"costs": "given", "given_costs": [1]}, {}, "costs", "'given': needs .* there are 1. Write costs: given"),
        ({}, {"counted_costs": torch.tensor([1, math.nan])}, "costs", r"'flops': gave \[1.0, nan\]; all must be"),
        ({}, {"counted_costs": torch.tensor([1.0, -1.0])}, "costs", r"'flops': gave \[1.0, -1.0\]"),
        ({}, {"scale": None}, "metric", "'parameters': needs the statistic `scale` to compare 2 sites. Return it"),
        ({"metric": "preconditioned"}, {}, "metric", "'preconditioned': needs the statistic `preconditioned_scale`"),
        ({}, {"scale": torch.ones(3)}, "sample_statistics.scale", r"\(3,\): must have one factor for each of 2 sites"),
        ({"traces": PILOTS}, ONE_SITE, "traces.source", "'pilots': 1 of 2 sites have pilots, and .* for every site"),
        ({"max_queries": 1}, {}, "max_queries", r"1: is below the least count, 2\. Write 2 or more"),
    ],
)
def test_settings_and_statistics_without_sense_are_refused(
    kwargs: dict[str, Any], changed: dict[str, Any] | None, setting: str, message: str
) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        CostAwareAllocator(**kwargs).allocate(
            replace(statistics(), **(changed or {})), QueryBudget((20, 20), minimum=2)
        )
    assert caught.value.setting == setting
    if changed is None:  # refused before anything is computed
        with pytest.raises(SettingError, match=message):
            CostAwareAllocator(**kwargs)
