"""Several batches that make one step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from flops_lightning.errors import SettingError
from flops_lightning.optim.optimizers import OptimizerSettings
from flops_lightning.strategies import Backprop
from flops_lightning.tasks import ForwardImageClassifier
from tests.digits import two_sites

Make = Callable[..., Any]


def images(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    pictures = torch.randn(count, 1, 8, 8, generator=generator, dtype=torch.float64)
    return TensorDataset(pictures, torch.arange(count) % 10)


def fitted(make_task: Make, make_trainer: Make, *, batch_size: int, accumulate: int, **settings: Any) -> Any:
    optimizer = OptimizerSettings(lr=1e-2, accumulate_grad_batches=accumulate, **settings)
    task: ForwardImageClassifier = make_task(strategy=Backprop(), optimizer=optimizer)
    trainer = make_trainer(limit_train_batches=1.0, limit_val_batches=0, max_epochs=2, precision="64-true")
    trainer.fit(task.double(), DataLoader(images(22), batch_size=batch_size))
    return trainer, {name: p.detach().clone() for name, p in task.backbone.named_parameters()}


def test_small_batches_make_the_step_of_a_large_one(make_task, make_trainer):
    # Batches of 4, 4 and 4, then 4, 4 and 2: each counts by its samples.
    small, several = fitted(make_task, make_trainer, batch_size=4, accumulate=3)
    large, once = fitted(make_task, make_trainer, batch_size=12, accumulate=1)
    assert small.global_step == large.global_step == 4
    for name, value in once.items():
        assert torch.allclose(several[name], value, rtol=1e-9, atol=1e-12), name


def test_an_epoch_ends_with_a_step_and_the_schedule_counts_steps(make_task, make_trainer):
    # Six batches in steps of 4: four, then two, twice over; the cosine ends with the last of the four steps.
    trainer, _ = fitted(make_task, make_trainer, batch_size=4, accumulate=4, schedule="cosine")
    assert trainer.global_step == 4
    (schedule,) = (config.scheduler for config in trainer.lr_scheduler_configs)
    assert schedule.last_epoch == 4
    assert schedule.get_last_lr() == pytest.approx([0.0])


def test_steps_site_by_site_cannot_wait(make_task, make_trainer):
    task = make_task(strategy=two_sites(update="site_by_site"), optimizer=OptimizerSettings(accumulate_grad_batches=2))
    with pytest.raises(SettingError, match=r"accumulate_grad_batches = 2: .*site_by_site"):
        make_trainer().fit(task, DataLoader(images(8), batch_size=4))
