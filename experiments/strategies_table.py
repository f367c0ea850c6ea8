"""The comparison of strategies: how many steps a budget buys, and its tables; pure functions."""

import math
import os
import statistics
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments.rates import TUNING_SEED
from experiments.tables import markdown, spread, write_csv
from flops_lightning.plan.cost import Cost

BudgetKind = Literal["queries", "forward_equivalents"]
KINDS: Mapping[BudgetKind, str] = {
    "queries": "equal total queries", "forward_equivalents": "equal forward-equivalents",
}  # fmt: skip
COLUMNS = (
    "method", "budget", "share", "lr", "seed", "steps", "accuracy", "queries", "forward_equivalents", "seconds",
    "peak_memory_mb", "cosine",
)  # fmt: skip
SUMMARY_KEYS = ("test_accuracy", "queries", "forward_equivalents", "train_seconds", "peak_memory_mb")
HEADERS = (
    "method", "learning rate", "steps", "test accuracy, mean (min - max)", "queries", "forward-equivalents",
    "wall time, s", "peak memory, MB", "cosine at the start", "cosine at the end",
)  # fmt: skip
AT_START, AT_END = "start", "end"  # weights at which cosines are measured: of all runs' start, of the reference's end
EDGE = "\\*"
ROUNDING = 1e-9  # spread below which estimates are the same
MEMORY = {
    "cuda": "of the tensors on the GPU (`torch.cuda.max_memory_allocated`)",
    "process": "of the whole process, libraries and data included (its high-water mark)",
}

Cosines = Mapping[str, Sequence[Sequence[float]]]  # by weights: one list per batch, one number per draw


class Reference(NamedTuple):
    """The run that fixes the budgets: its optimiser steps, the samples it saw, and what it spent."""

    steps: int
    samples: int
    queries: float
    forward_equivalents: float


class Budget(NamedTuple):
    """What the runs of a table spend alike; ``share``: per cent of what the reference spends."""

    kind: BudgetKind
    share: float = 100.0

    @property
    def title(self) -> str:
        return KINDS[self.kind] + (f", {self.share:g} % of the reference's" if self.share != 100 else "")

    def of(self, amount: float) -> float:
        return amount * self.share / 100


class Length(NamedTuple):
    """Optimiser steps of a method under a budget; ``reason``: why it is not run; ``note``: a remark for the table."""

    steps: int
    reason: str = ""
    note: str = ""


def length(budget: Budget, cost: Cost, reference: Reference, *, max_steps_factor: float, max_minutes: float) -> Length:
    """Steps after which a method has spent what the reference spent, rounded, or why it is not run.

    A method that pays nothing of the kind (backprop has no queries) gets the steps of the reference.
    """
    kind = budget.kind
    each, once = (getattr(cost, name) for name in (kind, f"{kind}_once"))
    samples_per_step = reference.samples / reference.steps  # on average: the last batch of an epoch may be smaller
    paid = budget.of(getattr(reference, kind)) - once
    bought = paid / (each * samples_per_step) if each else budget.of(reference.steps)
    steps = max(0, round(bought))
    minutes = (cost.seconds_once + steps * cost.seconds) / 60
    if not steps:
        return Length(0, "the first step alone costs more than the budget")
    if steps > max_steps_factor * reference.steps:
        times = steps / reference.steps
        return Length(steps, f"{steps:,} steps, {times:.0f} times those of the reference (limit {max_steps_factor:g})")
    if minutes > max_minutes:
        return Length(steps, f"{steps:,} steps would take {minutes:.0f} minutes (limit {max_minutes:g})")
    return Length(steps, note="" if each else "no queries: the reference's steps")


@dataclass(frozen=True)
class Row:
    method: str
    length: Length
    rate: float = math.nan  # NaN if it was not tuned
    edge: bool = False  # whether the rate is the least or the largest of those tried
    summaries: Mapping[int, Mapping[str, Any] | None] = field(default_factory=dict)  # by seed; None: the run diverged
    cosines: Cosines = field(default_factory=dict)

    @property
    def finished(self) -> list[Mapping[str, Any]]:
        """Summaries of the runs that did not diverge."""
        return [summary for summary in self.summaries.values() if summary is not None]

    @property
    def mean_cosine(self) -> float:
        """Over all weights, batches and draws; NaN without any."""
        means = [statistics.fmean(chain(*batches)) for batches in self.cosines.values()]
        return statistics.fmean(means) if means else math.nan


