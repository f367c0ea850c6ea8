import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flops_lightning.allocators import BernoulliAllocator, QueryBudget, TraceSettings
from flops_lightning.allocators.bernoulli import (
    LEAST_P,
    PruningProblem,
    below_mean,
    draw_objective,
    optimise_p,
    pruned_allocation,
    score_gradient,
)  # fmt: skip
from flops_lightning.allocators.trace_estimator import TraceEstimator
from flops_lightning.errors import SettingError
from flops_lightning.protocol import SampleStatistics, TraceObservation

BUDGET = QueryBudget((20,))


def batch(seed: int = 0, *, size: int = 64, slope: float = 1.0) -> SampleStatistics:
    """A batch whose sqrt(Tr) rises (or falls) with the loss, with some scatter."""
    generator = torch.Generator().manual_seed(seed)
    loss = (torch.randn(size, generator=generator) - 0.7).exp()
    root = 0.05 + (loss.tanh() if slope > 0 else 1.0 - loss.tanh()).square()
    scatter = (0.3 * torch.randn(size, generator=generator)).exp()
    return SampleStatistics(loss=loss, trace=root.square() * scatter)


def small_problem(*, harder_below: bool, floor: float = 1.0) -> PruningProblem:
    """Ten samples, six of them below the mean loss, whose traces are the smaller or the larger ones."""
    generator = torch.Generator().manual_seed(4)
    trace = (0.5 * torch.randn(10, dtype=torch.float64, generator=generator)).exp()
    below = torch.tensor([True, False, True, True, False, True, False, True, True, False])
    return PruningProblem(below, torch.where(below == harder_below, 20.0, 1.0) * trace, total=80.0, floor=floor)


def plain_allocation(pruned: list[bool], total: float, floor: float) -> list[float]:
    """Every query that a pruned sample gives up is handed out, one sample after the other."""
    average = total / len(pruned)
    counts, freed = [average] * len(pruned), 0.0
    for i, is_pruned in enumerate(pruned):
        if is_pruned:
            counts[i] = max(average / 2, floor)
            freed += average - counts[i]
    return [c if out else c + freed / pruned.count(False) for c, out in zip(counts, pruned, strict=True)]


def enumerated(below: Tensor, p: Tensor) -> list[tuple[Tensor, list[bool]]]:
    """Every mask there can be, each with its probability."""
    masks = itertools.product(*([False, True] if is_below else [False] for is_below in below.tolist()))
    return [(p ** sum(mask) * (1 - p) ** (int(below.sum()) - sum(mask)), list(mask)) for mask in masks]


def exact_objective(problem: PruningProblem, p: Tensor) -> Tensor:
    """J by enumeration, differentiable in p."""
    value = torch.zeros((), dtype=torch.float64)
    for probability, mask in enumerated(problem.below, p):
        counts = torch.tensor(plain_allocation(mask, problem.total, problem.floor), dtype=torch.float64)
        value = value + probability * (problem.trace / counts).sum()
    return value


def exact_at(problem: PruningProblem, p: float) -> float:
    return float(exact_objective(problem, torch.tensor(p, dtype=torch.float64)))


