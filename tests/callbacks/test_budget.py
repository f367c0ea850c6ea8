"""Budgets that are chosen at every step, through the callback and a task."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from flops_lightning.allocators import EqualAllocator, OptimalAllocator
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.errors import SettingError
from flops_lightning.strategies import PilotSpec
from flops_lightning.tasks import OptimizerSettings
from tests.digits import classifier, quiet_trainer, two_sites

RULE = {"rule": "improvement", "price": "queries", "least": 0.25, "every": 3}
BATCH, BATCHES = 16, 8


def images() -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH * BATCHES // 2, 1, 8, 8, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(len(x)) % 10), batch_size=BATCH)


def fit(**task: Any) -> Any:
    callback = QueryAllocatorCallback(allocator=OptimalAllocator(min_queries=0.25), budget=RULE)  # type: ignore[arg-type]
    module = classifier(**{"optimizer": OptimizerSettings(lr=1e-2), **task})
    trainer = quiet_trainer(callback, max_epochs=2, log_every_n_steps=1)
    trainer.fit(module, images())
    return trainer, module


def test_the_budget_follows_the_gradients_and_is_logged() -> None:
    trainer, module = fit()
    logged = {name: float(value) for name, value in trainer.logged_metrics.items() if name.startswith("budget/")}
    assert set(logged) == {"budget/A", "budget/body", "budget/head", "budget/T_over_S"}
    assert all(0.25 <= logged[f"budget/{name}"] <= 64 and logged[f"budget/{name}"] != 4 for name in ("body", "head"))
    # Each of these first steps is measured, for two clean passes.
    total = module.strategy.meter.total()
    assert total.clean_passes == BATCH * 3 * BATCHES


@pytest.mark.parametrize("update", ["simultaneous", "site_by_site"])
@pytest.mark.parametrize("metric", ["parameters", "preconditioned"])
def test_what_the_task_measures_is_the_gradient_it_steps_with(update, metric) -> None:
    seen = []

    class Watching(QueryAllocatorCallback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            grads = {n: p.grad.clone() for n, p in pl_module.network.trainable().items() if p.grad is not None}
            seen.append((pl_module.gradient_observation(), grads, pl_module._squared_steps()))
            super().on_train_batch_end(trainer, pl_module, *rest)

    task = classifier(strategy=two_sites(update=update, exact_head=update == "simultaneous"))
    callback = Watching(allocator=EqualAllocator(), budget={**RULE, "metric": metric})  # type: ignore[arg-type]
    quiet_trainer(callback, limit_train_batches=2).fit(task, images())
    observation, grads, weights = seen[1]
    names = [site.name for site in task.strategy.sites]
    assert names == (["body"] if update == "simultaneous" else ["body", "head"])
    for i, site in enumerate(task.strategy.sites[:1]):  # of sites in turn the last gradient is the lowest one's
        own = {name: grads[name].square() for name in site.parameters}
        if metric == "parameters":  # (the optimiser's second moments have moved on since)
            expected = sum(float(square.double().sum()) for square in own.values())
            assert float(observation.sq_norms[i]) == pytest.approx(expected, rel=1e-5)
        else:
            assert float(observation.sq_norms[i]) > float(sum((own[n]).sum() for n in own))
    assert (observation.exact_sq_norm > 0) is (update == "simultaneous")
    assert observation.along != 0
    assert weights


def test_what_does_not_go_together() -> None:
    cases = [
        ({"strategy": two_sites(8, pilots=PilotSpec(sites=["body"], queries=2))}, "pilots"),
        ({"optimizer": OptimizerSettings(accumulate_grad_batches=2)}, "accumulate_grad_batches"),
    ]
    for task, message in cases:
        with pytest.raises(SettingError, match=message):
            fit(**task)
    with pytest.raises(SettingError, match="has no effect with rule: fixed"):
        QueryAllocatorCallback(allocator=EqualAllocator(), budget={"price": "queries"})  # type: ignore[arg-type]
