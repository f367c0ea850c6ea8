"""The callback that times steps and reads what they spend, in queries, compute and memory."""

import math
import statistics
from collections.abc import Callable, Iterable, Sized
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from flops_lightning.allocators.budget import DENSE
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.meter import CLEAN, QueryMeter, SiteCount
from flops_lightning.network.memory import give_back_freed, held, restart_peak
from flops_lightning.network.rows import as_rows
from flops_lightning.plan.cost import Cost, Epoch, typical_seconds
from flops_lightning.plan.gradient_noise import GradientNoise
from flops_lightning.strategies import ForwardGradientStrategy
from flops_lightning.strategies.query_strategy import QueryStrategy
from flops_lightning.strategies.site_directions import BY_ROW
from flops_lightning.tasks.allocated_module import AllocatedModule

WARM_UP = 2
"""Steps that are not timed: the first fills caches, the second takes anew what was given back between the two."""

Clock = Callable[[], float]


@dataclass(frozen=True)
class SiteShare:
    """What one site, or something else that the meter counts, such as ``clean``, costs per sample and step."""

    name: str
    queries: float
    query_cost: float | None  # forward-equivalents per query; None without queries
    forward_equivalents: float  # of the queries and of the gradient after them
    queries_of_step: float | None = None  # where all samples share them, however many there are


@dataclass(frozen=True)
class Measured:
    """What a few steps showed."""

    cost: Cost
    sites: tuple[SiteShare, ...]
    epoch: Epoch
    start_seconds: float  # time before the first step
    epoch_seconds: float  # time between two epochs; 0 if only one was measured
    validation_batches: int | None  # batches of a validation; None if unknown
    validation_seconds: float  # time of one of them
    peak_memory: float | None  # of a step, in MiB; None where the system does not tell
    device: torch.device
    steps: int  # number of timed steps
    seconds: float  # time of all of them
    noise: GradientNoise  # of the first gradients; empty where they say nothing of the batch size


