"""What a run would cost: samples, steps, queries, compute, time and memory, and the same run with backprop."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from flops_lightning.errors import SettingError
from flops_lightning.network.process_memory import give_back_freed
from flops_lightning.plan.measured import Measured
from flops_lightning.plan.measurement import (
    Settings,
    allocators_of,
    callbacks_of,
    measure,
    quiet,
    validates_by_the_clock,
)
from flops_lightning.plan.stopwatch import Clock
from flops_lightning.protocol import SupportsStatisticsRequests
from flops_lightning.strategies import Backprop, ForwardGradientStrategy


@dataclass(frozen=True)
class Plan:
    """What a run would cost; None: nobody knows before it is over.

    Attributes:
        strategy: Name of its strategy.
        allocator: Name of its allocator; empty without one.
        own: What was measured with them.
        backprop: What was measured with backprop on the same task; None where it was not.
        no_backprop: Why it cannot be; empty where it was not asked for or is the strategy itself.
        steps: Batches trained on, in all.
        validations: How often is validated.
        processes: Processes that share the samples; everything here is of one of them.
        left_out: Names of callbacks whose work is no part of this.
        max_time: Time after which the run stops, if it has not stopped before.
    """

    strategy: str
    allocator: str
    own: Measured
    backprop: Measured | None
    no_backprop: str
    steps: int | None
    validations: int | None
    processes: int
    left_out: tuple[str, ...]
    max_time: str

    @property
    def samples(self) -> int | None:
        """Samples trained on in all, each as often as it is met."""
        return None if self.steps is None else self.own.epoch.samples_of(self.steps)

    @property
    def queries(self) -> int | None:
        """Queries of the whole run."""
        cost = self.own.cost
        return None if self.samples is None else round(cost.queries_once + cost.queries * self.samples)

    @property
    def forward_equivalents(self) -> float | None:
        """Compute of the whole run, in forward passes of one sample; validation left out."""
        return None if self.samples is None else self.compute(self.own, self.samples)

    @staticmethod
    def compute(measured: Measured, samples: int) -> float:
        """Forward-equivalents of training on so many samples."""
        return measured.cost.forward_equivalents_once + measured.cost.forward_equivalents * samples

    def seconds(self, measured: Measured) -> float | None:
        """Time of the whole run as :attr:`own` or as :attr:`backprop`, validation included where its count is known."""
        if self.steps is None:
            return None
        epochs = -(-self.steps // self.own.epoch.steps) if self.own.epoch.steps else 1
        return (
            measured.start_seconds
            + measured.cost.seconds_once
            + measured.cost.seconds * (self.steps - 1)
            + measured.epoch_seconds * (epochs - 1)
            + measured.validation_seconds * (self.validations or 0) * (measured.validation_batches or 0)
        )


def make_plan(
    task: LightningModule,
    datamodule: LightningDataModule | None,
    settings: Settings,
    *,
    seconds: float = 10.0,
    backprop: bool = True,
    clock: Clock = time.perf_counter,
) -> Plan:
    """Measure a few steps of a run and say what all of it would cost.

    Nothing is written that stays, and no process is launched. The task is trained meanwhile: build another for the run.

    Args:
        task: A module with ``strategy``, ``network`` and ``loss``, as :class:`ForwardImageClassifier` has them.
        datamodule: Its data.
        settings: Arguments of the run's ``Trainer``.
        seconds: How long steps are timed.
        backprop: Whether to measure the same with backprop.
        clock: Seconds.

    Raises:
        SettingError: ``seconds`` is not above 0; the module has no strategy; or what a fit would refuse, in its words.
    """
    if not seconds > 0:
        raise SettingError("seconds", seconds, "leaves no time to measure.", "Write for example 10.")
    strategy = getattr(task, "strategy", None)
    # Lightning adds callbacks of its own to the list that it is given.
    run = Trainer(**{**settings, "callbacks": callbacks_of(settings)})
    _refuse_as_fit_would(task, run)
    if strategy is None and hasattr(task, "strategy"):
        raise SettingError("strategy", None, "training needs one.", "Give for example LikelihoodRatio().")
    if not isinstance(strategy, ForwardGradientStrategy):
        raise SettingError(
            "model", type(task).__name__, "has no `strategy` that tells what its steps spend.",
            "Plan a task of this package.",
        )  # fmt: skip
    other, why = None, ""
    with quiet():
        own = measure(task, strategy, datamodule, run, settings, seconds=seconds, clock=clock)
        if backprop and not isinstance(strategy, Backprop):
            other, why = _with_backprop(task, datamodule, run, settings, seconds=seconds, clock=clock)
    steps = own.epoch.steps_until(
        max_epochs=run.max_epochs if run.max_epochs is not None else -1,
        max_steps=run.max_steps,
        accumulate=getattr(getattr(task, "optimizer_settings", None), "accumulate_grad_batches", 1),
    )
    interval = None if validates_by_the_clock(settings) else run.val_check_interval
    every = run.check_val_every_n_epoch
    known = steps is not None and own.validation_batches != 0
    validations = own.epoch.validations(steps or 0, every_epochs=every, interval=interval) if known else steps and 0
    allocators, others = allocators_of(settings), callbacks_of(settings)
    return Plan(
        strategy=type(strategy).__name__,
        allocator=", ".join(type(each.allocator).__name__ for each in allocators),
        own=own,
        backprop=other,
        no_backprop=why,
        steps=steps,
        validations=validations,
        processes=run.world_size,
        left_out=tuple(type(each).__name__ for each in others if each not in allocators),
        max_time=str(settings.get("max_time") or ""),
    )


def _refuse_as_fit_would(task: LightningModule, run: Trainer) -> None:
    # The steps that are measured run in one process, where the task cannot see what it refuses of several.
    run.state.fn = TrainerFn.FITTING
    task.trainer = run
    task.configure_callbacks()


def _with_backprop(
    task: LightningModule,
    datamodule: LightningDataModule | None,
    run: Trainer,
    settings: Settings,
    *,
    seconds: float,
    clock: Clock,
) -> tuple[Measured | None, str]:
    """What the same task costs with backprop, or why that cannot be."""
    for parameter in task.parameters():
        parameter.grad = None
    give_back_freed()
    strategy = Backprop()
    alone = [each for each in callbacks_of(settings) if each not in allocators_of(settings)]
    try:
        strategy.bind(task.network, task.loss)  # type: ignore[arg-type]
        task.strategy = strategy  # type: ignore[assignment]
        if isinstance(task, SupportsStatisticsRequests):
            task.request_statistics(frozenset())  # no longer what the allocator asked for
        told = {**settings, "callbacks": alone}
        return measure(task, strategy, datamodule, run, told, seconds=seconds, clock=clock), ""
    except SettingError as error:  # all other settings have just served
        return None, str(error)
    except torch.OutOfMemoryError:
        return None, "needs more memory than the device has"
