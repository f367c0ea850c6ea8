"""``python -m experiments.quickstart --output DIR``: the quickstart and its alternatives, several seeds.

Finished runs are not repeated. Writes ``quickstart.md``, ``quickstart.csv`` and ``quickstart.png``.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from experiments.command_line import StudyParser, fit
from experiments.harness import Cell, run_all
from experiments.pictures import draw_if_possible, draw_quickstart
from experiments.tables import markdown, spread, write_csv, write_report

BASE = "configs/vit_tiny_digits.yaml"
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "OPS-LR (GaussianAllocator)": (),
    "LR (EqualAllocator)": ("configs/digits/equal.yaml",),
    "OPS-LR, head only": ("configs/digits/head_only.yaml",),
    "OPS-LR, linear sites": ("configs/digits/linear.yaml",),
    "backprop": ("configs/digits/backprop.yaml",),
}
COLUMNS = (
    "start_accuracy", "test_accuracy", "queries_per_sample", "queries", "forward_equivalents", "lost_queries",
    "train_seconds",
)  # fmt: skip


def cells(output: Path, seeds: int, extra: Sequence[str] = ()) -> dict[tuple[str, int], Cell]:
    folders = {variant: Path(files[-1]).stem if files else "ops_lr" for variant, files in VARIANTS.items()}
    return {
        (variant, seed): fit(
            output, f"{folders[variant]}/seed_{seed}", (BASE, *files), extra, {"seed_everything": seed},
            keeps_weights=True,
        )
        for seed, (variant, files) in product(range(seeds), VARIANTS.items())
    }  # fmt: skip


def by_site(summary: Mapping[str, Any]) -> str:
    """Queries per sample and step at each site."""
    share = summary["queries_per_sample"] / (summary["queries"] or 1)
    sites = {site: share * queries for site, queries in summary["queries_by_site"].items()}
    if len(sites) > 6 and len(set(sites.values())) == 1:
        return f"{next(iter(sites.values())):g} at each of {len(sites)} layers"
    return ", ".join(f"{site} {queries:g}" for site, queries in sites.items()) or "none"


def report(runs: Mapping[tuple[str, int], Cell]) -> str:
    """Markdown: median and range over the seeds, a row for each variant."""
    rows = []
    for variant in VARIANTS:
        own = [cell.summary for (name, _), cell in runs.items() if name == variant]
        rows.append([
            variant, spread([each["test_accuracy"] for each in own], statistics.median),
            f"{own[0]['start_accuracy']:.1%}", by_site(own[0]), f"{own[0]['queries']:,}",
            f"{own[0]['forward_equivalents']:,.0f}", f"{statistics.median(each['train_seconds'] for each in own):.0f}",
        ])  # fmt: skip
    columns = ["run", "test accuracy, median (min - max)", "at the start", "queries per sample and step, by site",
               "queries", "forward-equivalents", "training time, s (median)"]  # fmt: skip
    return markdown(columns, rows)


def study(options: argparse.Namespace) -> None:
    runs = cells(options.output, options.seeds, options.extra)
    if run_all([*runs.values()], **options.launch):
        rows = [(*key, *(cell.summary[column] for column in COLUMNS)) for key, cell in runs.items()]
        write_csv(options.output / "quickstart.csv", ("run", "seed", *COLUMNS), rows)
        draw_if_possible(partial(draw_quickstart, runs), options.output)
        write_report(options.output / "quickstart.md", report(runs))


def main(args: Sequence[str] | None = None) -> None:
    StudyParser(__doc__, seeds=(5, "seeds 0 to N-1")).run(study, args)


if __name__ == "__main__":
    main()
