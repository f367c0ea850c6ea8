"""One process of several: trains scenarios through Lightning, started with the environment that torchrun sets.

``python -m tests.distributed.worker SIZE FOLDER NAME ...`` writes ``FOLDER/NAME-RANK.pt`` for each: parameters, counts,
bytes sent, steps, what was learned. A language model is exported to ``FOLDER/NAME-adapter-RANK``, and its run resumed
from the middle.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from flops_lightning.callbacks import QueryAllocatorCallback, RunSummary
from flops_lightning.tasks.trainer_setup import ForwardDDPStrategy
from tests.digits import quiet_trainer
from tests.distributed.scenarios import SCENARIOS, SUMMARISED, make_task, rank_batches, texts_to_test

MIDDLE = 3
"""Steps after which the runs that are resumed have a checkpoint."""


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


def fit(name: str, folder: Path, *more: pl.Callback, resume: Path | None = None) -> tuple[Any, ...]:
    scenario, watcher = SCENARIOS[name], Watcher()
    task = make_task(name, folder)
    callbacks: list[pl.Callback] = [watcher, *more]
    if scenario.allocator is not None:
        callbacks.insert(0, QueryAllocatorCallback(allocator=scenario.allocator(), budget=scenario.budget))
    trainer = quiet_trainer(
        *callbacks, devices=int(sys.argv[1]), precision="64-true", use_distributed_sampler=False,
        default_root_dir=folder, enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in more),
    )  # fmt: skip
    mine = [ranks[trainer.global_rank] for ranks in rank_batches(name, trainer.world_size)]
    rest = MIDDLE if resume else 0  # this loader does not know its place
    loader = torch.utils.data.DataLoader(mine[rest:] + mine[:rest], batch_size=None)
    trainer.fit(task, loader, ckpt_path=resume, weights_only=True)
    assert isinstance(trainer.strategy, ForwardDDPStrategy)
    return trainer, task, watcher, callbacks


def parameters_of(task: Any) -> dict[str, torch.Tensor]:
    return {key: p.detach().clone() for key, p in task.network.module.named_parameters()}


def run(name: str, folder: Path) -> None:
    more: list[pl.Callback] = [RunSummary(export_weights=False)] if name == SUMMARISED else []
    if SCENARIOS[name].language:
        more.append(ModelCheckpoint(folder, f"{name}-{{step}}", every_n_train_steps=MIDDLE, save_top_k=-1))
    trainer, task, watcher, callbacks = fit(name, folder, *more)
    sent = [after - before for before, after in zip([0, *watcher.sent], watcher.sent, strict=False)]
    learned = {k: v for k, v in task.strategy.state_dict().items() if k in ("token_sigma", "learned_sigma", "ratios")}
    if SCENARIOS[name].budget:
        learned["budget"] = callbacks[0].state_dict()["budget"]
    found = {"parameters": parameters_of(task), "counts": watcher.counts, "sent": sent, "learned": learned}
    if SCENARIOS[name].language:
        task._tokenizer = SimpleNamespace(save_pretrained=lambda path: None)
        task.export_weights(folder / f"{name}-adapter-{trainer.global_rank}")
        _, resumed, later, _ = fit(name, folder, resume=folder / f"{name}-step={MIDDLE}.ckpt")
        (tested,) = trainer.test(make_task(name, folder), texts_to_test(), verbose=False)
        found |= {"resumed": parameters_of(resumed), "later": later.counts, "tested": tested}
    torch.save({**found, "steps": trainer.global_step}, folder / f"{name}-{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[3:]:
        run(each, Path(sys.argv[2]))
