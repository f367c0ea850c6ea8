"""One process of several: trains scenarios through Lightning, started with the environment that torchrun sets.

``python -m tests.distributed.worker SIZE FOLDER NAME ...`` writes ``FOLDER/NAME-RANK.pt`` for each: parameters, counts,
bytes sent, steps, what was learned.
"""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from flops_lightning.callbacks import QueryAllocatorCallback, RunSummary
from flops_lightning.tasks.trainer_setup import ForwardDDPStrategy
from tests.digits import quiet_trainer
from tests.distributed.scenarios import SCENARIOS, SUMMARISED, make_task, rank_batches


class Watcher(pl.Callback):
    """Keeps the counts of every step and what each step sent."""

    def __init__(self) -> None:
        self.counts: list[torch.Tensor] = []
        self.sent: list[int] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module._state.counts is not None:
            self.counts.append(pl_module._state.counts.clone())

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.sent.append(pl_module.strategy.communicator.sent)


def run(name: str, folder: Path) -> None:
    scenario, watcher = SCENARIOS[name], Watcher()
    task = make_task(name)
    callbacks: list[pl.Callback] = [watcher]
    if scenario.allocator is not None:
        callbacks.insert(0, QueryAllocatorCallback(allocator=scenario.allocator(), budget=scenario.budget))
    if name == SUMMARISED:
        callbacks.append(RunSummary(export_weights=False))
    trainer = quiet_trainer(
        *callbacks, devices=int(sys.argv[1]), precision="64-true", use_distributed_sampler=False,
        default_root_dir=folder,
    )  # fmt: skip
    mine = [ranks[trainer.global_rank] for ranks in rank_batches(name, trainer.world_size)]
    trainer.fit(task, torch.utils.data.DataLoader(mine, batch_size=None))
    assert isinstance(trainer.strategy, ForwardDDPStrategy)
    parameters = {key: p.detach().clone() for key, p in task.backbone.named_parameters()}
    sent = [after - before for before, after in zip([0, *watcher.sent], watcher.sent, strict=False)]
    learned = {k: v for k, v in task.strategy.state_dict().items() if k in ("token_sigma", "learned_sigma", "ratios")}
    if scenario.budget:
        learned["budget"] = callbacks[0].state_dict()["budget"]
    found = {"parameters": parameters, "counts": watcher.counts, "sent": sent, "learned": learned}
    torch.save({**found, "steps": trainer.global_step}, folder / f"{name}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[3:]:
        run(each, Path(sys.argv[2]))
