"""Pictures of the studies, drawn from their tables; matplotlib is an extra."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.harness import Cell
from experiments.strategies_table import KINDS
from experiments.tables import read_csv
from flops_lightning.allocators import GaussianAllocator, QueryBudget, SampleStatistics
from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.errors import SettingError, import_extra
from flops_lightning.tasks import ForwardImageClassifier

SHOWN_ALLOCATORS = (
    "bernoulli", "gaussian", "gaussian, pilots lowest", "optimal", "optimal, loss only", "optimal, both", "cost-aware",
)  # fmt: skip
SHOWN_BUDGET = "20"


def pyplot() -> Any:
    """Matplotlib's pyplot, without a display; raises a :class:`SettingError` if it is not installed."""
    import_extra("matplotlib", extra="plots", setting="pictures", value="matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_if_possible(draw: Callable[[Path], None], output: Path) -> None:
    """Draw; without matplotlib say so, for hours of runs must not end in an error."""
    try:
        draw(output)
    except SettingError as error:
        print(f"no picture: {error} The tables are written.")


def draw_allocation(output: Path) -> None:
    """Gains along the run at one budget, and by budget at the last checkpoint, from ``allocation.csv``."""
    plt, rows = pyplot(), read_csv(output / "allocation.csv")
    budgets = sorted({row["budget"] for row in rows}, key=int)
    budget, last = SHOWN_BUDGET if SHOWN_BUDGET in budgets else budgets[-1], rows[-1]["checkpoint"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axes, key, kept in (
        (left, "checkpoint", [row for row in rows if row["budget"] == budget]),
        (right, "budget", [row for row in rows if row["checkpoint"] == last]),
    ):
        for name in SHOWN_ALLOCATORS:
            own = [row for row in kept if row["allocator"] == name]
            x = [int(row[key]) for row in own]
            (line,) = axes.plot(x, [float(row["gain"]) for row in own], marker="o", markersize=3, label=name)
            low, high = ([float(row[column]) for row in own] for column in ("gain_low", "gain_high"))
            axes.fill_between(x, low, high, alpha=0.12, color=line.get_color(), linewidth=0)
        ideal = [row for row in kept if row["allocator"] == "equal"]
        gains = [float(row["gain_optimal"]) for row in ideal]
        axes.plot([int(row[key]) for row in ideal], gains, "k--", label="exact traces")
        axes.axhline(1.0, color="gray", linewidth=0.8)
        axes.set(yscale="log")
        axes.grid(alpha=0.3, which="both")
    left.set(xlabel="optimiser step", ylabel="gain: J of equal counts / J")
    left.set(title=f"{budget} queries per sample and site")
    right.set(xlabel="queries per sample and site", xscale="log", title=f"at step {last}")
    left.legend(fontsize=7)
    figure.savefig(output / "allocation.png", dpi=110)
    plt.close(figure)


def extreme_digits(checkpoint: Path, shown: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images ``(2 * shown, 8, 8)``, labels and counts of the samples with the most and the fewest queries."""
    task = ForwardImageClassifier.load_from_checkpoint(checkpoint, weights_only=True, map_location="cpu")
    data = DigitsDataModule(batch_size=64, rotation=40.0)
    data.setup("test")
    images, labels = next(iter(data.test_dataloader()))
    with torch.no_grad():
        logits = task(images)
        embedding = task.network.run(images, 0, len(task.network) - 1)
    error = logits.softmax(dim=1) - torch.nn.functional.one_hot(labels, 10)
    trace = error.square().sum(dim=1)  # the squared gradient at the logits stands in for pilots
    known = SampleStatistics(loss=task.loss(logits, labels), embedding=embedding, trace=trace)
    counts = GaussianAllocator().allocate(known, QueryBudget((20,))).counts[0]
    order = counts.argsort(descending=True, stable=True)
    extreme = torch.cat([order[:shown], order[-shown:]])
    return images[extreme, 0], labels[extreme], counts[extreme]


def draw_quickstart(runs: Mapping[tuple[str, int], Cell], output: Path) -> None:
    """Validation accuracy along the runs, median and range over the seeds; the hardest and the easiest test digits.

    Of one batch of turned digits, these get the most and the fewest queries from the Gaussian allocator, with the
    weights at the end of the first run.
    """
    figure = pyplot().figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.25, 1])
    axes = left.subplots()
    for variant in dict.fromkeys(name for name, _ in runs):
        curves = [cell.curve("val/accuracy") for (name, _), cell in runs.items() if name == variant]
        steps = [event.step + 1 for event in curves[0]]
        by_step = [[100 * event.value for event in events] for events in zip(*curves, strict=True)]
        (line,) = axes.plot(steps, [statistics.median(values) for values in by_step], label=variant)
        low, high = [min(values) for values in by_step], [max(values) for values in by_step]
        axes.fill_between(steps, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    axes.set(xlabel="optimiser step", ylabel="validation accuracy, %", ylim=(0, 100))
    axes.set_title(f"digits turned by 40°, median and range of {len(curves)} seeds", fontsize=10)
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.3)
    first = next(iter(runs.values()))
    images, labels, counts = extreme_digits(next(first.folder.rglob("*.ckpt")), shown=6)
    for i, axis in enumerate(right.subplots(2, len(images) // 2).flat):
        axis.imshow(images[i].numpy(), cmap="gray_r")
        axis.set_title(f"{int(counts[i])}", fontsize=11)
        axis.set_xlabel(f"a {int(labels[i])}", fontsize=9)
        axis.set(xticks=[], yticks=[])
    right.suptitle("queries of the hardest and the easiest of 64 samples (20 on average)", fontsize=10)
    figure.savefig(output / "quickstart.png", dpi=110)


def draw_strategies(output: Path) -> None:
    """Test accuracy at the largest budget of each kind, and cosines, from ``strategies.csv`` and ``cosines.csv``."""
    plt, runs, cosines = pyplot(), read_csv(output / "strategies.csv"), read_csv(output / "cosines.csv")
    methods = list(dict.fromkeys(row["method"] for row in (*runs, *cosines)))
    largest = max(float(row["share"]) for row in runs)
    kinds = [kind for kind in KINDS if any(row["budget"] == kind for row in runs)]
    size = (4.5 * len(kinds) + 4, 1.5 + 0.32 * len(methods))
    figure, axes = plt.subplots(1, len(kinds) + 1, figsize=size, layout="constrained", sharey=True)
    for axis, kind in zip(axes, kinds, strict=False):
        own = (row for row in runs if (row["budget"], float(row["share"])) == (kind, largest) and row["accuracy"])
        values = _by_method(own, "accuracy")
        for method, accuracies in values.items():
            y = methods.index(method)
            axis.plot([min(accuracies), max(accuracies)], [y, y], color="C0", linewidth=1.5)
            axis.plot(statistics.fmean(accuracies), y, "o", color="C0", markersize=5)
        place = {"transform": axis.get_yaxis_transform(), "va": "center", "fontsize": 7}
        for method in set(methods) - set(values):
            axis.text(0.02, methods.index(method), "no run", **place)
        axis.set(xlabel="test accuracy, mean and range", title=KINDS[kind], xlim=(0, 1))
    for where, marker in (("start", "o"), ("end", "s")):
        values = _by_method((row for row in cosines if row["weights"] == where), "cosine")
        means = {method: mean for method, each in values.items() if (mean := statistics.fmean(each)) > 0}
        heights = [methods.index(method) for method in means]
        axes[-1].plot(list(means.values()), heights, marker, label=f"at the {where}", markersize=5)
    axes[-1].set(xlabel="cosine of a step's estimate with the gradient", xscale="log", title="direction")
    axes[-1].legend(fontsize=7)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(output / "strategies.png", dpi=110)
    plt.close(figure)


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points ``(cost, accuracy)`` that no other beats or equals at lower cost, the cheapest first."""
    best, found = -math.inf, []
    for name, (_, accuracy) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if accuracy > best:
            best = accuracy
            found.append(name)
    return found


def draw_pareto(output: Path) -> None:
    """Accuracy (mean and range) against queries and against compute, from ``strategies.csv``; a line joins the best.

    A method without queries is a level in the first picture.
    """
    plt, rows = pyplot(), [row for row in read_csv(output / "strategies.csv") if row["accuracy"]]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    style = {name: {"color": f"C{i % 10}", "marker": "osD^v"[i // 10]} for i, name in enumerate(methods)}
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
    for axis, cost, label in zip(axes, KINDS, ("queries", "forward-equivalents"), strict=True):
        cells = {f"{row['method']} {row['budget']} {row['share']}": row["method"] for row in rows}
        points = {}
        for cell, method in cells.items():
            own = [row for row in rows if f"{row['method']} {row['budget']} {row['share']}" == cell]
            accuracies = [100 * float(row["accuracy"]) for row in own]
            mean, spent = statistics.fmean(accuracies), statistics.fmean(float(row[cost]) for row in own)
            if not spent:
                axis.axhline(mean, color=style[method]["color"], linestyle=":", linewidth=1)
                continue
            points[cell] = spent, mean
            bar = [[mean - min(accuracies)], [max(accuracies) - mean]]
            axis.errorbar(spent, mean, bar, **style[method], markersize=5, linewidth=1)
        best = [points[cell] for cell in pareto(points)]
        axis.plot([x for x, _ in best], [y for _, y in best], color="0.6", linewidth=1, zorder=0)
        axis.set(xlabel=label, xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy, %, mean and range")
    handles = [plt.Line2D([], [], linestyle="", label=name, **style[name]) for name in methods]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    figure.savefig(output / "pareto.png", dpi=110)
    plt.close(figure)


def _by_method(rows: Iterable[Mapping[str, str]], column: str) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        groups[row["method"]].append(float(row[column]))
    return groups
