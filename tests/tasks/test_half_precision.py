"""Training under ``16-mixed``; Lightning turns the word into ``bf16-mixed`` on a CPU, its plugin does not."""

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision

from flops_lightning.allocators import GaussianAllocator
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.errors import SettingError
from flops_lightning.strategies import Backprop, MeZO, PilotSpec
from flops_lightning.tasks import ForwardImageClassifier
from tests.digits import two_sites


def float16() -> dict[str, Any]:
    return {"plugins": [MixedPrecision("16-mixed", "cpu")]}


def moves(task: ForwardImageClassifier, trainer: Any, data: Any) -> torch.Tensor:
    before = torch.cat([p.detach().flatten().clone() for p in task.backbone.parameters()])
    trainer.fit(task, data)
    return torch.cat([p.detach().flatten() for p in task.backbone.parameters()]) - before


@pytest.mark.parametrize("strategy", ["likelihood ratio", "mezo"])
def test_it_steps_as_in_float32(strategy, make_task, make_trainer, digits):
    """Three steps of Adam: forward passes in float16, weights and their steps in float32, no loss scaler."""
    seen: list[torch.dtype] = []

    def task() -> ForwardImageClassifier:
        return make_task(strategy=two_sites() if strategy == "likelihood ratio" else MeZO(sigma=0.01, seed=0))

    full = moves(task(), make_trainer(), digits)
    half = task()
    half.backbone.blocks[0].attn.qkv.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    trainer = make_trainer(**float16())
    moved = moves(half, trainer, digits)
    assert trainer.precision == "16-mixed"
    assert trainer.scaler is None
    assert trainer.global_step == 3
    assert torch.float16 in seen
    assert moved.dtype == torch.float32
    assert (moved - full).norm() < 0.1 * full.norm()


def test_an_allocator_learns_from_float16(make_task, make_trainer, digits):
    task = make_task(strategy=two_sites(pilots=PilotSpec(queries=2, sites="head")))
    allocator = QueryAllocatorCallback(allocator=GaussianAllocator())
    assert moves(task, make_trainer(allocator, **float16()), digits).norm() > 0
    assert task.strategy.meter.total().lost == 0


def test_backprop_is_refused(make_task, make_trainer, digits):
    with pytest.raises(SettingError, match=r"trainer.precision = '16-mixed': Backprop .*bf16-mixed or 32-true"):
        make_trainer(**float16()).fit(make_task(strategy=Backprop()), digits)
