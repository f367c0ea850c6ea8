"""The picture of the comparison of strategies."""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from experiments.strategies_budget import BUDGETS
from flops_lightning.errors import SettingError


def draw(output: Path) -> None:
    """Test accuracy under both budgets, and cosines, from ``strategies.csv`` and ``cosines.csv``.

    Raises:
        SettingError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise SettingError(
            "matplotlib", None, "is not installed; the tables are written.", 'Run pip install "matplotlib>=3.8".'
        ) from error
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    runs, cosines = (_read(output / name) for name in ("strategies.csv", "cosines.csv"))
    methods = list(dict.fromkeys(row["method"] for row in (*runs, *cosines)))
    height = 1.5 + 0.32 * len(methods)
    figure, axes = plt.subplots(1, 3, figsize=(13, height), layout="constrained", sharey=True)
    for axis, (budget, title) in zip(axes, BUDGETS.items(), strict=False):
        values = _grouped([row for row in runs if row["budget"] == budget and row["accuracy"]], "accuracy")
        for method, accuracies in values.items():
            y = methods.index(method)
            axis.plot([min(accuracies), max(accuracies)], [y, y], color="C0", linewidth=1.5)
            axis.plot(statistics.fmean(accuracies), y, "o", color="C0", markersize=5)
        for method in set(methods) - set(values):
            axis.text(
                0.02, methods.index(method), "no run", transform=axis.get_yaxis_transform(), va="center", fontsize=7
            )
        axis.set(xlabel="test accuracy, mean and range", title=title, xlim=(0, 1))
    for where, marker in (("start", "o"), ("end", "s")):
        values = _grouped([row for row in cosines if row["weights"] == where], "cosine")
        means = {method: mean for method, each in values.items() if (mean := statistics.fmean(each)) > 0}
        axes[2].plot(
            list(means.values()), [methods.index(m) for m in means], marker, label=f"at the {where}", markersize=5
        )
    axes[2].set(xlabel="cosine of a step's estimate with the gradient", xscale="log", title="direction")
    axes[2].legend(fontsize=7)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(output / "strategies.png", dpi=110)
    plt.close(figure)


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def _grouped(rows: list[dict[str, Any]], column: str) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        groups[row["method"]].append(float(row[column]))
    return dict(groups)
