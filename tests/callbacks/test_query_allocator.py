from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flops_lightning.allocators import (
    EqualAllocator,
    GaussianAllocator,
    OptimalAllocator,
    QueryAllocator,
    TraceSettings,
)
from flops_lightning.callbacks import QueryAllocatorCallback, allocation_monitor
from flops_lightning.callbacks.query_allocator import resolve_budget
from flops_lightning.errors import SettingError
from flops_lightning.protocol import QueryBudget, SampleStatistics, TraceObservation
from tests.digits import quiet_trainer

BATCH, BATCHES = 8, 4
BOTH = TraceSettings(source="both")


class Plain(pl.LightningModule):
    """A module that trains, and knows nothing of queries."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.layer = nn.Linear(3, 1)

    def training_step(self, batch: list[Tensor]) -> None:
        self.layer.weight.grad = torch.ones_like(self.layer.weight)
        self.optimizers().step()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.layer.parameters(), lr=0.1)


class Foreign(Plain):
    """A module with the protocol, whose statistics depend on the batch and on the weights of the moment."""

    def __init__(self, budget: QueryBudget | None = None) -> None:
        super().__init__()
        self.budget = budget
        self.events: list[str] = []
        self.counts: list[Tensor] = []
        self.modes: list[tuple[bool, bool]] = []

    def sample_statistics(self, batch: list[Tensor]) -> SampleStatistics:
        self.events.append("statistics")
        self.modes.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        (features,) = batch
        loss = self.layer(features)[:, 0].float().square()
        return SampleStatistics(
            loss=loss, embedding=features, trace=(loss.tanh() + 0.1) ** 2 * features[:, 0].exp(), budget=self.budget
        )

    def set_query_counts(self, counts: Tensor) -> None:
        self.events.append("counts")
        self.counts.append(counts)

    def training_step(self, batch: list[Tensor]) -> None:
        self.events.append("step")
        super().training_step(batch)


class Telling(Foreign):
    """A module that also tells what its queries showed, except in the second step, and takes pilot weights."""

    def __init__(self, budget: QueryBudget | None = None) -> None:
        super().__init__(budget)
        self.requested: list[frozenset[str]] = []
        self.told: list[TraceObservation | None] = []
        self.weights: list[Tensor] = []

    def sample_statistics(self, batch: list[Tensor]) -> SampleStatistics:
        statistics = super().sample_statistics(batch)
        self.loss = statistics.loss
        return replace(statistics, trace_queries=torch.full((BATCH,), 4), predictors={"size": statistics.loss + 1})

    def request_statistics(self, names: frozenset[str]) -> None:
        self.events.append("request")
        self.requested.append(names)

    def trace_observation(self) -> TraceObservation | None:
        self.events.append("told")
        seen = TraceObservation(self.loss[None] + 0.1, self.counts[-1].float())
        self.told.append(None if len(self.told) == 1 else seen)
        return self.told[-1]

    def set_pilot_weights(self, weights: Tensor) -> None:
        self.events.append("weights")
        self.weights.append(weights)


class Learning(EqualAllocator):
    """Allocates equally, and remembers what it observed."""

    learns = True
    requests = frozenset({"predictors.size"})

    def __init__(self) -> None:
        self.observed: list[TraceObservation] = []

    def observe(self, observation: TraceObservation) -> None:
        self.observed.append(observation)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    features = torch.randn(BATCH * BATCHES, 3, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(features), batch_size=BATCH)


def fit(module: Plain, allocator: QueryAllocator, trainer: Any = None, **settings: Any) -> pl.Trainer:
    settings = {"queries_per_sample": 4, **settings}
    run = quiet_trainer(QueryAllocatorCallback(allocator=allocator, **settings), **(trainer or {}))
    run.fit(module, loader())
    return run


def test_counts_reach_the_module_before_every_step_and_are_logged() -> None:
    module, allocator = Foreign(), GaussianAllocator()
    run = fit(module, allocator, {"precision": "bf16-mixed"}, queries_per_sample=10, multiple=2)
    assert module.events == ["statistics", "counts", "step"] * BATCHES
    assert module.modes == [(False, True)] * BATCHES  # without autograd, and under the precision of the run
    counts = torch.cat(module.counts)
    assert counts.shape == (BATCHES, BATCH)
    assert counts.sum(dim=1).tolist() == [10 * BATCH] * BATCHES
    assert bool((counts % 2 == 0).all())
    assert int(counts.min()) >= 2
    assert all(len(row.unique()) > 1 for row in counts)
    assert allocator.parameters is not None
    logged = {name: value for name, value in run.logged_metrics.items() if name.startswith("allocation")}
    assert logged["allocation/count_max"] == counts[-1].max()
    assert logged["allocation_details/beta1"] == pytest.approx(allocator.parameters.beta1, rel=1e-6)
    details = ("beta0", "beta1", "sigma", "gamma", "iterations", "converged", "not_converged_total")
    first = ("J_over_J_equal", "count_min", "count_max")
    assert set(logged) == {f"allocation_details/{each}" for each in details} | {f"allocation/{each}" for each in first}


@pytest.mark.parametrize("log", [True, False])
def test_a_module_hears_once_what_is_read_and_whether_to_tell_and_all_is_logged_or_nothing(log: bool) -> None:
    def requested(allocator: QueryAllocator) -> list[frozenset[str]]:
        module = Telling()
        run = fit(module, allocator, {"log_every_n_steps": 1}, log=log)
        assert any(name.startswith("allocation") for name in run.logged_metrics) is log
        assert module.events[0] == "request"
        return module.requested

    # To be watched is reason enough to tell; without that only allocators that learn ask for it.
    watched = {"observation"} if log else set()
    assert requested(EqualAllocator()) == [watched]
    assert requested(GaussianAllocator()) == [{"trace", "trace_queries", "embedding"} | watched]
    assert requested(Learning()) == [{"predictors.size", "observation"}]
    assert requested(OptimalAllocator()) == [{"predictors", "observation"}]


def test_an_allocator_learns_from_a_step_before_the_next_allocation() -> None:
    module, allocator = Telling(), Learning()
    fit(module, allocator, log=False)
    assert module.events == ["request", *(["statistics", "counts", "step", "told"] * BATCHES)]
    assert [id(each) for each in allocator.observed] == [id(each) for each in module.told if each is not None]
    assert len(allocator.observed) == BATCHES - 1


def test_a_learning_allocator_changes_its_counts() -> None:
    def counts(telling: bool) -> list[Tensor]:
        module = Telling()
        if not telling:
            module.trace_observation = lambda: None  # type: ignore[method-assign]
        fit(module, OptimalAllocator(), queries_per_sample=9)
        return module.counts

    told, untold = counts(True), counts(False)
    assert len(torch.cat(untold).unique()) == 1  # it knows of no difference between samples
    assert torch.equal(told[0], untold[0])
    assert all(len(row.unique()) > 1 for row in told[1:])


def test_weights_of_pilots_reach_the_module_with_the_counts() -> None:
    module = Telling()
    fit(module, OptimalAllocator(traces=BOTH), queries_per_sample=6)
    assert module.events == ["request", *(["statistics", "counts", "weights", "step", "told"] * BATCHES)]
    # n / (n + A), with the A that the prediction would give: of four pilots and six other queries on average.
    expected = [4.0 / weights.double() - 4.0 for weights in module.weights]
    assert [float(queries.sum()) for queries in expected] == pytest.approx([6.0 * BATCH] * BATCHES)


@pytest.mark.parametrize(("every", "watched_steps"), [(1, range(1, 13)), (3, [3, 6, 9, 12]), (5, [5, 10]), (0, [])])
def test_what_is_watched_is_of_the_step_that_was_made_counted_over_epochs_as_the_loggers_do(
    every: int, watched_steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, watched = Telling(), []
    monkeypatch.setattr(
        allocation_monitor.AllocationMonitor, "watch",
        lambda self, trainer, *given, **_: watched.append((trainer.global_step, *given)) or {},
    )  # fmt: skip
    fit(module, GaussianAllocator(), {"max_epochs": 3, "log_every_n_steps": every})
    assert [step for step, *_ in watched] == list(watched_steps)
    (images,) = loader().dataset.tensors  # type: ignore[attr-defined]
    for step, statistics, allocation, observation, batch in watched:
        assert allocation.counts is module.counts[step - 1]
        assert observation is module.told[step - 1]
        assert torch.equal(batch[0], images.view(BATCHES, BATCH, 3)[(step - 1) % BATCHES])
        assert torch.equal(statistics.embedding, batch[0])


def test_module_without_the_protocol_may_be_evaluated() -> None:
    class Tested(Plain):
        def test_step(self, batch: list[Tensor]) -> None:
            self.log("seen", 1.0)

    callback = QueryAllocatorCallback(allocator=EqualAllocator(), queries_per_sample=4)
    assert quiet_trainer(callback).test(Tested(), loader(), verbose=False) == [{"seen": 1.0}]


class Deaf(Telling):
    set_pilot_weights = None  # type: ignore[assignment]


class Half(Plain):
    set_query_counts = print


class Loose(Foreign):
    def sample_statistics(self, batch: list[Tensor]) -> Any:
        return {"loss": batch[0][:, 0]}


class Wants(EqualAllocator):
    requires = frozenset({"predictors"})


@pytest.mark.parametrize(
    ("kind", "allocator", "message"),
    [
        (
            Plain,
            EqualAllocator(),
            r"'Plain': .*sample_statistics\(self, batch\) -> Sam.*; def set_query_counts\(self, c",
        ),
        (Half, EqualAllocator(), "model = 'Half': .* Add to the module: def sample_statistics[^;]*$"),
        (Foreign, OptimalAllocator(), r"'OptimalAllocator': .*Foreign.*def trace_observation\(self\).*{source: pil"),
        (Deaf, OptimalAllocator(traces=BOTH), r"'both': .*Deaf.*def set_pilot_weights\(self, weights: Tensor\)"),
        (Loose, EqualAllocator(), "sample_statistics = 'dict'.*SampleStatistics"),
        (Foreign, Wants(), "allocator = 'Wants': needs the statistic `predictors`"),
    ],
)
def test_modules_without_what_is_needed_are_refused_before_a_step(kind: Any, allocator: Any, message: str) -> None:
    module = kind()
    with pytest.raises(SettingError, match=message):
        fit(module, allocator)
    assert "step" not in getattr(module, "events", [])


def test_two_allocators_are_refused() -> None:
    allocators = (EqualAllocator(), GaussianAllocator())
    callbacks = [QueryAllocatorCallback(allocator=allocator, queries_per_sample=4) for allocator in allocators]
    with pytest.raises(SettingError, match=r"EqualAllocator.*GaussianAllocator.*Keep one") as caught:
        quiet_trainer(*callbacks).fit(Foreign(), loader())
    assert caught.value.setting == "trainer.callbacks"


OWN = QueryBudget((20, 6), 2)
EQUAL = QueryBudget((20, 20), 2)


@pytest.mark.parametrize(
    ("own", "queries", "multiple", "expected"),
    [
        (None, 20, 1, QueryBudget((20,))), (None, 20, 2, QueryBudget((20,), 2)),
        (OWN, 0, 1, OWN), (EQUAL, 20, 1, EQUAL), (EQUAL, 20, 2, EQUAL),
        (OWN, 10, 1, "queries_per_sample = 10: differs .*Remove it from the callback"),
        (OWN, 20, 1, "queries_per_sample = 20: differs .*Remove it from the callback"),
        (OWN, 0, 3, "multiple = 3: differs .*Remove it from the callback"),
        (None, 0, 1, "queries_per_sample = 0: neither .* QueryAllocatorCallback, or return `budget=QueryBudget"),
    ],
)  # fmt: skip
def test_a_budget_is_the_modules_or_the_callbacks_and_both_must_agree(
    own: QueryBudget | None, queries: int, multiple: int, expected: QueryBudget | str
) -> None:
    if isinstance(expected, str):
        with pytest.raises(SettingError, match=expected):
            resolve_budget(own, queries_per_sample=queries, multiple=multiple)
    else:
        assert resolve_budget(own, queries_per_sample=queries, multiple=multiple) == expected


@pytest.mark.parametrize(("queries", "multiple"), [(-1, 1), (3, 2), (0, 0), (4, -2)])
def test_impossible_settings_are_refused(queries: int, multiple: int) -> None:
    with pytest.raises(SettingError, match="must be"):
        QueryAllocatorCallback(allocator=EqualAllocator(), queries_per_sample=queries, multiple=multiple)