class Stopwatch(Callback):
    """Notes when steps end and what they spent, and stops when the time is up."""

    def __init__(
        self, strategy: ForwardGradientStrategy, run: Trainer, folder: Path, *, seconds: float, clock: Clock
    ) -> None:
        """Start now. If ``run`` writes checkpoints, one goes to ``folder`` after each epoch."""
        self.strategy, self.run, self.folder, self.seconds, self.clock = strategy, run, folder, seconds, clock
        self.ends: list[float] = []
        self._opens_epoch: list[bool] = []
        self._samples: list[int] = []
        self._query_costs: dict[str, float] = {}
        self._validated: list[float] = []
        self._unspent = self._first = deepcopy(strategy.meter)
        self._noise = GradientNoise()
        self._begun = self.clock()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the time; the only validation comes before all training."""
        self._validated = [self._now(pl_module)]

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Note the time."""
        self._validated.append(self._now(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note how long epochs and validations are."""
        self._started, self._device = self._now(pl_module), pl_module.device
        self._loader, self._batches = trainer.train_dataloader, trainer.num_training_batches
        self._val_batches = sum(trainer.num_val_batches) if trainer.enable_validation else 0
        self._period = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        self._compares, self._settling = independent(self.strategy, pl_module), settling_steps(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the weights where they are, as the gradients of the steps are compared; schedules change the rate."""
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 0.0 * group["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time; stop when it is up."""
        self.ends.append(self._now(pl_module))
        self._opens_epoch.append(batch_idx == 0)
        inputs = batch[0] if isinstance(batch, (tuple, list)) else cast("AllocatedModule", pl_module).split(batch)[0]
        self._samples.append(len(as_rows(inputs)))
        if self._compares and len(self.ends) > self._settling:
            self._noise.add([p.grad for p in pl_module.parameters() if p.grad is not None], self._samples[-1])
        if len(self.ends) == 1:
            self._first = deepcopy(self.strategy.meter)
            if isinstance(self.strategy, QueryStrategy):  # they count a query's cost apart from the gradient's
                self._query_costs = self.strategy.query_costs(self._samples[-1])
            self._memory = StepMemory(pl_module, trainer.optimizers, self._device)
        enough = len(self.ends) > WARM_UP and self.ends[-1] - self.ends[WARM_UP - 1] >= self.seconds
        if enough and getattr(pl_module, "between_steps", True):  # no batch waits for others of its step
            trainer.should_stop = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write a checkpoint, as the run would; after the last step it would only be in the way."""
        if self.run.checkpoint_callbacks and not trainer.should_stop:
            trainer.save_checkpoint(self.folder / "epoch.ckpt")

    def measured(self) -> Measured:
        """What the steps, one at least, showed."""
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
            cost, sites, self._epoch(), start_seconds=self._started - self._begun,
            epoch_seconds=statistics.median(between) if between else 0.0,
            validation_batches=self._validation_batches(),
            validation_seconds=statistics.median(validated[1:] or validated) if validated else 0.0,
            peak_memory=self._memory.peak(), device=self._device, steps=len(timed), seconds=sum(timed),
            noise=self._noise,
        )  # fmt: skip

    def _epoch(self) -> Epoch:
        sampler = self._loader.sampler if isinstance(self._loader, DataLoader) else None
        samples, drops = len(sampler) if isinstance(sampler, Sized) else None, getattr(self._loader, "drop_last", False)
        return Epoch.of(
            samples, self._samples[0], self._batches, processes=self.run.world_size, drop_last=bool(drops),
            limit=self.run.limit_train_batches,
        )  # fmt: skip

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
        steps = max(1, len(self._samples) - 1)
        sites = [site.name for site in (*self.strategy.sites, *self.strategy.exact_sites)]
        names = dict.fromkeys([CLEAN, *sites, *meter.sites])
        shares = tuple(self._share(name, before, meter, later, steps) for name in names)
        cost = Cost.of(curves, samples, seconds=seconds, seconds_once=seconds_once)
        return cost, tuple(each for each in shares if each.queries or each.forward_equivalents)

    def _share(self, name: str, before: QueryMeter, after: QueryMeter, samples: int, steps: int) -> SiteShare:
        old, new = before.sites.get(name, SiteCount()), after.sites.get(name, SiteCount())
        queries, spent = new.queries - old.queries, new.forward_equivalents - old.forward_equivalents
        # Where a query's cost is not counted apart from the gradient's, all that was spent is the queries'.
        each = self._query_costs.get(name, spent / queries) if queries else None
        shared = any(site.name == name and site.per_batch for site in self.strategy.sites)
        return SiteShare(name, queries / samples, each, spent / samples, queries / steps if shared else None)

    def _now(self, module: LightningModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        return self.clock()


def independent(strategy: ForwardGradientStrategy, module: LightningModule) -> bool:
    """Whether the gradient left behind by a step is that of one batch whose samples' noises are independent."""
    if not isinstance(strategy, QueryStrategy) or getattr(strategy, "normalize", "none") != "none":
        return False
    own = getattr(strategy, "layout", BY_ROW[0]) in BY_ROW
    own = own and not any(site.directions == "shared" for site in strategy.sites)
    clip, optimizer = (getattr(module, f"{name}_settings", None) for name in ("clip", "optimizer"))
    whole = not any(vars(clip).values()) if clip else True
    whole = whole and getattr(optimizer, "accumulate_grad_batches", 1) == 1
    return own and whole and len(strategy.update_groups) == 1


def settling_steps(trainer: Trainer) -> int:
    """Steps until a budget that is chosen hardly changes at the same weights."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    rules = (c.budget.rule for c in callbacks if isinstance(c, QueryAllocatorCallback))
    return DENSE if any(rule != "fixed" for rule in rules) else 0


class StepMemory:
    """Peak memory of steps: weights, gradients, the optimiser's state, and what comes and goes within a step.

    On a GPU it is torch's peak allocation. Elsewhere the kernel counts what comes and goes, as the growth of the
    process over what it holds between two steps; libraries and data do not count. It is measured from the making of
    this object, which comes between two steps, after the optimiser's state was made.
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Optimizer], device: torch.device) -> None:
        self._device, self._lasting, self._between = device, 0.0, None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            return
        give_back_freed()
        if device.type == "cpu" and restart_peak():
            self._lasting, self._between = lasting_bytes(module, optimizers) / 2**20, held("VmRSS")

    def peak(self) -> float | None:
        """MiB; None where the system does not tell."""
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device)) / 2**20
        high = held("VmHWM")
        return None if high is None or self._between is None else self._lasting + max(0.0, high - self._between)


def lasting_bytes(module: nn.Module, optimizers: Iterable[Optimizer]) -> int:
    """Bytes of weights, buffers, gradients and the state of optimisers."""
    parameters = list(module.parameters())
    state = [value for optimizer in optimizers for kept in optimizer.state.values() for value in kept.values()]
    tensors = [*parameters, *module.buffers(), *(p.grad for p in parameters if p.grad is not None)]
    return sum(t.numel() * t.element_size() for t in (*tensors, *(v for v in state if isinstance(v, Tensor))))
