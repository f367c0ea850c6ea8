"""Lightning's own moving average of the weights serves forward-only training as it is."""

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.utils.data import DataLoader, TensorDataset

DECAY = 0.5


class Recorder(pl.Callback):
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append({name: p.detach().clone() for name, p in pl_module.backbone.named_parameters()})


def test_the_run_ends_with_the_moving_average(make_task, make_trainer):
    task, recorder = make_task(), Recorder()
    pictures = torch.randn(20, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    loader = DataLoader(TensorDataset(pictures, torch.arange(20) % 10), batch_size=4)
    average = EMAWeightAveraging(decay=DECAY, update_every_n_steps=1)
    trainer = make_trainer(recorder, average, limit_train_batches=5, limit_val_batches=0)
    trainer.fit(task, loader)
    expected = recorder.seen[0]
    for weights in recorder.seen[1:]:
        expected = {name: DECAY * value + (1 - DECAY) * weights[name] for name, value in expected.items()}
    moved = False
    for name, parameter in task.backbone.named_parameters():
        assert torch.allclose(parameter, expected[name], rtol=1e-5, atol=1e-7), name
        moved |= not torch.equal(expected[name], recorder.seen[-1][name])
    assert moved
    assert all(p is q for p, q in zip(task.network.trainable().values(), task.backbone.parameters(), strict=True))