def _cosine(batches: Sequence[Sequence[float]]) -> str:
    values = list(chain(*batches))
    if not values:
        return "-"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.2g} ± {deviation if deviation > ROUNDING else 0:.1g}"


def _line(row: Row) -> list[str]:
    rate, steps, note = f"{row.rate:g}{' ' + EDGE if row.edge else ''}", f"{row.length.steps:,}", row.length.note
    runs, lost = len(row.summaries), len(row.summaries) - len(row.finished)
    if row.length.reason:
        line = [row.method, "-", "-", f"infeasible: {row.length.reason}", *"----"]
    elif not row.finished:
        line = [row.method, rate, steps, f"diverged ({lost} of {lost})", *"----"]
    else:
        known = ([each[key] for each in row.finished if each[key] is not None] for key in SUMMARY_KEYS)
        accuracy, *spent, peaks = known
        line = [
            row.method + (f" ({note})" if note else ""), rate, steps,
            spread(accuracy) + (f", {lost} of {runs} diverged" if lost else ""),
            *(f"{statistics.fmean(values):,.0f}" for values in spent), f"{max(peaks):,.0f}" if peaks else "-",
        ]  # fmt: skip
    return [*line, *(_cosine(row.cosines.get(where, ())) for where in (AT_START, AT_END))]


def strategies_table(rows: Iterable[Row]) -> str:
    return markdown(HEADERS, map(_line, rows))


def report(tables: Mapping[Budget, Sequence[Row]], reference: Reference, start: float, options: Namespace) -> str:
    """Both tables, and how they were made; ``start`` is the test accuracy before training."""
    rates = ", ".join(f"{rate:g}" for rate in sorted(set(options.rates)))
    where = {summary["peak_memory_of"] for rows in tables.values() for row in rows for summary in row.finished}
    memory = " or ".join(MEMORY[name] for name in sorted(where)) or "unknown"
    parts = [
        f"# Strategies on {' '.join((' + '.join(options.config), *options.extra))}\n",
        f"Every method starts from the same weights (test accuracy {start:.1%}) and trains in a process of its own. "
        f"The reference, `lr` for {reference.steps:,} steps, fixes the budgets.\n",
    ]
    for budget, rows in tables.items():
        amount, unit = budget.of(getattr(reference, budget.kind)), budget.kind.replace("_", "-")
        parts += [f"## {budget.title.capitalize()}: {amount:,.0f} {unit}\n", strategies_table(rows)]
    notes = [
        f"Learning rates: {rates}, and beyond until the best is inside, by the late training loss of one run with seed",
        f"{TUNING_SEED}, not used again, over {options.tuning_fraction:g} of the method's steps (of the first table",
        "that it has any in) with a schedule that ends there; the same rate serves all tables.",
        f"{EDGE}: at the edge of those tried, a better one may lie beyond.",
        "Wall time: training alone, without the tests before and after, mean over the seeds,",
        f"{options.jobs} at a time on {os.cpu_count()} cores. Peak memory: the largest over the seeds, {memory}.",
        "Cosine: of one step's estimate of all trained parameters with the gradient by backprop on the same batch,",
        f"mean ± standard deviation over {options.draws} draws on each of {options.batches} batches; at the start, and",
        "at the weights where the reference ends.",
    ]
    return "\n".join(parts) + f"\n{' '.join(notes)}\n"


def write_tables(output: Path, tables: Mapping[Budget, Sequence[Row]], cosines: Mapping[str, Cosines]) -> None:
    """``strategies.csv``: a line per run, without accuracy where it diverged. ``cosines.csv``: a line per estimate."""
    runs = [
        [row.method, *budget, row.rate, seed, row.length.steps, *((summary or {}).get(key, "") for key in SUMMARY_KEYS),
         f"{row.mean_cosine:.6g}" if row.cosines else ""]
        for budget, rows in tables.items() for row in rows for seed, summary in row.summaries.items()
    ]  # fmt: skip
    write_csv(output / "strategies.csv", COLUMNS, runs)
    estimates = [
        [method, where, i, k, f"{value:.6g}"]
        for method, by_weights in cosines.items() for where, batches in by_weights.items()
        for i, batch in enumerate(batches) for k, value in enumerate(batch)
    ]  # fmt: skip
    write_csv(output / "cosines.csv", ("method", "weights", "batch", "draw", "cosine"), estimates)
