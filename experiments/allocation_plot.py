"""The picture of the allocation study."""

from __future__ import annotations

import csv
from pathlib import Path

from flops_lightning.errors import SettingError

SHOWN = (
    "bernoulli",
    "gaussian",
    "gaussian, pilots lowest",
    "optimal",
    "optimal, loss only",
    "optimal, both",
    "cost-aware",
)
BUDGET = "20"


def draw(output: Path) -> None:
    """Gains along the run at one budget, and by budget at the last checkpoint, from ``allocation.csv``.

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

    with (output / "allocation.csv").open() as file:
        rows = list(csv.DictReader(file))
    budgets = sorted({row["budget"] for row in rows}, key=int)
    budget = BUDGET if BUDGET in budgets else budgets[-1]
    last = rows[-1]["checkpoint"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axes, key, kept in (
        (left, "checkpoint", [row for row in rows if row["budget"] == budget]),
        (right, "budget", [row for row in rows if row["checkpoint"] == last]),
    ):
        for name in SHOWN:
            own = [row for row in kept if row["allocator"] == name]
            x = [int(row[key]) for row in own]
            (line,) = axes.plot(x, [float(row["gain"]) for row in own], marker="o", markersize=3, label=name)
            low, high = ([float(row[column]) for row in own] for column in ("gain_low", "gain_high"))
            axes.fill_between(x, low, high, alpha=0.12, color=line.get_color(), linewidth=0)
        ideal = [row for row in kept if row["allocator"] == "equal"]
        x = [int(row[key]) for row in ideal]
        axes.plot(x, [float(row["gain_optimal"]) for row in ideal], "k--", label="exact traces")
        axes.axhline(1.0, color="gray", linewidth=0.8)
        axes.set(yscale="log")
        axes.grid(alpha=0.3, which="both")
    left.set(xlabel="optimiser step", ylabel="gain: J of equal counts / J", title=f"{budget} queries a sample and site")
    right.set(xlabel="queries a sample and site", xscale="log", title=f"at step {last}")
    left.legend(fontsize=7)
    figure.savefig(output / "allocation.png", dpi=110)
    plt.close(figure)
