from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flops_lightning.allocators import (
    Allocation,
    EqualAllocator,
    GaussianAllocator,
    QueryAllocator,
    QueryBudget,
    SampleStatistics,
)
from flops_lightning.allocators.threads import one_thread
from flops_lightning.callbacks import QueryAllocatorCallback, query_allocator
from flops_lightning.callbacks.query_allocator import resolve_budget
from flops_lightning.errors import SettingError

BATCH, BATCHES = 8, 4


@pytest.fixture(autouse=True)
def _quiet_and_on_one_thread(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    for name in ("lightning.pytorch", "lightning.fabric"):
        caplog.set_level(logging.ERROR, logger=name)
    with one_thread():
        yield


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
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **settings,
    )


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
    logged = {
        k.removeprefix("allocation/"): v for k, v in trainer.logged_metrics.items() if k.startswith("allocation/")
    }
    assert logged["count_max"] == counts[-1].max()
    assert logged["beta1"] == pytest.approx(parameters.beta1, rel=1e-6)
    assert set(logged) == {
        *("beta0", "beta1", "sigma", "gamma", "iterations", "converged", "not_converged_total"),
        *("J_over_J_equal", "count_min", "count_max"),
    }


def test_statistics_are_taken_without_autograd_and_under_the_precision_of_the_run() -> None:
    module = Foreign()
    callback = QueryAllocatorCallback(allocator=EqualAllocator(), queries_per_sample=4)
    make_trainer(callback, precision="bf16-mixed").fit(module, loader())
    assert module.modes == [(False, True)] * BATCHES


def test_nothing_is_logged_if_asked() -> None:
    callback = QueryAllocatorCallback(allocator=GaussianAllocator(), queries_per_sample=4, log=False)
    trainer = make_trainer(callback)
    trainer.fit(Foreign(), loader())
    assert not [name for name in trainer.logged_metrics if name.startswith("allocation/")]


def run(folder: Path, *, crash: bool = False, resume: bool = False) -> tuple[Foreign, GaussianAllocator]:
    pl.seed_everything(0, verbose=False)
    module, allocator = Foreign(QueryBudget((20, 6))), GaussianAllocator(seed=3)
    callbacks = [
        QueryAllocatorCallback(allocator=allocator),
        ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}"),
    ]
    trainer = make_trainer(*callbacks, *([Crash()] if crash else []), max_epochs=3, enable_checkpointing=True)
    trainer.fit(
        module,
        loader(),
        ckpt_path=str(folder / "epoch=0.ckpt") if resume else None,
        weights_only=True if resume else None,
    )
    return module, allocator


def test_crash_and_resume_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    whole, whole_allocator = run(tmp_path / "whole")
    with pytest.raises(RuntimeError, match="went down"):
        run(tmp_path / "parts", crash=True)
    parts, parts_allocator = run(tmp_path / "parts", resume=True)

    assert len(parts.counts) == 2 * BATCHES
    assert torch.equal(torch.stack(whole.counts[BATCHES:]), torch.stack(parts.counts))
    assert whole_allocator.state_dict() == parts_allocator.state_dict()
    assert parts_allocator.state_dict()["batches"] == 3 * BATCHES


def test_state_is_kept_under_the_allocators_name(tmp_path: Path) -> None:
    run(tmp_path)
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["callbacks"]
    assert saved["QueryAllocatorCallback[GaussianAllocator]"]["batches"] == 2 * BATCHES
    assert QueryAllocatorCallback(allocator=EqualAllocator()).state_key == "QueryAllocatorCallback[EqualAllocator]"


def test_module_without_the_protocol_is_refused_before_training() -> None:
    class Half(Plain):
        def set_query_counts(self, counts: Tensor) -> None:
            raise AssertionError("never reached")

    callback = QueryAllocatorCallback(allocator=EqualAllocator(), queries_per_sample=4)
    with pytest.raises(SettingError, match="Plain") as both:
        make_trainer(callback).fit(Plain(), loader())
    assert "def sample_statistics(self, batch) -> SampleStatistics" in both.value.remedy
    assert "def set_query_counts(self, counts: Tensor) -> None" in both.value.remedy
    with pytest.raises(SettingError, match="Half") as one:
        make_trainer(callback).fit(Half(), loader())
    assert "sample_statistics" in one.value.remedy
    assert "set_query_counts" not in one.value.remedy


