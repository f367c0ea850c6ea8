"""``python -m experiments.quickstart --output DIR``: the quickstart and its alternatives, several seeds.

Each cell is one run of ``main.py fit`` in a process of its own, with its settings and ``summary.json`` kept under
``DIR``. A cell whose summary exists is not run again. The table is written to ``DIR/quickstart.md`` and
``DIR/quickstart.csv``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BASE = "configs/vit_tiny_digits.yaml"
VARIANTS = {
    "OPS-LR (GaussianAllocator)": (),
    "LR (EqualAllocator)": ("configs/digits/equal.yaml",),
    "OPS-LR, head only": ("configs/digits/head_only.yaml",),
    "OPS-LR, linear sites": ("configs/digits/linear.yaml",),
    "backprop": ("configs/digits/backprop.yaml",),
}
COLUMNS = (
    "start_accuracy",
    "test_accuracy",
    "queries_per_sample",
    "queries",
    "forward_equivalents",
    "lost_queries",
    "train_seconds",
)


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    variant: str
    overlays: tuple[str, ...]
    seed: int

    def folder(self, output: Path) -> Path:
        """Where its files go."""
        stem = Path(self.overlays[-1]).stem if self.overlays else "ops_lr"
        return output / stem / f"seed_{self.seed}"

    def command(self, output: Path, extra: Sequence[str]) -> list[str]:
        """The command line that makes it."""
        configs = [part for file in (BASE, *self.overlays) for part in ("--config", file)]
        root = ["--trainer.default_root_dir", str(self.folder(output)), "--trainer.enable_progress_bar", "false"]
        return [sys.executable, "main.py", "fit", *configs, "--seed_everything", str(self.seed), *root, *extra]

    def summary(self, output: Path) -> dict[str, Any] | None:
        """What the run wrote; None if it has not ended."""
        files = sorted(self.folder(output).rglob("summary.json"))
        return json.loads(files[-1].read_text()) if files else None


def run_cell(cell: Cell, output: Path, extra: Sequence[str], threads: int) -> str:
    """Run one cell unless its summary is there; return a line about it.

    Raises:
        RuntimeError: the run failed; its output is in ``log.txt`` of its folder.
    """
    if cell.summary(output) is None:
        folder = cell.folder(output)
        folder.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with (folder / "log.txt").open("w") as log:
            command = cell.command(output, extra)
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=False)
        if done.returncode or cell.summary(output) is None:
            raise RuntimeError(f"{cell.variant}, seed {cell.seed}: exit code {done.returncode}, see {folder}/log.txt")
    summary = cell.summary(output) or {}
    return f"{cell.variant}, seed {cell.seed}: {summary['test_accuracy']:.1%} in {summary['train_seconds']:.0f} s"


def table(cells: Sequence[Cell], output: Path) -> str:
    """Markdown table: median and range over the seeds, queries of every site."""
    lines = [
        "| run | test accuracy, median (min - max) | at the start | queries a sample and step, by site | queries "
        "| forward-equivalents | training time, s (median) |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in dict.fromkeys(cell.variant for cell in cells):
        rows = [s for c in cells if c.variant == variant and (s := c.summary(output)) is not None]
        accuracy = [row["test_accuracy"] for row in rows]
        seconds = statistics.median(row["train_seconds"] for row in rows)
        lines.append(
            f"| {variant} | {statistics.median(accuracy):.1%} ({min(accuracy):.1%} - {max(accuracy):.1%}) "
            f"| {rows[0]['start_accuracy']:.1%} | {_by_site(rows[0])} | {rows[0]['queries']:,} "
            f"| {rows[0]['forward_equivalents']:,.0f} | {seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def _by_site(summary: dict[str, Any]) -> str:
    total, per_sample = summary["queries"], summary["queries_per_sample"]
    sites = {site: per_sample * queries / total for site, queries in summary["queries_by_site"].items()}
    if len(sites) > 6 and len(set(sites.values())) == 1:
        return f"{next(iter(sites.values())):g} at each of {len(sites)} layers"
    return ", ".join(f"{site} {queries:g}" for site, queries in sites.items()) or "none"


def main(args: Sequence[str] | None = None) -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(prog="python -m experiments.quickstart", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and of the table")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1 (default 5)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the cores (default 1)")
    parser.add_argument("extra", nargs="*", help="further arguments of main.py, after --")
    options = parser.parse_args(args)
    if not Path(BASE).is_file():
        parser.error(f"{BASE} is not here: start this from the root of a checkout.")
    cells = [Cell(v, overlays, seed) for seed in range(options.seeds) for v, overlays in VARIANTS.items()]
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    with ThreadPoolExecutor(options.jobs) as pool:
        for i, line in enumerate(
            pool.map(lambda cell: run_cell(cell, options.output, options.extra, threads), cells), start=1
        ):
            print(f"[{i}/{len(cells)}] {line}", flush=True)
    text = table(cells, options.output)
    (options.output / "quickstart.md").write_text(text)
    with (options.output / "quickstart.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("run", "seed", *COLUMNS))
        for cell in cells:
            summary = cell.summary(options.output) or {}
            writer.writerow((cell.variant, cell.seed, *(summary[column] for column in COLUMNS)))
    print(f"\n{text}\nwritten to {options.output}")


if __name__ == "__main__":
    main()
