"""The tables of the comparison of strategies."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.strategies_budget import BUDGETS, BudgetKind, Cell, Reference

COLUMNS = (
    "method", "budget", "lr", "seed", "steps", "accuracy", "queries", "forward_equivalents", "seconds",
    "peak_memory_mb", "cosine",
)  # fmt: skip
COSINE_COLUMNS = ("method", "weights", "batch", "draw", "cosine")
AT_START, AT_END = "start", "end"
"""Weights at which cosines are measured: those that all runs start from, and those of the reference run's end."""
EDGE = "\\*"
ROUNDING = 1e-9
"""Spread below which estimates are the same."""

Cosines = Mapping[str, Sequence[Sequence[float]]]


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        seed: Its seed.
        summary: Its ``summary.json``; None if it diverged.
    """

    seed: int
    summary: Mapping[str, Any] | None


@dataclass(frozen=True)
class Row:
    """A method under a budget.

    Attributes:
        method: Its name.
        cell: Its steps, or why there are none.
        rate: Its learning rate; NaN if it was not tuned.
        edge: Whether that is the least or the largest of those tried.
        runs: One a seed.
        cosines: By weights: one list a batch, one number a draw.
    """

    method: str
    cell: Cell
    rate: float = math.nan
    edge: bool = False
    runs: Sequence[Run] = ()
    cosines: Cosines = field(default_factory=dict)


def mean_cosine(cosines: Cosines) -> float:
    """Over all weights, batches and draws; NaN without any."""
    means = [statistics.fmean(value for batch in batches for value in batch) for batches in cosines.values()]
    return statistics.fmean(means) if means else math.nan


def _cosine(batches: Sequence[Sequence[float]] | None) -> str:
    if not batches:
        return "-"
    values = [value for batch in batches for value in batch]
    # Mean and spread with as many digits as the spread leaves meaningful.
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.2g} ± {spread if spread > ROUNDING else 0:.1g}"


def _line(row: Row) -> str:
    cosines = [_cosine(row.cosines.get(where)) for where in (AT_START, AT_END)]
    if row.cell.reason:
        cells = [row.method, "-", "-", f"infeasible: {row.cell.reason}", "-", "-", "-", "-", *cosines]
        return "| " + " | ".join(cells) + " |"
    rate = f"{row.rate:g}{' ' + EDGE if row.edge else ''}"
    summaries = [run.summary for run in row.runs if run.summary is not None]
    lost = len(row.runs) - len(summaries)
    if not summaries:
        cells = [row.method, rate, f"{row.cell.steps:,}", f"diverged ({lost} of {lost})", "-", "-", "-", "-", *cosines]
        return "| " + " | ".join(cells) + " |"
    accuracy = [summary["test_accuracy"] for summary in summaries]
    mean = {
        name: statistics.fmean(summary[name] for summary in summaries)
        for name in ("queries", "forward_equivalents", "train_seconds")
    }
    peaks = [summary["peak_memory_mb"] for summary in summaries if summary["peak_memory_mb"] is not None]
    cells = [
        row.method + (f" ({row.cell.note})" if row.cell.note else ""),
        rate,
        f"{row.cell.steps:,}",
        f"{statistics.fmean(accuracy):.1%} ({min(accuracy):.1%} - {max(accuracy):.1%})"
        + (f", {lost} of {len(row.runs)} diverged" if lost else ""),
        f"{mean['queries']:,.0f}",
        f"{mean['forward_equivalents']:,.0f}",
        f"{mean['train_seconds']:,.0f}",
        f"{max(peaks):,.0f}" if peaks else "-",
        *cosines,
    ]
    return "| " + " | ".join(cells) + " |"


def table(rows: Iterable[Row]) -> str:
    """Markdown: one line a method."""
    names = [
        "method", "learning rate", "steps", "test accuracy, mean (min - max)", "queries", "forward-equivalents",
        "wall time, s", "peak memory, MB", "cosine at the start", "cosine at the end",
    ]  # fmt: skip
    return "\n".join(["| " + " | ".join(names) + " |", "|" + "---|" * len(names), *map(_line, rows)]) + "\n"


def report(tables: Mapping[BudgetKind, Sequence[Row]], reference: Reference, about: Mapping[str, str]) -> str:
    """Both tables with what is to be known about them.

    Args:
        tables: Rows by budget.
        reference: What fixed the budgets.
        about: ``configs``, ``start_accuracy``, ``rates``, ``tuning``, ``cosines``, ``processes``, as they are to be
            read.
    """
    parts = [f"# Strategies on {about['configs']}\n"]
    parts.append(
        f"Every method starts from the same weights (test accuracy {about['start_accuracy']}) and trains in a process "
        f"of its own. The reference, `lr` for {reference.steps:,} steps, fixes the budgets.\n"
    )
    for budget, rows in tables.items():
        amount = getattr(reference, budget)
        unit = "queries" if budget == "queries" else "forward-equivalents"
        parts += [f"## {BUDGETS[budget].capitalize()}: {amount:,.0f} {unit}\n", table(rows)]
    where = {s["peak_memory_of"] for rows in tables.values() for row in rows for s in _summaries(row)}
    memory = {
        "cuda": "of the tensors on the GPU (`torch.cuda.max_memory_allocated`)",
        "process": "of the whole process, libraries and data included (its high-water mark)",
    }
    parts.append(
        f"Learning rates: {about['rates']}; {about['tuning']}. {EDGE}: at the edge of these, a better one may lie "
        "beyond. Wall time: training alone, without the tests before and after, mean over the seeds, "
        f"{about['processes']}. Peak memory: the largest over the seeds, "
        f"{' or '.join(memory[name] for name in sorted(where)) or 'unknown'}. Cosine: of one step's estimate of all "
        f"trained parameters with the gradient by backprop on the same batch, {about['cosines']}; at the start, and "
        "at the weights where the reference ends."
    )
    return "\n".join(parts) + "\n"


def _summaries(row: Row) -> list[Mapping[str, Any]]:
    return [run.summary for run in row.runs if run.summary is not None]


def write_csv(path: Path, tables: Mapping[BudgetKind, Sequence[Row]]) -> None:
    """One line a run; a run that diverged has no accuracy."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for budget, rows in tables.items():
            for row in rows:
                cosine = mean_cosine(row.cosines)
                for run in row.runs:
                    keys = ("test_accuracy", "queries", "forward_equivalents", "train_seconds", "peak_memory_mb")
                    values = [run.summary[key] if run.summary else "" for key in keys]
                    shown = "" if math.isnan(cosine) else f"{cosine:.6g}"
                    writer.writerow([row.method, budget, row.rate, run.seed, row.cell.steps, *values, shown])


def write_cosines(path: Path, cosines: Mapping[str, Cosines]) -> None:
    """One line an estimate."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COSINE_COLUMNS)
        for method, by_weights in cosines.items():
            for where, batches in by_weights.items():
                writer.writerows(
                    [method, where, i, k, f"{value:.6g}"]
                    for i, batch in enumerate(batches)
                    for k, value in enumerate(batch)
                )
