"""What all allocators have in common: budgets are met, runs resume bit by bit, settings are checked."""

import io
import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flops_lightning.allocators import (
    BernoulliAllocator,
    CostAwareAllocator,
    EqualAllocator,
    GaussianAllocator,
    OptimalAllocator,
    QueryAllocator,
    TraceSettings,
)  # fmt: skip
from flops_lightning.errors import SettingError
from flops_lightning.protocol import QueryBudget, SampleStatistics, TraceObservation

BUDGET = QueryBudget((20,))
PILOTS = TraceSettings(source="pilots")
COVARIANCES = ("cosine_distance", "cosine_similarity", "diagonal")
# With fixed sums: class and settings.
FIXED_SUM: list[tuple[type[QueryAllocator], dict[str, Any]]] = [
    (EqualAllocator, {}),
    (OptimalAllocator, {"traces": PILOTS}),
    *(
        (GaussianAllocator, {"gradient": gradient, "covariance": covariance})
        for gradient, covariance in itertools.product(("pathwise", "score", "exact"), COVARIANCES)
    ),
    (BernoulliAllocator, {}),
    (BernoulliAllocator, {"optimise": False}),
]
STATISTIC = st.one_of(st.floats(-1e3, 1e3), st.sampled_from([0.0, 1e-300, 1e38, 1e308, math.inf, -math.inf, math.nan]))


def batch(seed: int = 0, size: int = 48) -> SampleStatistics:
    generator = torch.Generator().manual_seed(seed)
    loss, noise, steep = (torch.randn(size, generator=generator).exp() for _ in range(3))
    return SampleStatistics(
        loss=loss, embedding=torch.randn(size, 8, generator=generator),
        trace=(0.1 + loss.tanh()).square() * noise.sqrt(), predictors={"top_gradient": steep},
        counted_costs=torch.ones(1),
    )  # fmt: skip


@given(data=st.data(), case=st.sampled_from(FIXED_SUM), size=st.integers(1, 12), multiple=st.sampled_from([1, 2, 3]))
@settings(deadline=None, max_examples=100)
def test_counts_meet_the_budget_whatever_the_statistics(
    data: st.DataObject, case: tuple[type[QueryAllocator], dict[str, Any]], size: int, multiple: int
) -> None:
    def column() -> Tensor:
        return torch.tensor(data.draw(st.lists(STATISTIC, min_size=size, max_size=size)), dtype=torch.float64)

    own, minimum = (data.draw(st.integers(low, 5)) * (case[0] is not EqualAllocator) for low in (1, 0))
    allocator, least = case[0](**case[1], **({"min_queries": own} if own else {})), max(own, minimum)
    fewest = max(1, -(-least // multiple))
    budget = QueryBudget((data.draw(st.integers(fewest, 12)) * multiple, 6 * multiple), multiple, minimum)
    for _ in range(2):
        embedding = torch.stack([column(), column()], dim=1)
        allocation = allocator.allocate(SampleStatistics(loss=column(), embedding=embedding, trace=column()), budget)
        assert allocation.counts.dtype == torch.int64
        assert allocation.counts.sum(dim=1).tolist() == [size * queries for queries in budget.queries_per_sample]
        assert bool((allocation.counts % multiple == 0).all())
        assert int(allocation.counts.min()) >= least
        assert all(math.isfinite(value) for value in allocation.diagnostics.values())


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        *((GaussianAllocator, {"gradient": gradient, "seed": 7}) for gradient in ("pathwise", "score", "exact")),
        (BernoulliAllocator, {"seed": 7}),
        (BernoulliAllocator, {"seed": 7, "optimise": False, "p": 0.4}),
        (OptimalAllocator, {}),
        (CostAwareAllocator, {}),
    ],
)
def test_a_resumed_allocator_continues_as_if_uninterrupted(cls: type[QueryAllocator], arguments: Any) -> None:
    def step(allocator: QueryAllocator, seed: int) -> Any:
        allocation = allocator.allocate(batch(seed), BUDGET)
        allocator.observe(TraceObservation(batch(seed + 100).trace[None], allocation.counts))  # type: ignore[index]
        return allocation

    whole, first, resumed = cls(**arguments), cls(**arguments), cls(**arguments)
    for seed in range(3):
        step(whole, seed)
        step(first, seed)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for seed in range(3, 6):
        one, other = step(whole, seed), step(resumed, seed)
        assert torch.equal(one.counts, other.counts)
        assert one.diagnostics == other.diagnostics


@pytest.mark.parametrize("cls", [GaussianAllocator, BernoulliAllocator])
def test_batches_that_do_not_converge_are_counted(cls: Any) -> None:
    allocator = cls(max_iterations=1)
    found = [allocator.allocate(batch(seed), BUDGET).diagnostics for seed in range(3)]
    assert [each["not_converged_total"] for each in found] == [1.0, 2.0, 3.0]
    assert {(each["converged"], each["iterations"]) for each in found} == {(0.0, 1.0)}
    assert allocator.state_dict()["not_converged"] == 3


