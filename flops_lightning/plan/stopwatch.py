"""The callback that times steps, reads what they spent, and stops when the time is up."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sized
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader

from flops_lightning.meter import CLEAN
from flops_lightning.plan.cost import Cost, typical_seconds
from flops_lightning.plan.length import Epoch
from flops_lightning.plan.measured import Measured, SiteShare, query_costs, share
from flops_lightning.plan.memory import StepMemory
from flops_lightning.strategies import ForwardGradientStrategy

WARM_UP = 2
"""Steps that are not timed: the first fills caches, the second takes anew what was given back between the two."""

Clock = Callable[[], float]


class Stopwatch(Callback):
    """Notes when steps end and what they spent."""

    def __init__(
        self, strategy: ForwardGradientStrategy, run: Trainer, folder: Path, *, seconds: float, clock: Clock
    ) -> None:
        """Start now.

        Args:
            strategy: Whose meter is read.
            run: The trainer of the run that is planned.
            folder: Where a checkpoint goes after each epoch, if the run writes any.
            seconds: How long steps are timed, at least one.
            clock: Seconds.
        """
        self.strategy, self.run, self.folder, self.seconds, self.clock = strategy, run, folder, seconds, clock
        self.ends: list[float] = []
        self._opens_epoch: list[bool] = []
        self._samples: list[int] = []
        self._validated: list[float] = []
        self._unspent = self._first = deepcopy(strategy.meter)
        self._begun = self.clock()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation begins; there is only one, before all training."""
        self._validated = [self._now(pl_module)]

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """A batch is validated."""
        self._validated.append(self._now(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note how long epochs and validations are."""
        self._started, self._device = self._now(pl_module), pl_module.device
        self._loader, self._batches = trainer.train_dataloader, trainer.num_training_batches
        self._val_batches = sum(trainer.num_val_batches) if trainer.enable_validation else 0
        self._period = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time; stop when it is up."""
        self.ends.append(self._now(pl_module))
        self._opens_epoch.append(batch_idx == 0)
        self._samples.append(len(batch[0]))
        if len(self.ends) == 1:
            self._first = deepcopy(self.strategy.meter)
            self._query_costs = query_costs(self.strategy, batch[0])
            self._memory = StepMemory(pl_module, trainer.optimizers, self._device)
        enough = len(self.ends) > WARM_UP and self.ends[-1] - self.ends[WARM_UP - 1] >= self.seconds
        if enough and getattr(pl_module, "between_steps", True):  # no batch waits for others of its step
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint, as the run would; after the last step it would only be in the way."""
        if self.run.checkpoint_callbacks and not trainer.should_stop:
            trainer.save_checkpoint(self.folder / "epoch.ckpt")

    def measured(self) -> Measured:
        """What was seen; there must have been a step."""
        first = self.ends[0] - self._started
        steps = [(b - a, opens) for (a, b), opens in zip(pairwise(self.ends), self._opens_epoch[1:], strict=True)]
        within = [time for time, opens in steps if not opens]
        # A run that is over before it is warm has nothing better than its first steps.
        timed = within[WARM_UP - 1 :] or within or [first]
        typical = typical_seconds(timed, period=self._period)
        between = [max(0.0, time - typical) for time, opens in steps if opens]
        validated = [b - a for a, b in pairwise(self._validated)]
        cost, sites = self._spent(typical, first)
        return Measured(
            cost=cost,
            sites=sites,
            epoch=self._epoch(),
            start_seconds=self._started - self._begun,
            epoch_seconds=statistics.median(between) if between else 0.0,
            validation_batches=self._validation_batches(),
            validation_seconds=statistics.median(validated[1:] or validated) if validated else 0.0,
            peak_memory=self._memory.peak(),
            device=self._device,
            steps=len(timed),
            seconds=sum(timed),
        )

    def _epoch(self) -> Epoch:
        sampler = self._loader.sampler if isinstance(self._loader, DataLoader) else None
        return Epoch.of(
            len(sampler) if isinstance(sampler, Sized) else None,
            self._samples[0],
            self._batches,
            processes=self.run.world_size,
            drop_last=bool(getattr(self._loader, "drop_last", False)),
            limit=self.run.limit_train_batches,
        )

    def _validation_batches(self) -> int | None:
        if math.isinf(self._val_batches):
            return None
        limit = self.run.limit_val_batches
        limited = isinstance(limit, int) and self._val_batches >= limit
        return int(self._val_batches) if limited else math.ceil(self._val_batches / self.run.world_size)

    def _spent(self, seconds: float, seconds_once: float) -> tuple[Cost, tuple[SiteShare, ...]]:
        meter, samples = self.strategy.meter, [self._samples[0], sum(self._samples[1:])]
        begin, first, last = (each.total() for each in (self._unspent, self._first, meter))
        curves = {
            name: [getattr(total, name) - getattr(begin, name) for total in (first, last)]
            for name in ("queries", "forward_equivalents")
        }
        before, later = (self._first, samples[1]) if samples[1] else (self._unspent, samples[0])
        names = [*(s.name for s in (*self.strategy.sites, *self.strategy.exact_sites)), *meter.sites]
        shares = tuple(
            share(name, before, meter, later, self._query_costs.get(name)) for name in dict.fromkeys([CLEAN, *names])
        )
        cost = Cost.of(curves, samples, seconds=seconds, seconds_once=seconds_once)
        return cost, tuple(each for each in shares if each.queries or each.forward_equivalents)

    def _now(self, module: LightningModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        return self.clock()
