import math
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from flops_lightning.errors import SettingError
from flops_lightning.tasks import OptimizerSettings, SpendSettings
from tests.digits import classifier, quiet_trainer

BATCH = 8
STEP = 2 * 4 * BATCH  # queries of a step: two sites, four of each sample


def run(spend: dict[str, Any], **settings: Any) -> Any:
    x = torch.randn(4 * BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    task = classifier(optimizer=OptimizerSettings(lr=0.1, schedule="cosine"), spend=spend)
    rates: list[float] = []
    log_batch = task.log_batch
    task.log_batch = lambda *given: (rates.append(task._optimizer().param_groups[0]["lr"]), log_batch(*given))
    trainer = quiet_trainer(**{"max_epochs": -1, **settings})
    trainer.fit(task, DataLoader(TensorDataset(x, torch.arange(len(x)) % 10), batch_size=BATCH))
    return trainer, task.strategy.meter.total(), rates


def test_a_run_ends_with_the_step_that_reaches_the_limit_and_its_schedule_follows_what_is_spent() -> None:
    trainer, total, rates = run({"queries": 7 * STEP - 1})
    assert (trainer.global_step, total.queries) == (7, 7 * STEP)
    shares = [step * STEP / (7 * STEP - 1) for step in range(7)]
    assert rates == pytest.approx([0.05 * (1 + math.cos(math.pi * share)) for share in shares])


def test_clean_passes_and_compute_count_where_they_are_meant_and_the_trainer_may_end_before() -> None:
    assert run({"queries": 3 * STEP, "clean_passes": True})[0].global_step == 3
    assert run({"queries": 8 * STEP, "clean_passes": True})[0].global_step == 8  # 72 of 64 + 8 a step
    trainer, total, _ = run({"forward_equivalents": 200.0})
    assert total.forward_equivalents >= 200 > total.forward_equivalents * (1 - 1 / trainer.global_step)
    assert run({"queries": 10**6}, max_epochs=1)[0].global_step == 4


def test_limits_are_checked_and_a_cosine_needs_an_end() -> None:
    with pytest.raises(SettingError, match=r"spend\.queries = -1"):
        SpendSettings(queries=-1).check()
    with pytest.raises(SettingError, match=r"Set trainer\.max_epochs or max_steps, or `spend`"):
        run({})