@pytest.mark.parametrize(("cls", "arguments"), [(GaussianAllocator, {"max_iterations": 1}), (BernoulliAllocator, {})])
def test_draws_differ_between_batches_and_seeds(cls: Any, arguments: dict[str, Any]) -> None:
    def counts(seed: int, batches: int) -> Tensor:
        allocator = cls(seed=seed, **arguments)
        allocator.load_state_dict(allocator.state_dict() | {"batches": batches})
        return allocator.allocate(batch(), BUDGET).counts

    assert torch.equal(counts(0, 1), counts(0, 1))
    assert not torch.equal(counts(0, 0), counts(0, 1))
    assert not torch.equal(counts(0, 0), counts(1, 0))


@pytest.mark.parametrize("cls", [OptimalAllocator, CostAwareAllocator, GaussianAllocator, BernoulliAllocator])
def test_the_scale_of_traces_changes_nothing(cls: Any) -> None:
    statistics = batch(1)
    assert statistics.trace is not None
    found = []
    for scale in (1.0, 1e-100, 1e100):
        scaled = replace(statistics, trace=scale * statistics.trace.double())
        found.append(cls(traces=PILOTS).allocate(scaled, BUDGET).counts)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("cls", "arguments", "field"),
    [
        *((GaussianAllocator, {"gradient": gradient}, "embedding") for gradient in ("pathwise", "score")),
        *((GaussianAllocator, {"gradient": "exact"}, field) for field in ("loss", "embedding", "trace")),
        *((BernoulliAllocator, {}, field) for field in ("loss", "trace")),
        (BernoulliAllocator, {"optimise": False}, "loss"),
    ],
)
@pytest.mark.parametrize("minimum", [8, 15])
def test_broken_samples_get_the_minimum_and_spoil_no_other(cls: Any, arguments: Any, field: str, minimum: int) -> None:
    # Half of 48 samples with 20 queries each are broken and get the minimum, which leaves more for each of the others:
    # these are allocated as if they were a batch of their own.
    with_broken, alone = (cls(min_queries=minimum, **arguments) for _ in range(2))
    for seed in range(3):
        statistics = batch(seed)
        sound = {name: getattr(statistics, name)[::2].clone() for name in ("loss", "embedding", "trace")}
        getattr(statistics, field)[1::4] = math.nan
        getattr(statistics, field)[3::4] = math.inf
        allocation = with_broken.allocate(statistics, BUDGET)
        expected = alone.allocate(SampleStatistics(**sound), QueryBudget((40 - minimum,)))
        assert allocation.counts[0, 1::2].tolist() == [minimum] * 24
        assert torch.equal(allocation.counts[0, ::2], expected.counts[0])
        assert allocation.diagnostics.get("p") == expected.diagnostics.get("p")
        assert all(math.isfinite(value) for value in allocation.diagnostics.values())


@pytest.mark.parametrize(("cls", "learned"), [(GaussianAllocator, "parameters"), (BernoulliAllocator, "p")])
@pytest.mark.parametrize("trace", [0.0, -1.0])
def test_a_flat_batch_is_allocated_equally_and_changes_nothing(cls: Any, learned: str, trace: float) -> None:
    allocator = cls()
    allocator.allocate(batch(), BUDGET)
    before = allocator.state_dict()[learned]
    flat = SampleStatistics(loss=torch.rand(8), embedding=torch.randn(8, 3), trace=torch.full((8,), trace))
    allocation = allocator.allocate(flat, BUDGET)
    assert allocation.counts.tolist() == [[20] * 8]
    assert allocation.diagnostics["J_over_J_equal"] == 1.0
    assert allocator.state_dict()[learned] == before


FLOOR = r"min_queries = 30.*Lower `min_queries`.*`queries_per_sample` to 30"
EXACT, GIVEN = {"gradient": "exact"}, {"optimise": False}


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (GaussianAllocator, {"draws": 1}, "draws = 1: must be 2 or more"),
        (BernoulliAllocator, {"max_iterations": 0}, "max_iterations = 0: must be 1 or more"),
        (BernoulliAllocator, {"seed": -1}, "seed = -1: must be 0 or more"),
        (BernoulliAllocator, {"min_queries": 0}, "min_queries = 0: must be 1 or more"),
        (GaussianAllocator, {"min_queries": -1}, "min_queries = -1: must be 0 or more"),  # 0 is the paper's choice
        (OptimalAllocator, {"min_queries": -1}, "min_queries = -1: must be 0 or more"),
        (GaussianAllocator, EXACT | {"draws": 8}, "draws = 8: has no effect with gradient = 'exact'.*Remove `draws`"),
        (
            GaussianAllocator,
            EXACT | {"max_iterations": 8},
            "max_iterations = 8: has no .*Remove `max_iterations`",
        ),
        (BernoulliAllocator, GIVEN | {"draws": 8}, "draws = 8: has no effect with optimise = False.*Remove `draws`"),
        (BernoulliAllocator, GIVEN | {"max_iterations": 8}, "max_iterations = 8: has no effect with opti"),
        *((cls, {"min_queries": 30}, FLOOR) for cls in (OptimalAllocator, GaussianAllocator, BernoulliAllocator)),
    ],
)
def test_settings_without_sense_are_refused(cls: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        cls(**arguments).allocate(batch(), BUDGET)


def test_an_allocator_without_state_refuses_that_of_another() -> None:
    EqualAllocator().load_state_dict(EqualAllocator().state_dict())
    with pytest.raises(ValueError, match="beta0"):
        EqualAllocator().load_state_dict({"beta0": 1.0})
