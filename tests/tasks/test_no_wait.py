"""A training step with Lightning, allocator and callback on a GPU that is pretended: what waits is the strategy's."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.utils.data import DataLoader

from flops_lightning.allocators import OptimalAllocator, TraceSettings
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.noise import generators
from tests.digits import classifier
from tests.pretended_gpu import CUDA, PretendedKernels, noted, pretended_gpu

OURS = {
    "protocol.objects.on_cpu: to the host": 2,  # what the allocator knows, and what it learns after the step
    "strategies.query_strategy.estimate: to the host": 1,
}
SHOWN = {"lightning.fabric.utilities.apply_func.to_item: _local_scalar_dense": 2}
"""Of the progress bar: Lightning makes a number of each figure after every batch."""


class AnyDevice(CPUAccelerator):
    def setup_device(self, device: torch.device) -> None:
        """Take it as it is."""


class Waits(pl.Callback):
    """What waits from the start of one batch to that of the next."""

    def __init__(self) -> None:
        self.found = []

    def on_train_batch_start(self, *_: object) -> None:
        self.found.append(noted())


@pytest.mark.parametrize("bar", [False, True])
def test_a_training_step_waits_where_the_strategy_does_and_for_what_a_progress_bar_shows(bar, monkeypatch):
    monkeypatch.setattr(generators, "_kernels", lambda _: PretendedKernels)
    watch = Waits()
    allocate = QueryAllocatorCallback(allocator=OptimalAllocator(traces=TraceSettings(source="prediction")))
    with pretended_gpu():
        batches = [(torch.randn(4, 1, 8, 8).pin_memory(), torch.arange(4).pin_memory()) for _ in range(5)]
        trainer = pl.Trainer(
            strategy=SingleDeviceStrategy(device=CUDA, accelerator=AnyDevice()), max_epochs=1, logger=False,
            enable_checkpointing=False, enable_progress_bar=bar, enable_model_summary=False,
            callbacks=[watch, allocate, *([TQDMProgressBar(refresh_rate=0)] if bar else [])],
        )  # fmt: skip
        trainer.fit(classifier(), DataLoader(batches, batch_size=None))
    assert trainer.global_step == 5
    assert watch.found[4] == (OURS | SHOWN if bar else OURS)
