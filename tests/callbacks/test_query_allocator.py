from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
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


class Crash(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.current_epoch == 1 and trainer.global_step == BATCHES + 2:
            raise RuntimeError("the machine went down")


def loader() -> DataLoader[tuple[Tensor, ...]]:
    features = torch.randn(BATCH * BATCHES, 3, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(features), batch_size=BATCH)


def make_trainer(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    settings = {"max_epochs": 1, "logger": False, "enable_checkpointing": False} | settings
    return pl.Trainer(
        accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
        **settings,
    )  # fmt: skip


def test_counts_reach_the_module_before_every_step() -> None:
    module = Foreign()
    callback = QueryAllocatorCallback(allocator=GaussianAllocator(), queries_per_sample=10, multiple=2)
    trainer = make_trainer(callback)
    trainer.fit(module, loader())

    assert module.events == ["statistics", "counts", "step"] * BATCHES
    counts = torch.cat(module.counts)
    assert counts.shape == (BATCHES, BATCH)
    assert counts.sum(dim=1).tolist() == [10 * BATCH] * BATCHES
    assert bool((counts % 2 == 0).all())
    assert int(counts.min()) >= 2
    assert all(len(row.unique()) > 1 for row in counts)
    parameters = callback.allocator.parameters
    assert parameters is not None
    logged = {name: value for name, value in trainer.logged_metrics.items() if name.startswith("allocation")}
    assert logged["allocation/count_max"] == counts[-1].max()
    assert logged["allocation_details/beta1"] == pytest.approx(parameters.beta1, rel=1e-6)
    details = ("beta0", "beta1", "sigma", "gamma", "iterations", "converged", "not_converged_total")
    first = ("J_over_J_equal", "count_min", "count_max")
    assert set(logged) == {f"allocation_details/{each}" for each in details} | {f"allocation/{each}" for each in first}


def test_statistics_are_taken_without_autograd_and_under_the_precision_of_the_run() -> None:
    module = Foreign()
    callback = QueryAllocatorCallback(allocator=EqualAllocator(), queries_per_sample=4)
    make_trainer(callback, precision="bf16-mixed").fit(module, loader())
    assert module.modes == [(False, True)] * BATCHES


@pytest.mark.parametrize("kind", [Foreign, Telling], ids=["untold", "told"])
def test_nothing_is_logged_if_asked(kind: type[Foreign]) -> None:
    callback = QueryAllocatorCallback(allocator=GaussianAllocator(), queries_per_sample=4, log=False)
    trainer = make_trainer(callback, log_every_n_steps=1)
    trainer.fit(kind(), loader())
    assert not [name for name in trainer.logged_metrics if name.startswith("allocation")]


@pytest.mark.parametrize("log", [True, False])
def test_a_module_hears_once_what_is_read_and_whether_to_tell(log: bool) -> None:
    def requested(allocator: QueryAllocator) -> list[frozenset[str]]:
        module = Telling()
        make_trainer(QueryAllocatorCallback(allocator=allocator, queries_per_sample=4, log=log)).fit(module, loader())
        assert module.events[0] == "request"
        return module.requested

    # To be watched is reason enough to tell; without that only allocators that learn ask for it.
    watched = {"observation"} if log else set()
    assert requested(EqualAllocator()) == [watched]
    assert requested(GaussianAllocator()) == [{"trace", "trace_queries", "embedding"} | watched]
    assert requested(Learning()) == [{"predictors.size", "observation"}]
    assert requested(OptimalAllocator()) == [{"predictors", "observation"}]


@pytest.mark.parametrize("log", [True, False])
def test_what_a_step_showed_is_taught_before_the_next_allocation(log: bool) -> None:
    module, allocator = Telling(), Learning()
    make_trainer(QueryAllocatorCallback(allocator=allocator, queries_per_sample=4, log=log)).fit(module, loader())
    assert module.events == ["request", *(["statistics", "counts", "step", "told"] * BATCHES)]
    assert [id(each) for each in allocator.observed] == [id(each) for each in module.told if each is not None]
    assert len(allocator.observed) == BATCHES - 1


def test_a_learning_allocator_changes_its_counts() -> None:
    def counts(telling: bool) -> list[Tensor]:
        module = Telling()
        if not telling:
            module.trace_observation = lambda: None  # type: ignore[method-assign]
        make_trainer(QueryAllocatorCallback(allocator=OptimalAllocator(), queries_per_sample=9)).fit(module, loader())
        return module.counts

    told, untold = counts(True), counts(False)
    assert len(torch.cat(untold).unique()) == 1  # it knows of no difference between samples
    assert torch.equal(told[0], untold[0])
    assert all(len(row.unique()) > 1 for row in told[1:])


def test_weights_of_pilots_reach_the_module_with_the_counts() -> None:
    module = Telling()
    allocator = OptimalAllocator(traces=BOTH)
    make_trainer(QueryAllocatorCallback(allocator=allocator, queries_per_sample=6)).fit(module, loader())
    assert module.events == ["request", *(["statistics", "counts", "weights", "step", "told"] * BATCHES)]
    # n / (n + A), with the A that the prediction would give: of four pilots and six other queries on average.
    expected = [4.0 / weights.double() - 4.0 for weights in module.weights]
    assert [float(queries.sum()) for queries in expected] == pytest.approx([6.0 * BATCH] * BATCHES)


def test_what_is_watched_is_of_the_step_that_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    module, watched = Telling(), []
    monkeypatch.setattr(
        allocation_monitor.AllocationMonitor, "watch", lambda self, trainer, *given, **_: watched.append(given) or {}
    )
    callback = QueryAllocatorCallback(allocator=GaussianAllocator(), queries_per_sample=4)
    make_trainer(callback, log_every_n_steps=1).fit(module, loader())
    (images,) = loader().dataset.tensors  # type: ignore[attr-defined]
    for i, (statistics, allocation, observation, batch) in enumerate(watched):
        assert allocation.counts is module.counts[i]
        assert observation is module.told[i]
        assert torch.equal(batch[0], images[i * BATCH : (i + 1) * BATCH])
        assert torch.equal(statistics.embedding, batch[0])
    assert len(watched) == BATCHES


def run(folder: Path, *, crash: bool = False, resume: bool = False) -> tuple[Foreign, GaussianAllocator]:
    pl.seed_everything(0, verbose=False)
    module, allocator = Foreign(QueryBudget((20, 6))), GaussianAllocator(seed=3)
    keep = ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")
    callbacks = [QueryAllocatorCallback(allocator=allocator), keep, *([Crash()] if crash else [])]
    start: Any = {"ckpt_path": folder / "epoch=0.ckpt", "weights_only": True} if resume else {}
    make_trainer(*callbacks, max_epochs=3, enable_checkpointing=True).fit(module, loader(), **start)
    return module, allocator


def test_crash_and_resume_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    whole, whole_allocator = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="went down"):
        run(tmp_path / "parts", crash=True)
    parts, parts_allocator = run(tmp_path / "parts", resume=True)
    saved = torch.load(tmp_path / "whole" / "epoch=1.ckpt", weights_only=True)["callbacks"]
    assert saved["QueryAllocatorCallback[GaussianAllocator]"]["batches"] == 2 * BATCHES
    assert len(parts.counts) == 2 * BATCHES
    assert torch.equal(torch.stack(whole.counts[BATCHES:]), torch.stack(parts.counts))
    assert whole_allocator.state_dict() == parts_allocator.state_dict()
    assert parts_allocator.state_dict()["batches"] == 3 * BATCHES


def test_module_without_the_protocol_may_be_evaluated() -> None:
    class Tested(Plain):
        def test_step(self, batch: list[Tensor]) -> None:
            self.log("seen", 1.0)

    callback = QueryAllocatorCallback(allocator=EqualAllocator(), queries_per_sample=4)
    assert make_trainer(callback).test(Tested(), loader(), verbose=False) == [{"seen": 1.0}]


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
        make_trainer(QueryAllocatorCallback(allocator=allocator, queries_per_sample=4)).fit(module, loader())
    assert "step" not in getattr(module, "events", [])


def test_two_allocators_are_refused() -> None:
    allocators = (EqualAllocator(), GaussianAllocator())
    callbacks = [QueryAllocatorCallback(allocator=allocator, queries_per_sample=4) for allocator in allocators]
    with pytest.raises(SettingError, match=r"EqualAllocator.*GaussianAllocator.*Keep one") as caught:
        make_trainer(*callbacks).fit(Foreign(), loader())
    assert caught.value.setting == "trainer.callbacks"


@pytest.mark.parametrize(
    ("own", "queries", "multiple", "expected"),
    [
        (None, 20, 1, QueryBudget((20,))),
        (None, 20, 2, QueryBudget((20,), 2)),
        (QueryBudget((20, 6), 2), 0, 1, QueryBudget((20, 6), 2)),
        (QueryBudget((20, 20), 2), 20, 1, QueryBudget((20, 20), 2)),
        (QueryBudget((20, 20), 2), 20, 2, QueryBudget((20, 20), 2)),
    ],
)
def test_budgets_that_agree(own: QueryBudget | None, queries: int, multiple: int, expected: QueryBudget) -> None:
    assert resolve_budget(own, queries_per_sample=queries, multiple=multiple) == expected


@pytest.mark.parametrize(
    ("own", "queries", "multiple", "message"),
    [
        (QueryBudget((20, 6), 2), 10, 1, "queries_per_sample = 10: differs .*Remove it from the callback"),
        (QueryBudget((20, 6), 2), 20, 1, "queries_per_sample = 20: differs .*Remove it from the callback"),
        (QueryBudget((20, 6), 2), 0, 3, "multiple = 3: differs .*Remove it from the callback"),
        (None, 0, 1, "queries_per_sample = 0: neither .* QueryAllocatorCallback, or return `budget=QueryBudget"),
    ],
)
def test_budgets_that_differ_or_are_missing_are_refused(own: Any, queries: int, multiple: int, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        resolve_budget(own, queries_per_sample=queries, multiple=multiple)


@pytest.mark.parametrize(("queries", "multiple"), [(-1, 1), (3, 2), (0, 0), (4, -2)])
def test_impossible_settings_are_refused(queries: int, multiple: int) -> None:
    with pytest.raises(SettingError):
        QueryAllocatorCallback(allocator=EqualAllocator(), queries_per_sample=queries, multiple=multiple)


@pytest.mark.parametrize(("every", "watched"), [(3, [3, 6, 9, 12]), (5, [5, 10]), (0, [])])
def test_steps_to_watch_are_counted_over_epochs_as_the_loggers_do(
    every: int, watched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr(
        allocation_monitor.AllocationMonitor, "watch", lambda self, run, *rest, **_: steps.append(run.global_step) or {}
    )
    callback = QueryAllocatorCallback(allocator=EqualAllocator(), queries_per_sample=4)
    make_trainer(callback, max_epochs=3, log_every_n_steps=every).fit(Foreign(), loader())
    assert steps == watched
