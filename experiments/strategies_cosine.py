"""``python -m experiments.strategies_cosine --output FILE -- ARGUMENTS``: estimates beside the gradient.

The configuration's method estimates the gradient of fixed batches again and again, each time with new noise, by a run
whose learning rate is too small to move a weight; allocators learn from some batches before. The cosine is taken over
all trained parameters, with the gradient by ``Backprop`` on the same batch and weights.

Writes JSON: ``cosines``, one list per batch, one number per draw.
"""

import argparse
import json
from collections.abc import Sequence
from itertools import islice
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from experiments.command_line import StudyParser, arguments
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.errors import SettingError
from flops_lightning.strategies import Backprop
from flops_lightning.tasks import ForwardImageClassifier

STILL = 1e-30  # a learning rate that moves no weight: far below what float32 and float64 resolve beside it
WINDOW = 10  # batches from which allocators learn before


class Recorder(Callback):
    """Compares the gradient, as the optimiser gets it, with backprop's: on ``batches`` in turn, after ``window``."""

    def __init__(self, task: ForwardImageClassifier, *, window: int, batches: int) -> None:
        self.task, self.window = task, window
        self.exact = Backprop()
        self.exact.bind(task.network, task.loss)
        self.cosines: list[list[float]] = [[] for _ in range(batches)]
        self._known: dict[int, Tensor] = {}
        self._parts: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at what every step of the optimiser is given; methods may make several, each for some parameters."""
        trainer.optimizers[0].register_step_pre_hook(lambda *_: self._parts.append(self._flat()))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        parts, self._parts = self._parts, []
        if batch_idx < self.window:
            return
        turn = (batch_idx - self.window) % len(self.cosines)
        if turn not in self._known:
            self.task.zero_grad()
            with torch.enable_grad():
                self.exact.estimate(self.exact.clean_pass(*batch))
            self._known[turn] = self._flat()
            self.task.zero_grad()
        exact = self._known[turn]
        estimate = torch.stack(parts or [torch.zeros_like(exact)]).sum(0)  # none: all queries of the step were lost
        self.cosines[turn].append(float(torch.nn.functional.cosine_similarity(estimate, exact, dim=0)))

    def _flat(self) -> Tensor:
        parameters = self.task.network.trainable().values()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        return torch.cat([grad.detach().double().flatten() for grad in grads])


def measure(given: Sequence[str], *, batches: int, draws: int) -> list[list[float]]:
    """Cosines of a method's estimates with the gradient: a list per batch of the training set, a number per draw."""
    from flops_lightning.cli.command import build

    own = {
        "model.init_args.optimizer.lr": STILL, "model.init_args.clip": {"norm": 0, "attention_norm": 0},
        "trainer.logger": "false", "trainer.enable_checkpointing": "false", "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false", "trainer.enable_model_summary": "false",
        "trainer.max_epochs": 1, "trainer.max_steps": -1,
    }  # fmt: skip
    cli = build([*given, *arguments(own)])
    task, trainer = cli.model, cast("Any", cli.trainer)
    if not isinstance(task, ForwardImageClassifier):
        remedy = "Give a ForwardImageClassifier."
        raise SettingError("model.class_path", type(task).__name__, "has no strategy to measure.", remedy)
    allocators = [each for each in trainer.callbacks if isinstance(each, QueryAllocatorCallback)]
    learns = any(each.allocator.learns for each in allocators)
    cli.datamodule.setup("fit")
    taken = list(islice(cli.datamodule.train_dataloader(), WINDOW + batches))
    before, fixed = taken[:-batches] if learns else [], taken[-batches:]
    recorder = Recorder(task, window=len(before), batches=len(fixed))
    trainer.callbacks = [*allocators, recorder]
    loader: Any = DataLoader(cast("Any", [*before, *(fixed * draws)]), batch_size=None)  # they are batches already
    trainer.fit(task, train_dataloaders=loader)
    return recorder.cosines


def study(options: argparse.Namespace) -> None:
    cosines = measure(options.extra, batches=options.batches, draws=options.draws)
    options.output.write_text(json.dumps({"cosines": cosines}) + "\n")


def main(args: Sequence[str] | None = None) -> None:
    StudyParser(__doc__, runs=False, batches=(4, "batches"), draws=(8, "estimates of each")).run(study, args)


if __name__ == "__main__":
    main()
