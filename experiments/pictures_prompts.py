"""The picture of Table 2: what each method gains over the manual prompt, a dot for each seed."""

from pathlib import Path

from experiments.pictures import pyplot
from experiments.tables import read_csv

MANUAL = ("manual", "manual_ensembled")
MEASURES = {  # of table2.csv: label, factor, and where there is a value before the first step
    "test_accuracy": ("test accuracy,\npoints above manual", 100.0, "start_accuracy"),
    "test_loss": ("test loss\nless that of manual", 1.0, ""),
}


def draw_table2(output: Path) -> None:
    """A column for each data set, from ``table2.csv``: differences to the manual prompt (one template), seed by seed.

    Lines are means; open dots, where nothing is learned yet. Data sets without the manual row are left out.
    """
    plt = pyplot()
    rows = [row for row in read_csv(output / "table2.csv") if row["test_accuracy"]]
    manual = {(r["backbone"], r["data_set"], r["seed"]): r for r in rows if r["method"] == MANUAL[0]}
    # Where all seeds test the same images there is one for all.
    any_seed = {(backbone, data_set): row for (backbone, data_set, _), row in manual.items()}
    sets = list(dict.fromkeys(data_set for _, data_set in any_seed))
    if not sets:
        return
    size = (4.6 * len(sets), 2.9 * len(MEASURES))
    figure, axes = plt.subplots(len(MEASURES), len(sets), figsize=size, layout="constrained", squeeze=False)
    for line, (measure, (label, factor, start)) in zip(axes, MEASURES.items(), strict=True):
        for axis, data_set in zip(line, sets, strict=True):
            shown = [r for r in rows if r["data_set"] == data_set and (r["backbone"], data_set) in any_seed]
            places = [p for p in dict.fromkeys((r["backbone"], r["method"]) for r in shown) if p[1] != MANUAL[0]]
            for i, (backbone, method) in enumerate(places):
                own = [row for row in shown if (row["backbone"], row["method"]) == (backbone, method)]
                base = [manual.get((backbone, data_set, r["seed"]), any_seed[backbone, data_set]) for r in own]
                pairs = list(zip(own, base, strict=True))
                gains = [factor * (float(row[measure]) - float(of[measure])) for row, of in pairs]
                axis.plot([i] * len(gains), gains, "o", markersize=5, alpha=0.7, color=f"C{i}")
                axis.hlines(sum(gains) / len(gains), i - 0.3, i + 0.3, color=f"C{i}")
                if start and method not in MANUAL:
                    before = [factor * (float(row[start]) - float(of[measure])) for row, of in pairs]
                    axis.plot([i] * len(before), before, "o", markersize=4, color="gray", fillstyle="none")
            several = len({backbone for backbone, _ in places}) > 1
            names = [f"{backbone} {method}" if several else method for backbone, method in places]
            axis.axhline(0, color="black", linewidth=1)
            axis.set(title=data_set, ylabel=label)
            axis.set_xticks(range(len(names)), [name.replace("_", "\n") for name in names], fontsize=8)
            axis.grid(alpha=0.3, axis="y")
    figure.savefig(output / "table2.png", dpi=110)
    plt.close(figure)