def test_counts_follow_equation_6_with_the_freed_queries_in_equal_parts() -> None:
    # 1680 queries leave nothing to be rounded, however many of the five samples below the mean are pruned.
    loss, p, repeats = torch.tensor([0.1, 3.0, 0.2, 0.3, 2.0, 0.1, 0.4, 2.5]), 0.3, 600
    below = loss < loss.mean()
    assert int(below.sum()) == 5
    allocator = BernoulliAllocator(p=p, optimise=False)
    drawn = []
    for _ in range(repeats):
        allocation = allocator.allocate(SampleStatistics(loss=loss), QueryBudget((1680,)))
        counts = allocation.counts[0]
        pruned = counts == 840
        number, found = int(pruned.sum()), {"count_min": float(counts.min()), "count_max": float(counts.max())}
        assert not bool((pruned & ~below).any())
        assert counts[~pruned].unique().tolist() == [1680 + number * 840 // (8 - number)]
        assert allocation.diagnostics == {"p": p, "pruned": number / 8} | found
        drawn.append(pruned.double())
    pruned = torch.stack(drawn)
    assert bool(((pruned.mean(dim=0) - p * below).abs() <= 4 * math.sqrt(p * (1 - p) / repeats)).all())
    # Independent draws: the number of pruned samples has the variance of a binomial, whose excess kurtosis is negative.
    assert float(pruned.sum(dim=1).var()) == pytest.approx(5 * p * (1 - p), rel=4 * math.sqrt(2 / repeats))


@pytest.mark.parametrize("floor", [1.0, 4.0, 7.0, 8.0])
def test_allocation_equals_handing_out_one_by_one(floor: float) -> None:
    masks = [mask for _, mask in enumerated(torch.tensor([True] * 6 + [False] * 4), torch.tensor(0.5))]
    expected = torch.tensor([plain_allocation(mask, 80.0, floor) for mask in masks], dtype=torch.float64)
    torch.testing.assert_close(pruned_allocation(torch.tensor(masks), 80.0, floor=floor), expected)


@pytest.mark.parametrize("floor", [1.0, 6.0])
@pytest.mark.parametrize("p", [0.2, 0.9])
def test_score_gradient_is_unbiased(p: float, floor: float) -> None:
    problem, repeats, draws = small_problem(harder_below=False, floor=floor), 4000, 3
    logit = torch.tensor(p, dtype=torch.float64).logit().requires_grad_()
    value = exact_objective(problem, logit.sigmoid())
    (slope,) = torch.autograd.grad(value, logit)
    value = value.detach()
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(repeats, draws, 10, dtype=torch.float64, generator=generator)
    estimates = torch.tensor([score_gradient(problem, p, each) for each in uniform], dtype=torch.float64)
    standard_error = float(estimates.std()) / math.sqrt(repeats)
    assert abs(float(estimates.mean() - slope)) < 4 * standard_error
    # The comparison says something: a baseline that includes the draw itself would be a third too small.
    assert abs(float(slope)) / 3 > 8 * standard_error
    values = draw_objective(problem, p, uniform.flatten(0, 1))[0]
    standard_error = float(values.std()) / math.sqrt(len(values))
    assert abs(float(values.mean() - value)) < 4 * standard_error


@pytest.mark.parametrize("harder_below", [False, True])
@pytest.mark.parametrize("starts", [(0.5,), (0.99, 0.5), (0.01, 0.5)])
def test_the_optimum_is_the_best_of_a_grid_of_the_enumerated_objective(
    harder_below: bool, starts: tuple[float, ...]
) -> None:
    problem = small_problem(harder_below=harder_below)
    grid = torch.linspace(LEAST_P, 1.0 - LEAST_P, 50).tolist()
    values = [exact_at(problem, p) for p in grid]
    best, worst = min(values), max(values)
    assert worst > 1.2 * best  # there is something to find
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        optimum = optimise_p(problem, starts, draws=32, max_iterations=100, generator=generator)
        assert optimum.converged
        assert float(optimum.place) == pytest.approx(grid[values.index(best)], abs=0.05)
        # Within what the stopping rule counts as no change, in each half of the way.
        assert exact_at(problem, float(optimum.place)) < 1.02 * best


def test_p_is_warm_started() -> None:
    # From 0.5 it takes more than the five iterations that the stopping rule needs; from where it ended, just these.
    allocator = BernoulliAllocator()
    first = allocator.allocate(batch(0), BUDGET).diagnostics
    second = allocator.allocate(batch(0), BUDGET).diagnostics
    assert first["iterations"] > second["iterations"] == 5.0


def test_a_given_p_outlives_a_checkpoint_and_an_optimised_one_starts_within_its_bounds() -> None:
    given_one, optimised = BernoulliAllocator(p=1.0, optimise=False), BernoulliAllocator(p=0.3)
    optimised.load_state_dict(given_one.state_dict())
    assert optimised.state_dict()["p"] == 1.0 - LEAST_P
    given_one.load_state_dict(BernoulliAllocator(p=0.3).state_dict())
    assert given_one.allocate(batch(), BUDGET).diagnostics["p"] == 1.0


def test_every_site_prunes_the_same_samples() -> None:
    budget = QueryBudget((20, 200, 8), multiple=2)
    statistics = batch()
    assert statistics.trace is not None
    traces = torch.stack([statistics.trace, 1e6 * statistics.trace, torch.full((64,), torch.nan)])
    for allocator, given_statistics in (
        (BernoulliAllocator(optimise=False), statistics),
        (BernoulliAllocator(), SampleStatistics(loss=statistics.loss, trace=traces)),
    ):
        counts = allocator.allocate(given_statistics, budget).counts
        assert counts.sum(dim=1).tolist() == [64 * 20, 64 * 200, 64 * 8]
        assert bool((counts % 2 == 0).all())
        pruned = counts < torch.tensor(budget.queries_per_sample)[:, None]
        assert 5 < int(pruned[0].sum()) < 60
        assert torch.equal(pruned[1], pruned[0])
        assert torch.equal(pruned[2], pruned[0])


def test_the_optimisation_looks_at_the_first_site() -> None:
    # Of 20 queries pruned samples keep one half, of 4 they keep the minimum, which is 3/4: samples with 0.63 of the
    # mean trace are worth pruning only there.
    loss = torch.tensor([0.0, 1.0]).repeat(32)
    statistics = SampleStatistics(loss=loss, trace=torch.tensor([0.63, 1.37]).repeat(32))
    found = {}
    for queries in ((20,), (4,), (20, 4), (4, 20)):
        allocator = BernoulliAllocator(min_queries=3)
        found[queries] = allocator.allocate(statistics, QueryBudget(queries)).diagnostics["p"]
    assert found[20,] == found[20, 4] < 0.1
    assert found[4,] == found[4, 20] > 0.5


@pytest.mark.parametrize("optimise", [False, True])
@pytest.mark.parametrize("value", [0.1, 0.7, -3.3, 0.0, 1e308, -1e308, 1.7976931348623157e308, math.nan])
def test_equal_losses_are_allocated_equally(optimise: bool, value: float) -> None:
    for size in (1, 2, 3, 7, 10, 49):
        statistics = SampleStatistics(loss=torch.full((size,), value, dtype=torch.float64), trace=torch.rand(size))
        allocation = BernoulliAllocator(p=0.9, optimise=optimise).allocate(statistics, BUDGET)
        assert allocation.counts.tolist() == [[20] * size]
        assert (allocation.diagnostics["pruned"], allocation.diagnostics["p"]) == (0.0, 0.9)


def test_a_mean_that_overflows_still_separates() -> None:
    loss = torch.tensor([1e308, 1.7e308, 1.7e308, 1.0], dtype=torch.float64)
    assert below_mean(loss).tolist() == [True, False, False, True]
    assert below_mean(-loss).tolist() == [False, True, True, False]


@pytest.mark.parametrize(
    ("min_queries", "budget", "expected"),
    [
        (7, QueryBudget((10,)), [7, 7, 13, 13]),
        (7, QueryBudget((10,), multiple=2), [8, 8, 12, 12]),  # raised to the next pair
        (1, QueryBudget((10,), minimum=9), [9, 9, 11, 11]),  # the budget's own minimum rules where it is higher
    ],
)
def test_half_the_average_below_the_minimum_frees_less(
    min_queries: int, budget: QueryBudget, expected: list[int]
) -> None:
    statistics = SampleStatistics(loss=torch.tensor([0.0, 0.0, 1.0, 1.0]))
    allocator = BernoulliAllocator(p=1.0, optimise=False, min_queries=min_queries)
    assert allocator.allocate(statistics, budget).counts.tolist() == [expected]


def test_a_given_p_needs_nothing_but_the_loss_and_an_optimised_one_traces() -> None:
    allocator = BernoulliAllocator(optimise=False)
    assert (allocator.requires, allocator.requests, allocator.learns) == (frozenset(), frozenset(), False)
    statistics = batch()
    bare = allocator.allocate(SampleStatistics(loss=statistics.loss), BUDGET)
    other = BernoulliAllocator(optimise=False).allocate(statistics, BUDGET)
    assert torch.equal(bare.counts, other.counts)
    assert set(bare.diagnostics) == {"p", "pruned", "count_min", "count_max"}
    assert BernoulliAllocator().requests == {"trace", "trace_queries"}


def test_traces_are_learned_from_what_the_queries_showed() -> None:
    chosen = TraceSettings(source="prediction", predictors=["loss"])
    allocator = BernoulliAllocator(traces=chosen)
    assert (allocator.requests, allocator.learns) == (TraceEstimator(chosen).requests, True)
    for seed in range(3):
        statistics = batch(seed)
        assert statistics.trace is not None
        allocation = allocator.allocate(SampleStatistics(loss=statistics.loss), BUDGET)
        # At first the prediction knows of no difference between samples, so that pruning does not pay; then it does.
        assert allocation.diagnostics["p"] < 0.1 if seed == 0 else allocation.diagnostics["p"] > 0.9
        allocator.observe(TraceObservation(trace=statistics.trace[None], queries=allocation.counts))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": -0.1, "optimise": False}, r"p = -0.1: must lie between 0 and 1\. Write, for example, 0.5\.$"),
        ({"p": 1.5}, r"p = 1.5: must lie between 0.01 and 0.99 to be optimised\. Write, for example, 0.5\.$"),
        ({"p": math.nan}, r"p = nan: must lie between .* Write, for example, 0.5\.$"),
        ({"p": 1.0}, r"p = 1.0: must lie between 0.01 and 0.99 .* Write, for example, 0.5, or optimise: false\.$"),
        ({"optimise": False, "traces": TraceSettings()}, r"traces = TraceSettings\(.*no effect .* Remove `traces`."),
        ({"traces": TraceSettings(source="pilots", window=3)}, r"traces.window = 3: has no effect .* Remove `window`."),
    ],
)
def test_bad_settings_are_named_with_the_remedy(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        BernoulliAllocator(**arguments)
