"""The picture of cosines by layer, with the panels of the paper's figures 4 and 6."""

from pathlib import Path

from experiments.pictures import pyplot
from experiments.tables import read_csv

PANELS = 3  # budgets shown, at most


def draw_fidelity(output: Path) -> None:
    """Cosine by layer, a line for each allocator: a row for each component and estimator, a column for each budget.

    From ``gradient_fidelity.csv``, at the last step.
    """
    plt, rows = pyplot(), [row for row in read_csv(output / "gradient_fidelity.csv") if row["cosine"]]
    if not rows:
        return
    rows = [row for row in rows if row["checkpoint"] == rows[-1]["checkpoint"]]
    kinds = list(dict.fromkeys((row["component"], row["estimator"]) for row in rows))
    budgets = sorted({row["budget"] for row in rows}, key=int)
    budgets = [budgets[round(i * (len(budgets) - 1) / (PANELS - 1))] for i in range(PANELS)]
    budgets = list(dict.fromkeys(budgets))
    size = (3.6 * len(budgets) + 1.6, 2.4 * len(kinds))
    figure, axes = plt.subplots(
        len(kinds), len(budgets), figsize=size, layout="constrained", sharex=True, squeeze=False
    )
    names = list(dict.fromkeys(row["allocator"] for row in rows))
    for line, (component, estimator) in zip(axes, kinds, strict=True):
        for axis, budget in zip(line, budgets, strict=True):
            for i, name in enumerate(names):
                key = (component, estimator, budget, name)
                own = [r for r in rows if (r["component"], r["estimator"], r["budget"], r["allocator"]) == key]
                layers, cosines = [int(r["layer"]) for r in own], [float(r["cosine"]) for r in own]
                axis.plot(layers, cosines, marker="o", markersize=3, color=f"C{i}", label=name)
                low, high = ([float(r[f"cosine_{end}"] or r["cosine"]) for r in own] for end in ("low", "high"))
                axis.fill_between(layers, low, high, alpha=0.12, color=f"C{i}", linewidth=0)
            axis.set_title(f"{component}, {estimator}, {budget} queries", fontsize=9)
            axis.grid(alpha=0.3)
        line[0].set_ylabel("predicted cosine")
    for axis in axes[-1]:
        axis.set_xlabel("layer")
    handles = [plt.Line2D([], [], color=f"C{i}", label=name) for i, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside right upper", fontsize=8)
    figure.savefig(output / "gradient_fidelity.png", dpi=110)
    plt.close(figure)
