"""The picture of Table 2: accuracy by method, a dot for each seed."""

from pathlib import Path

from experiments.pictures import pyplot
from experiments.tables import read_csv

MANUAL = {"manual": "--", "manual_ensembled": ":"}


def draw_table2(output: Path) -> None:
    """A panel for each data set, from ``table2.csv``: methods to the right, seeds as dots, their mean as a line.

    Dashed and dotted lines across are the manual prompts, open dots where nothing is learned yet.
    """
    plt, rows = pyplot(), read_csv(output / "table2.csv")
    sets = list(dict.fromkeys(row["data_set"] for row in rows))
    figure, axes = plt.subplots(1, len(sets), figsize=(4.6 * len(sets), 3.4), layout="constrained", squeeze=False)
    for axis, data_set in zip(axes[0], sets, strict=True):
        own = [row for row in rows if row["data_set"] == data_set and row["test_accuracy"]]
        methods = [m for m in dict.fromkeys(row["method"] for row in own) if m not in MANUAL]
        for i, method in enumerate(methods):
            values = [100 * float(row["test_accuracy"]) for row in own if row["method"] == method]
            starts = [100 * float(row["start_accuracy"]) for row in own if row["method"] == method]
            axis.plot([i] * len(values), values, "o", markersize=5, alpha=0.7, color=f"C{i}")
            axis.plot([i] * len(starts), starts, "o", markersize=4, color="gray", fillstyle="none")
            axis.hlines(sum(values) / len(values), i - 0.3, i + 0.3, color=f"C{i}")
        for method, style in MANUAL.items():
            values = [100 * float(row["test_accuracy"]) for row in own if row["method"] == method]
            if values:
                label = method.replace("_", ", ")
                axis.axhline(sum(values) / len(values), color="black", linewidth=1, linestyle=style, label=label)
        axis.set(title=data_set, ylabel="test accuracy, %")
        axis.set_xticks(range(len(methods)), methods, rotation=30)
        axis.grid(alpha=0.3, axis="y")
        axis.legend(fontsize=7)
    figure.savefig(output / "table2.png", dpi=110)
    plt.close(figure)