def test_module_without_the_protocol_may_be_evaluated() -> None:
    class Tested(Plain):
        def test_step(self, batch: list[Tensor]) -> None:
            self.log("seen", 1.0)

    callback = QueryAllocatorCallback(allocator=EqualAllocator(), queries_per_sample=4)
    assert make_trainer(callback).test(Tested(), loader(), verbose=False) == [{"seen": 1.0}]


def test_two_allocators_are_refused() -> None:
    callbacks = [
        QueryAllocatorCallback(allocator=allocator, queries_per_sample=4)
        for allocator in (EqualAllocator(), GaussianAllocator())
    ]
    with pytest.raises(SettingError, match=r"EqualAllocator.*GaussianAllocator.*Keep one") as caught:
        make_trainer(*callbacks).fit(Foreign(), loader())
    assert caught.value.setting == "trainer.callbacks"


def test_statistics_of_another_kind_are_refused() -> None:
    class Loose(Foreign):
        def sample_statistics(self, batch: list[Tensor]) -> Any:
            return {"loss": batch[0][:, 0]}

    callback = QueryAllocatorCallback(allocator=EqualAllocator(), queries_per_sample=4)
    with pytest.raises(SettingError, match=r"sample_statistics = 'dict'.*SampleStatistics"):
        make_trainer(callback).fit(Loose(), loader())


def test_a_statistic_that_the_allocator_needs_is_named_at_the_first_batch() -> None:
    class Wants(QueryAllocator):
        requires = frozenset({"embedding"})

        def allocate(self, statistics: SampleStatistics, budget: QueryBudget) -> Allocation:
            raise AssertionError("never reached")

    class Bare(Foreign):
        def sample_statistics(self, batch: list[Tensor]) -> SampleStatistics:
            return SampleStatistics(loss=batch[0][:, 0])

    callback = QueryAllocatorCallback(allocator=Wants(), queries_per_sample=4)
    with pytest.raises(SettingError, match=r"Wants.*`embedding`"):
        make_trainer(callback).fit(Bare(), loader())


def test_nobody_says_the_budget() -> None:
    with pytest.raises(SettingError, match="QueryAllocatorCallback, or return `budget=QueryBudget") as caught:
        make_trainer(QueryAllocatorCallback(allocator=EqualAllocator())).fit(Foreign(), loader())
    assert caught.value.setting == "queries_per_sample"


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
    ("queries", "multiple", "setting"),
    [(10, 1, "queries_per_sample"), (20, 1, "queries_per_sample"), (0, 3, "multiple")],
)
def test_budgets_that_differ_are_refused(queries: int, multiple: int, setting: str) -> None:
    with pytest.raises(SettingError, match="Remove it from the callback") as caught:
        resolve_budget(QueryBudget((20, 6), 2), queries_per_sample=queries, multiple=multiple)
    assert caught.value.setting == setting


@pytest.mark.parametrize(("queries", "multiple"), [(-1, 1), (3, 2), (0, 0), (4, -2)])
def test_impossible_settings_are_refused(queries: int, multiple: int) -> None:
    with pytest.raises(SettingError):
        QueryAllocatorCallback(allocator=EqualAllocator(), queries_per_sample=queries, multiple=multiple)


def imported_modules(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def test_callback_knows_no_task_and_allocators_know_no_lightning() -> None:
    package = Path(query_allocator.__file__).parents[1]
    allowed = ("flops_lightning.allocators", "flops_lightning.errors")
    own = {name for name in imported_modules(package / "callbacks/query_allocator.py") if "flops_lightning" in name}
    assert own == set(allowed)
    files = list((package / "allocators").glob("*.py"))
    assert len(files) >= 9
    for file in files:
        names = imported_modules(file)
        assert not [name for name in names if name.startswith("lightning")]
        assert all(name.startswith(allowed) for name in names if name.startswith("flops_lightning"))
