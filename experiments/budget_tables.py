"""Tables and picture of the study of budgets (``experiments.budget``)."""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t

from experiments.harness import Cell, late_mean
from experiments.pictures import pyplot
from experiments.tables import markdown, mean_interval, spread

Runs = Mapping[str, Sequence[Cell]]

SHOWN = {
    "backprop": "backprop", "fixed": "20 queries, equal counts", "20_optimal": "20, optimal, widths, exact head",
    "2_equal": "2, equal counts, widths, exact head", "2_optimal": "2, optimal, widths, exact head",
    "queries_optimal": "chosen by queries, optimal, widths, exact head",
    "queries_muon": "chosen by queries, the same with Muon", "fixed_muon": "20 queries, equal counts, Muon",
}  # fmt: skip
GAIN = "allocation/J_over_J_equal"


def spent(cell: Cell, price: str) -> float:
    """What a run has spent: queries and clean passes, or forward-equivalents."""
    summary = cell.summary
    return summary["queries"] + summary["clean_passes"] if price == "queries" else summary["forward_equivalents"]


def lower_bound(differences: Sequence[float]) -> float:
    """One-sided 95 % bound of the mean; minus infinity for a single value."""
    if len(differences) < 2:
        return -math.inf
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.fmean(differences) - float(t.ppf(0.95, len(differences) - 1)) * error


def points(own: Sequence[Cell], base: Sequence[Cell]) -> list[float]:
    """Differences of the test accuracies in points, pair by pair."""
    pairs = zip(own, base, strict=True)
    return [100 * (a.summary["test_accuracy"] - b.summary["test_accuracy"]) for a, b in pairs]


def report(runs: Runs, rates: Mapping[str, float]) -> str:
    """Markdown: every arm against the reference, then the allocators at equal averages."""
    reference, rows = runs["fixed"], []
    base = {price: statistics.fmean(spent(cell, price) for cell in reference) for price in ("queries", "compute")}
    for name, cells in runs.items():
        row = [name, f"{rates[name]:g}", f"{statistics.fmean(cell.summary['steps'] for cell in cells):,.0f}"]
        for price in ("queries", "compute"):
            mean = statistics.fmean(spent(cell, price) for cell in cells)
            row.append(f"{mean / 1000:,.1f} k ({100 * (mean / base[price] - 1):+.0f} %)")
        own = points(cells, reference)
        difference = "-" if name == "fixed" else f"{statistics.fmean(own):+.2f} (>= {lower_bound(own):+.2f})"
        rows.append([*row, spread([cell.summary["test_accuracy"] for cell in cells]), difference])
    columns = ["budget / allocator", "learning rate", "steps", "queries and clean passes", "forward-equivalents",
               "test accuracy, mean (min - max)", "difference in points (95 % bound)"]  # fmt: skip
    splits = [split_row(runs, *pair) for pair in pairs(runs)]
    heads = ["queries of a sample and site", "allocator", "J_equal / J, first and last quarter of the steps", "equal",
             "its own", "difference in points (95 % interval)"]  # fmt: skip
    return markdown(columns, rows) + (f"\n{markdown(heads, splits)}" if splits else "")


def pairs(runs: Runs) -> Iterator[tuple[str, str]]:
    """Average and allocator of every arm with a fixed average whose equal counts ran as well."""
    for name in runs:
        average, _, allocator = name.partition("_")
        if average.isdigit() and allocator != "equal" and f"{average}_equal" in runs:
            yield average, allocator


def split_row(runs: Runs, average: str, allocator: str) -> list[str]:
    own, equal = runs[f"{average}_{allocator}"], runs[f"{average}_equal"]
    accuracies = [spread([cell.summary["test_accuracy"] for cell in cells]) for cells in (equal, own)]
    mean, low, high = mean_interval(points(own, equal))
    first, last = gains(own)
    return [average, allocator, f"{first:.2f}, {last:.2f}", *accuracies, f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"]


def gains(cells: Sequence[Cell]) -> tuple[float, float]:
    """Geometric mean of ``J_equal / J`` by the allocator's own traces, over the first and last quarter of the steps."""
    first, last = [], []
    for cell in cells:
        logs = [-math.log(max(event.value, 1e-12)) for event in cell.curve(GAIN)]
        first.append(late_mean(logs[::-1]))
        last.append(late_mean(logs))
    return math.exp(statistics.fmean(first)), math.exp(statistics.fmean(last))


def draw(runs: Runs, folder: Path) -> None:
    """Validation accuracy against what is spent, means over the seeds, and what allocation adds by average."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=[1.4, 1])
    for name in (name for name in SHOWN if name in runs):
        cells = runs[name]
        if name == "backprop":
            accuracy = 100 * statistics.fmean(cell.curve("val/accuracy")[-1].value for cell in cells)
            left.axhline(accuracy, color="black", linestyle="--", linewidth=0.8, label=SHOWN[name])
            continue
        curves = [spent_curve(cell) for cell in cells]
        length = min(map(len, curves))
        x, y = ([statistics.fmean(curve[i][axis] for curve in curves) for i in range(length)] for axis in (0, 1))
        left.plot(x, [100 * value for value in y], label=SHOWN[name], marker=".")
    left.set(xscale="log", xlabel="queries and clean passes", ylabel="validation accuracy, %")
    left.legend(fontsize=7)
    found: dict[str, dict[int, tuple[float, float, float]]] = {}
    for average, allocator in pairs(runs):
        own = points(runs[f"{average}_{allocator}"], runs[f"{average}_equal"])
        found.setdefault(allocator, {})[int(average)] = mean_interval(own)
    for allocator, by_average in found.items():
        means, low, high = map(list, zip(*by_average.values(), strict=True))
        errors = [[m - a for m, a in zip(means, low, strict=True)], [b - m for m, b in zip(means, high, strict=True)]]
        right.errorbar(list(by_average), means, yerr=errors, marker="o", capsize=3, label=allocator)
    right.axhline(0.0, color="gray", linewidth=0.8)
    right.set(xscale="log", xlabel="queries of a sample and site", ylabel="test accuracy: points above equal counts")
    ticks = sorted({average for each in found.values() for average in each})
    right.set_xticks(ticks, [str(tick) for tick in ticks])
    right.minorticks_off()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(folder / "budget.png", dpi=110)
    plt.close(figure)


def spent_curve(cell: Cell) -> list[tuple[float, float]]:
    """Queries and clean passes so far, in proportion to the steps of a run, and validation accuracy."""
    by_step = {event.step: event.value for event in cell.curve("queries/total")}
    last, total, clean = max(by_step), cell.summary["queries"], cell.summary["clean_passes"]
    curve = []
    for event in cell.curve("val/accuracy"):
        step = min(event.step, last)
        queries: Any = by_step.get(step, total * step / last)
        curve.append((queries + clean * (step + 1) / (last + 1), event.value))
    return curve
