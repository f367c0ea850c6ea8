"""The picture of Table 3: accuracy, and the share kept, against the strength of noise and of attacks."""

from pathlib import Path

from experiments.pictures import pyplot
from experiments.tables import mean_interval, read_csv

SHOWN = {
    "gaussian": "standard deviation of Gaussian noise, of pixels in [0, 1]",
    "fgsm": "FGSM's eps, in 255ths",
}
MEASURES = {"accuracy": "accuracy, %", "kept": "kept of those read correctly, %"}


def draw_robustness(output: Path) -> None:
    """A row for each measure, a column for each perturbation, a line for each method, from ``table3.csv``.

    The first data set; means over seeds, with 95 % intervals.
    """
    plt, rows = pyplot(), read_csv(output / "table3.csv")
    if not rows:
        return
    rows = [row for row in rows if row["data_set"] == rows[0]["data_set"]]
    size = (4.2 * len(SHOWN), 3.0 * len(MEASURES))
    figure, axes = plt.subplots(len(MEASURES), len(SHOWN), figsize=size, layout="constrained", squeeze=False)
    for line, (measure, label) in zip(axes, MEASURES.items(), strict=True):
        for axis, (kind, strength) in zip(line, SHOWN.items(), strict=True):
            for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
                own = [row for row in rows if row["method"] == method]
                found: dict[float, list[float]] = {}
                for row in own:
                    name, _, level = row["name"].rpartition("_")
                    if name == kind or row["name"] == "clean":
                        found.setdefault(float(level) if name else 0.0, []).append(100 * float(row[measure]))
                levels = sorted(found)
                means, low, high = zip(*(mean_interval(found[level]) for level in levels), strict=True)
                axis.plot(levels, means, marker="o", markersize=3, color=f"C{i}", label=method)
                axis.fill_between(levels, low, high, alpha=0.12, color=f"C{i}", linewidth=0)
            axis.set(xlabel=strength, ylabel=label)
            axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=7)
    figure.savefig(output / "table3.png", dpi=110)
    plt.close(figure)
