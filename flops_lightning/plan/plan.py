"""What a run would cost: samples, steps, queries, compute, time and memory, also with backprop, and as text."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from flops_lightning.errors import SettingError, check_positive
from flops_lightning.network.memory import give_back_freed
from flops_lightning.plan.measurement import Settings, allocators_of, measure, quiet, validates_by_the_clock
from flops_lightning.plan.stopwatch import Clock, Measured, SiteShare
from flops_lightning.plan.trainer import callbacks_of
from flops_lightning.protocol import SupportsStatisticsRequests
from flops_lightning.strategies import Backprop, ForwardGradientStrategy

UNKNOWN = "unknown"
WIDTH = 22


@dataclass(frozen=True)
class Plan:
    """What a run would cost; None where only the run itself tells."""

    strategy: str
    allocator: str  # its name; empty without one
    own: Measured
    backprop: Measured | None  # with backprop on the same task; None if it was not measured
    no_backprop: str  # why backprop cannot be measured; empty if it was, or was not asked for
    steps: int | None
    validations: int | None
    processes: int  # processes that share the samples; all figures are those of one
    left_out: tuple[str, ...]  # names of callbacks whose time is not included
    max_time: str

    @property
    def samples(self) -> int | None:
        """Samples trained on, repetitions included."""
        return None if self.steps is None else self.own.epoch.samples_of(self.steps)

    @property
    def queries(self) -> int | None:
        """Queries of the whole run."""
        of_sites = [self.queries_of(site) or 0.0 for site in self.own.sites]
        return None if self.samples is None else round(self.own.cost.queries_once + sum(of_sites))

    def queries_of(self, site: SiteShare) -> float | None:
        """Queries of a site in the whole run, beyond those at its start."""
        if self.steps is None or self.samples is None:
            return None
        each = site.queries_of_step
        return site.queries * self.samples if each is None else each * self.steps

    @property
    def forward_equivalents(self) -> float | None:
        """Compute of the whole run in forward passes of one sample, without validation."""
        cost = self.own.cost
        return None if self.samples is None else cost.forward_equivalents_once + cost.forward_equivalents * self.samples

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
    task: LightningModule, datamodule: LightningDataModule | None, settings: Settings, *, seconds: float = 10.0,
    backprop: bool = True, clock: Clock = time.perf_counter,
) -> Plan:  # fmt: skip
    """Measure a few steps of a run and return what all of it would cost.

    Nothing that it writes stays, and no process is launched. The task, a module with ``strategy``, ``network`` and
    ``loss``, takes training steps at a learning rate of 0: build another for the run. ``settings`` are the arguments of
    the run's ``Trainer``; what a fit would refuse raises a :class:`SettingError`. See :meth:`PlanningTrainer.plan`.
    """
    check_positive("seconds", seconds, "Write, for example, 10.")
    strategy = getattr(task, "strategy", None)
    # Lightning adds callbacks of its own to the list that it is given.
    run = Trainer(**{**settings, "callbacks": callbacks_of(settings)})
    # The measured steps run in one process, where the task cannot see what it refuses of several.
    run.state.fn = TrainerFn.FITTING
    task.trainer = run
    task.configure_callbacks()
    if strategy is None and hasattr(task, "strategy"):
        raise SettingError("strategy", None, "training needs a strategy.", "Write, for example, LikelihoodRatio().")
    if not isinstance(strategy, ForwardGradientStrategy):
        problem = "has no `strategy` that counts what its steps spend."
        raise SettingError("model", type(task).__name__, problem, "Plan a task of this package.")
    given: dict[str, Any] = {"seconds": seconds, "clock": clock}
    other, why = None, ""
    with quiet():
        own = measure(task, strategy, datamodule, run, settings, **given)
        if backprop and not isinstance(strategy, Backprop):
            other, why = _with_backprop(task, datamodule, run, settings, **given)
    accumulate = getattr(getattr(task, "optimizer_settings", None), "accumulate_grad_batches", 1)
    epochs = run.max_epochs if run.max_epochs is not None else -1
    steps = own.epoch.steps_until(max_epochs=epochs, max_steps=run.max_steps, accumulate=accumulate)
    interval, every = None if validates_by_the_clock(settings) else run.val_check_interval, run.check_val_every_n_epoch
    known = steps is not None and own.validation_batches != 0
    validations = own.epoch.validations(steps or 0, every_epochs=every, interval=interval) if known else steps and 0
    allocators, others = allocators_of(settings), callbacks_of(settings)
    names = ", ".join(type(each.allocator).__name__ for each in allocators)
    left_out = tuple(type(each).__name__ for each in others if each not in allocators)
    return Plan(
        type(strategy).__name__, names, own, other, why, steps, validations, processes=run.world_size,
        left_out=left_out, max_time=str(settings.get("max_time") or ""),
    )  # fmt: skip


def _with_backprop(
    task: LightningModule, datamodule: LightningDataModule | None, run: Trainer, settings: Settings, **given: Any
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
        return measure(task, strategy, datamodule, run, {**settings, "callbacks": alone}, **given), ""
    except SettingError as error:  # all other settings have just served
        return None, str(error)
    except torch.OutOfMemoryError:
        return None, "needs more memory than the device has"


def text(plan: Plan) -> str:
    """How long the run is, what a step and the whole run cost, and what the figures leave out, as plain text."""
    return "\n\n".join("\n".join(part) for part in (_length(plan), _step(plan), _whole(plan), _remarks(plan)) if part)


def _length(plan: Plan) -> list[str]:
    epoch, own = plan.own.epoch, plan.own
    where = torch.cuda.get_device_name(own.device) if own.device.type == "cuda" else own.device.type
    threads = f", {torch.get_num_threads()} threads" if own.device.type == "cpu" else ""
    with_allocator = f" with {plan.allocator}" if plan.allocator else ""
    validations = f"{_number(plan.validations)}, of {_number(own.validation_batches)} batches each"
    return [
        _line("run", f"{plan.strategy}{with_allocator}, on {where}{threads}"),
        _line("samples of an epoch", f"{_number(epoch.samples)}, in batches of {epoch.batch_size:,}"),
        _line("steps", f"{_number(epoch.steps)} an epoch, {_number(plan.steps)} in all"),
        _line("validations", validations if own.validation_batches != 0 else "none"),
    ]


def _step(plan: Plan) -> list[str]:
    batch, cost = plan.own.epoch.batch_size, plan.own.cost
    rows = [("a full batch", "queries", "cost of a query", "forward-equivalents", "queries of the run")]
    for site in plan.own.sites:
        each = "" if site.query_cost is None else f"{site.query_cost:.2g}"
        spent = (_number(site.queries * batch), each, _number(site.forward_equivalents * batch))
        rows.append((site.name, *spent, _number(plan.queries_of(site))))
    rows.append(("all", _number(cost.queries * batch), "", _number(cost.forward_equivalents * batch), ""))
    if cost.queries_once or cost.forward_equivalents_once >= 0.5:
        rows.append(("once, at the start", _number(cost.queries_once), "", _number(cost.forward_equivalents_once), ""))
    rows.append(("the whole run", _number(plan.queries), "", _number(plan.forward_equivalents), ""))
    return _aligned(rows)


def _whole(plan: Plan) -> list[str]:
    measured = [plan.own, *([plan.backprop] if plan.backprop else [])]
    batch = plan.own.epoch.batch_size
    rows = [
        ("", plan.strategy, "Backprop")[: 1 + len(measured)],
        ("seconds a step", *(f"{each.cost.seconds:.3g}" for each in measured)),
        ("the whole fit", *(_duration(plan.seconds(each)) for each in measured)),
        ("peak memory of a step", *(_memory(each) for each in measured)),
        ("forward-equivalents", *(_number(each.cost.forward_equivalents * batch) for each in measured)),
    ]
    return _aligned(rows)


def _remarks(plan: Plan) -> list[str]:
    own = plan.own
    said = [f"Timed: {own.steps:,} steps in {own.seconds:.1f} s, after those that warm up."]
    if (best := own.noise.batch_size) is not None:
        said.append(
            f"Batch size: by {own.noise.steps} gradients at the start, {_number(best)} samples take about twice the "
            "least number of queries; smaller batches take fewer, in more steps (docs/budget.md)."
        )
    if plan.no_backprop:
        said.append(f"Backprop: {plan.no_backprop}")
    if plan.processes > 1:
        alone = "measured without the exchange between them."
        said.append(f"All figures are those of one of {plan.processes} processes, {alone}")
    if plan.validations is None and own.validation_batches != 0:
        said.append("Validation is not in the time: how often it comes is unknown.")
    if plan.max_time:
        said.append(f"The run stops after trainer.max_time = {plan.max_time} at the latest.")
    if plan.left_out:
        said.append(f"Not in the time: what {', '.join(plan.left_out)} does.")
    return said


def _line(name: str, value: str) -> str:
    return f"{name:<{WIDTH}}{value}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Names to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numbers = ("  ".join(f"{v:>{w}}" for v, w in zip(row[1:], widths[1:], strict=True)) for row in rows)
    return [f"{row[0]:<{max(WIDTH, widths[0] + 2)}}{right}" for row, right in zip(rows, numbers, strict=True)]


def _number(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _memory(measured: Measured) -> str:
    return UNKNOWN if measured.peak_memory is None else f"{measured.peak_memory:,.0f} MiB"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return UNKNOWN
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
