"""A plan as plain text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flops_lightning.plan.measured import Measured
from flops_lightning.plan.plan import Plan

UNKNOWN = "unknown"
WIDTH = 22


def text(plan: Plan) -> str:
    """The plan: how long the run is, what a step costs, what all of it costs, and what the figures leave out."""
    return "\n\n".join("\n".join(part) for part in (_length(plan), _step(plan), _whole(plan), _remarks(plan)) if part)


def _length(plan: Plan) -> list[str]:
    epoch, own = plan.own.epoch, plan.own
    device = own.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    with_allocator = f" with {plan.allocator}" if plan.allocator else ""
    batches = UNKNOWN if own.validation_batches is None else f"{own.validation_batches:,}"
    times = UNKNOWN if plan.validations is None else f"{plan.validations:,}"
    return [
        _line("run", f"{plan.strategy}{with_allocator}, on {where}{threads}"),
        _line("samples of an epoch", f"{_count(epoch.samples)}, in batches of {epoch.batch_size:,}"),
        _line("steps", f"{_count(epoch.steps)} an epoch, {_count(plan.steps)} in all"),
        _line("validations", f"{times}, of {batches} batches each" if own.validation_batches != 0 else "none"),
    ]


def _step(plan: Plan) -> list[str]:
    batch, cost = plan.own.epoch.batch_size, plan.own.cost
    rows = [("a full batch", "queries", "cost of a query", "forward-equivalents")]
    for site in plan.own.sites:
        each = "" if site.query_cost is None else f"{site.query_cost:.2g}"
        rows.append((site.name, _number(site.queries * batch), each, _number(site.forward_equivalents * batch)))
    rows.append(("all", _number(cost.queries * batch), "", _number(cost.forward_equivalents * batch)))
    if cost.queries_once or cost.forward_equivalents_once >= 0.5:
        rows.append(("once, at the start", _number(cost.queries_once), "", _number(cost.forward_equivalents_once)))
    rows.append(("the whole run", _number(plan.queries), "", _number(plan.forward_equivalents)))
    return _aligned(rows)


def _whole(plan: Plan) -> list[str]:
    columns = [(plan.strategy, plan.own)]
    if plan.backprop:
        columns.append(("Backprop", plan.backprop))
    measured = [each for _, each in columns]
    batch = plan.own.epoch.batch_size
    rows = [
        ("", *(name for name, _ in columns)),
        ("seconds a step", *(f"{each.cost.seconds:.3g}" for each in measured)),
        ("the whole fit", *(_duration(plan.seconds(each)) for each in measured)),
        ("peak memory of a step", *(_memory(each) for each in measured)),
        ("forward-equivalents", *(_number(each.cost.forward_equivalents * batch) for each in measured)),
    ]
    return _aligned(rows)


def _remarks(plan: Plan) -> list[str]:
    own = plan.own
    said = [f"Timed: {own.steps:,} steps in {own.seconds:.1f} s, after those that warm up."]
    if plan.no_backprop:
        said.append(f"Backprop: {plan.no_backprop}")
    if plan.processes > 1:
        said.append(
            f"All figures are of the share of one of {plan.processes} processes, measured without what they exchange."
        )
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
    return [
        (
            f"{row[0]:<{max(WIDTH, widths[0] + 2)}}"
            + "  ".join(f"{v:>{w}}" for v, w in zip(row[1:], widths[1:], strict=True))
        )
        for row in rows
    ]


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


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
