"""Which learning rate trains best: short runs from the same weights, on the same batches, with the same noise.

Every run is Lightning's own loop with the task's strategy, optimiser, schedule and allocator, and its schedule ends
with the run. Its score is the mean clean loss of its last quarter: those losses cost no query. Rates of a wide grid,
half a decade apart, are tried first; then those around the best, a quarter of a decade apart, in runs twice as long.
The lowest point of a parabola through the logarithms of these last losses is chosen: a single one is noisy.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from flops_lightning.errors import LostQueriesError, SettingError, check_at_least
from flops_lightning.plan.measurement import Settings, allocators_of, measuring_settings, quiet
from flops_lightning.strategies import ForwardGradientStrategy
from flops_lightning.tasks import ForwardModule

COARSE, FINE = 0.5, 0.25
"""Steps of the two grids, in decades."""
NEAR = 1.5
"""Losses up to this factor above the lowest tell where between the rates it is."""
BEYOND = 4
"""Rates that may be added to a grid whose best is at its edge."""


@dataclass(frozen=True)
class Trial:
    """A short run with a learning rate.

    Attributes:
        rate: Peak learning rate.
        steps: Steps of the run.
        losses: Mean clean loss of each batch; infinite last where every query was lost.
    """

    rate: float
    steps: int
    losses: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Mean over the last quarter; infinite where it is not finite."""
        late = statistics.fmean(self.losses[-max(1, len(self.losses) // 4) :])
        return late if math.isfinite(late) else math.inf


@dataclass(frozen=True)
class RateSearch:
    """What a search showed: rate before it, rate that was chosen, and all runs in their order."""

    given: float
    found: float
    trials: tuple[Trial, ...]


class Recorder(Callback):
    """Notes the clean loss of every batch."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note it; stop when it is not finite."""
        self.losses.append(float(outputs["loss"]))
        trainer.should_stop = not math.isfinite(self.losses[-1])


class Start:
    """A task as it is now, to which it can return: weights, strategy, optimiser settings and what it counts."""

    def __init__(self, task: ForwardModule, strategy: ForwardGradientStrategy) -> None:
        self.task, self.strategy, self._settings = task, strategy, task.optimizer_settings
        self._weights = {name: tensor.detach().clone() for name, tensor in _tensors(task)}
        self._state, self._trainer = deepcopy(strategy.state_dict()), task._trainer

    def weights(self) -> None:
        """Restore the weights, and have no gradients."""
        with torch.no_grad():
            for name, tensor in _tensors(self.task):
                tensor.copy_(self._weights[name])
        for parameter in self.task.parameters():
            parameter.grad = None

    def restore(self) -> None:
        """Restore everything."""
        self.weights()
        self.strategy.load_state_dict(deepcopy(self._state))
        self.task.optimizer_settings = self._settings
        self.task.start_anew()
        self.task.trainer = self._trainer


def _tensors(task: ForwardModule) -> Iterable[tuple[str, torch.Tensor]]:
    return (*task.named_parameters(), *task.named_buffers())


@contextmanager
def returning(task: ForwardModule, strategy: ForwardGradientStrategy) -> Iterator[Start]:
    """Within, the task may be trained; afterwards it is as it was, and so are random numbers."""
    start = Start(task, strategy)
    with isolate_rng(), quiet():
        warnings.simplefilter("ignore", RuntimeWarning)  # of queries that are lost where a rate is too high
        try:
            yield start
        finally:
            start.restore()


def short_fit(
    task: ForwardModule, datamodule: LightningDataModule | None, run: Trainer, settings: Settings, *,
    steps: int, callback: Callback,
) -> None:  # fmt: skip
    """Train for a few steps with the run's own allocator, anew; nothing is validated or written."""
    changed = {
        "max_steps": steps, "max_epochs": -1, "limit_train_batches": run.limit_train_batches,
        "limit_val_batches": 0, "num_sanity_val_steps": 0, "logger": False,
    }  # fmt: skip
    fresh = {**settings, "callbacks": deepcopy(allocators_of(settings)), "logger": False}
    with TemporaryDirectory(prefix="tune_") as folder:
        trainer = Trainer(**{**measuring_settings(run, fresh, callback, folder), **changed})
        trainer.fit(task, datamodule=datamodule)


def find_rate(
    task: ForwardModule, datamodule: LightningDataModule | None, run: Trainer, settings: Settings, *,
    rates: int = 8, steps: int = 40, say: Callable[[str], None] = lambda _: None,
) -> RateSearch:  # fmt: skip
    """Find the learning rate of a task; it is as before when this returns.

    Args:
        task: Its ``optimizer.lr`` is the middle of the first grid.
        datamodule: Its data.
        run: The trainer of the run that is tuned for, which runs nothing.
        settings: The arguments of that trainer.
        rates: Rates of the first grid, 3 or more.
        steps: Steps of the longer runs, 8 or more; those of the first grid have half as many.
        say: Told of every run.

    Raises:
        SettingError: The task configures its own optimiser, or diverges at every rate.
    """
    check_at_least("rates", rates, 3, "Write 8, or 0 to search for none.")
    check_at_least("steps", steps, 8)
    if type(task).configure_optimizers is not ForwardModule.configure_optimizers:
        problem = "configures its own optimiser, whose rate `optimizer.lr` does not set."
        raise SettingError("model", type(task).__name__, problem, "Use `optimizer`, or write rates: 0.")
    strategy = cast("ForwardGradientStrategy", task.strategy)
    own, trials = task.optimizer_settings, list[Trial]()

    def loss(rate: float, length: int) -> float:
        with returning(task, strategy):
            # Warm-up would take all of a short run.
            task.optimizer_settings = replace(own, lr=rate, warmup_steps=min(own.warmup_steps, length // 4))
            recorder = Recorder()
            try:
                short_fit(task, datamodule, run, settings, steps=length, callback=recorder)
            except LostQueriesError:
                recorder.losses.append(math.inf)
        trials.append(Trial(rate, length, tuple(recorder.losses)))
        say(f"rate {rate:.3g}, {length} steps: loss {trials[-1].loss:.4g}")
        return trials[-1].loss

    middle = math.log10(own.lr)
    wide = lowest(lambda place: loss(10**place, steps // 2), middle, COARSE, below=rates // 2, above=(rates - 1) // 2)
    place = min(wide, key=wide.__getitem__)
    near = lowest(lambda place: loss(10**place, steps), place, FINE, below=2, above=2)
    if not math.isfinite(min(near.values())):
        least = min(trial.rate for trial in trials)
        problem = f"diverges, and so do the {len(trials) - 1} other rates tried, from {least:.1g} up."
        raise SettingError("optimizer.lr", own.lr, problem, "Lower it or the sites' sigma, or set clip.norm.")
    return RateSearch(own.lr, float(f"{10 ** bottom(near):.2g}"), tuple(trials))


def lowest(loss: Callable[[float], float], middle: float, step: float, *, below: int, above: int) -> dict[float, float]:
    """Losses on a grid around ``middle`` that grows, by :data:`BEYOND` places at most, while its edge is the best.

    Where all are infinite, it grows downwards.
    """
    places = {middle + i * step: math.nan for i in range(-below, above + 1)}
    found = {place: loss(place) for place in places}
    for _ in range(BEYOND):
        best = min(found, key=lambda place: (found[place], place))
        if best not in (min(found), max(found)):
            break
        beyond = best - step if best == min(found) else best + step
        found[beyond] = loss(beyond)
    return dict(sorted(found.items()))


def bottom(losses: Mapping[float, float]) -> float:
    """Where a parabola through the logarithms of the losses is lowest, at most a step from the lowest of them.

    Losses above :data:`NEAR` times the lowest are left out: where a rate is too high they explode, and would decide.
    """
    best = min(losses, key=losses.__getitem__)
    places = np.array(sorted(place for place, loss in losses.items() if 0 < loss <= NEAR * losses[best]))
    if len(places) < 3:
        return best
    curvature, slope, _ = np.polyfit(places - best, np.log([losses[place] for place in places]), 2)
    if curvature <= 0:
        return best
    reach = np.diff(places).min()
    low, high = max(places[0], best - reach), min(places[-1], best + reach)  # never towards a loss that was left out
    return float(np.clip(best - slope / (2 * curvature), low, high))
