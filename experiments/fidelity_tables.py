"""Tables of the study of cosines by layer and component."""

import argparse
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import false_discovery_control, ttest_1samp

from experiments.components import Component
from experiments.drawn_cosine import Drawn
from experiments.fidelity_allocation import Spent
from experiments.tables import geometric_interval, markdown, mean_interval

COLUMNS = (
    "checkpoint", "layer", "component", "noise", "estimator", "budget", "allocator", "batches", "left_out",
    "cosine", "cosine_low", "cosine_high", "gain", "gain_low", "gain_high", "variance", "gradient",
    "drawn", "drawn_error", "drawn_mean_of_cosines", "drawn_predicted",
)  # fmt: skip
"""``gain`` is J of equal counts over J. ``variance`` and ``gradient`` are the trace of the covariance of the batch's
mean gradient and the squared norm of that, means over the batches."""
SHOWN_BUDGET = 20
LEVEL = 0.05


def row(
    step: int, component: Component, options: argparse.Namespace, *, left_out: int, spent: Sequence[Any] = (),
    drawn: Sequence[tuple[Drawn, float]] = (), **key: Any,
) -> dict[str, Any]:  # fmt: skip
    """A row of the CSV, with the logarithms of the gains batch by batch; ``spent`` are :class:`Spent` with cosines."""
    each: list[Spent] = [one for one, _ in spent]
    found: dict[str, Any] = {"checkpoint": step, "layer": component.layer, "component": component.name, **key}
    found |= {"noise": options.noise, "batches": len(each), "left_out": left_out}
    if each:
        found |= _named("cosine", mean_interval([cosine for _, cosine in spent]))
        gains = [one.equal / one.objective for one in each]
        found |= _named("gain", geometric_interval(gains)) | {"log_gains": [math.log(gain) for gain in gains]}
        found["variance"] = statistics.fmean(one.objective / one.samples**2 for one in each)
        found["gradient"] = statistics.fmean(one.gradient / one.samples**2 for one in each)
    if drawn:
        found["drawn"] = statistics.fmean(one.cosine for one, _ in drawn)
        found["drawn_error"] = math.hypot(*(one.error for one, _ in drawn)) / len(drawn)
        found["drawn_mean_of_cosines"] = statistics.fmean(one.mean for one, _ in drawn)
        found["drawn_predicted"] = statistics.fmean(cosine for _, cosine in drawn)
    return found


def _named(name: str, interval: tuple[float, float, float]) -> dict[str, float | None]:
    values = (None if math.isnan(value) else value for value in interval)
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def report(rows: Sequence[dict[str, Any]], weights: str) -> str:
    """Cosines with equal counts by layer, allocators beside equal counts, and predicted beside drawn cosines."""
    measured = [each for each in rows if each["batches"]]
    left_out = sum({(r["checkpoint"], r["layer"], r["component"]): r["left_out"] for r in rows}.values())
    lines = [f"{weights} Noise: {rows[0]['noise']}. Batches left out for a zero gradient: {left_out}.\n"]
    if measured:
        budgets = sorted({each["budget"] for each in measured})
        budget = SHOWN_BUDGET if SHOWN_BUDGET in budgets else budgets[0]
        title = f"Predicted cosine with equal counts of {budget} queries, mean and 95 % interval over the batches:\n"
        equal = [each for each in measured if each["allocator"] == "equal"]
        lines += [title, _by_layer([each for each in equal if each["budget"] == budget])]
        lines += _allocators([each for each in measured if each["allocator"] != "equal"])
        lines += _drawn([each for each in equal if "drawn" in each])
    return "\n".join(lines)


def _by_layer(rows: Sequence[dict[str, Any]]) -> str:
    names = list(dict.fromkeys((each["component"], each["estimator"]) for each in rows))
    cells = {(r["checkpoint"], r["layer"], r["component"], r["estimator"]): _interval(r, "cosine", ".3f") for r in rows}
    lines = dict.fromkeys((each["checkpoint"], each["layer"]) for each in rows)
    table = [[str(n) for n in line] + [cells.get((*line, *name), "-") for name in names] for line in lines]
    return markdown(["step", "layer", *(", ".join(name) for name in names)], table)


def _interval(row: dict[str, Any], name: str, form: str) -> str:
    mean, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
    return f"{mean:{form}}" + ("" if low is None else f" ({low:{form}} - {high:{form}})")


def better_and_worse(log_gains: Sequence[Sequence[float]]) -> tuple[int, int]:
    """Cells whose mean is above and below 0: paired t-tests, false discovery rate below 5 % (Benjamini, Hochberg)."""
    if any(len(cell) < 2 for cell in log_gains):
        return 0, 0
    # Gains that are equal to rounding have no test.
    varied = [np.ptp(cell) > 1e-9 * max(1.0, np.abs(cell).max()) for cell in log_gains]
    values = [ttest_1samp(cell, 0.0).pvalue if v else 1.0 for cell, v in zip(log_gains, varied, strict=True)]
    found = [float(np.mean(c)) for c, p in zip(log_gains, false_discovery_control(values), strict=True) if p < LEVEL]
    return sum(mean > 0 for mean in found), sum(mean < 0 for mean in found)


def _allocators(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    table = []
    for key in dict.fromkeys((r["checkpoint"], r["estimator"], r["allocator"]) for r in rows):
        own = [r for r in rows if (r["checkpoint"], r["estimator"], r["allocator"]) == key]
        better, worse = better_and_worse([r["log_gains"] for r in own])
        gains = [r["gain"] for r in own]
        middle = math.exp(statistics.fmean(map(math.log, gains)))
        text = f"{middle:.2f} ({min(gains):.2f} - {max(gains):.2f})"
        table.append([*map(str, key), str(len(own)), text, str(better), str(worse)])
    title = (
        "J of equal counts over J, mean and range over the cells (layer, component, budget), and cells that beat equal "
        "counts or are beaten\n(paired t-tests over the batches, false discovery rate of each row below 5 %):\n"
    )
    columns = ["step", "estimator", "allocator", "cells", "gain", "better", "worse"]
    return [title, markdown(columns, table)]


def _drawn(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    table = [
        [
            *(str(r[name]) for name in ("checkpoint", "layer", "component", "estimator", "budget")),
            f"{r['drawn_predicted']:.4f}", f"{r['drawn']:.4f} ± {r['drawn_error']:.4f}",
            f"{(r['drawn'] - r['drawn_predicted']) / r['drawn_error']:+.1f}", f"{r['drawn_mean_of_cosines']:.4f}",
        ]
        for r in rows
    ]  # fmt: skip
    columns = ["step", "layer", "component", "estimator", "budget", "predicted", "drawn", "z", "mean of cosines"]
    return ["Predicted and drawn, with the standard error over the draws:\n", markdown(columns, table)]
