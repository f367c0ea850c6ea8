"""``python -m experiments.sigma_and_head --output DIR``: what per-token sigma and the exact head are worth.

**Variance**: the network of a configuration is trained with equal counts as it is configured; at a series of
checkpoints the gradient of the same batches is estimated again and again with each setting, and the variance of the
estimate summed over the parameters. The widths of tokens are learned at the checkpoint, from queries on other batches.
**Accuracy**: every setting trains from the same start, seed by seed, by ``main.py fit`` in processes of their own.

The exact head is shown twice: without the queries that it saves, and with them given to the other sites, so that the
queries are equal.

Interrupted, it goes on when started again. Writes ``variance.csv``, ``accuracy.csv`` and ``sigma_and_head.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from experiments.allocation import Run
from experiments.allocation_scores import T95
from experiments.fewer_queries import read_curve
from experiments.sigma_and_head_variance import (
    BASE,
    Settings,
    append,
    compared,
    measure_variances,
    ratio,
    read_table,
    variance_table,
)

CONFIGS = ("configs/vit_tiny_digits.yaml", "configs/digits/equal.yaml")
ACCURACY_COLUMNS = ("setting", "seed", "queries_per_sample", "late_loss", "test_accuracy")


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        setting: Name of the setting.
        settings: What it changes of the strategy.
        seed: Seed of the run.
        output: Folder of the study.
    """

    setting: str
    settings: Settings
    seed: int
    output: Path

    @property
    def folder(self) -> Path:
        """Where its files go."""
        return self.output / self.setting.replace(", ", "_").replace(" ", "_") / f"seed_{self.seed}"

    def row(self, configs: Sequence[str], extra: Sequence[str], threads: int) -> tuple[Any, ...]:
        """Its row of ``accuracy.csv``, from a run that is made if there is none.

        Raises:
            RuntimeError: the run failed; its output is in ``log.txt`` of its folder.
        """
        if not list(self.folder.rglob("summary.json")):
            shutil.rmtree(self.folder, ignore_errors=True)  # what an interrupted run left
            self.folder.mkdir(parents=True)
            overlay = self.folder / "setting.yaml"
            strategy = {"strategy": {"init_args": dict(self.settings)}}
            overlay.write_text(yaml.safe_dump({"model": {"init_args": strategy}}))
            own = {
                "seed_everything": self.seed,
                "trainer.default_root_dir": self.folder,
                "trainer.enable_progress_bar": "false",
                "trainer.log_every_n_steps": 1,
            }
            command = [sys.executable, "main.py", "fit", *config_arguments([*configs, str(overlay)])]
            command += [part for name, value in own.items() for part in (f"--{name}", str(value))]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            with (self.folder / "log.txt").open("w") as log:
                done = subprocess.run([*command, *extra], stdout=log, stderr=log, env=environment, check=False)
            if done.returncode:
                raise RuntimeError(f"{self.folder}: exit code {done.returncode}, see log.txt there")
        (summary,) = self.folder.rglob("summary.json")
        spent = json.loads(summary.read_text())["queries_per_sample"]
        curve = read_curve(self.folder)
        return (self.setting, self.seed, spent, curve.late_loss, curve.test_accuracy)


def config_arguments(files: Sequence[str]) -> list[str]:
    """Configuration files as arguments."""
    return [part for file in files for part in ("--config", file)]


def difference(own: Sequence[float], base: Sequence[float]) -> str:
    """Mean of the differences in points, seed by seed, with its 95 % interval (Student's t)."""
    points = [100 * (a - b) for a, b in zip(own, base, strict=True)]
    if len(points) < 2:
        return f"{points[0]:+.1f}"
    mean, half = statistics.fmean(points), T95[len(points) - 1] * statistics.stdev(points) / math.sqrt(len(points))
    return f"{mean:+.1f} ({mean - half:+.1f} to {mean + half:+.1f})"


def accuracy_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown: every setting against the one without either, seed by seed."""
    by_setting: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        by_setting.setdefault(row["setting"], []).append(row)
    names = [
        "setting", "queries a sample", "test accuracy, mean (min - max)", "difference, points",
        "training loss, last quarter", "ratio",
    ]  # fmt: skip
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for setting, own in by_setting.items():
        base = by_setting[BASE]
        accuracy, loss = ([float(row[column]) for row in own] for column in ("test_accuracy", "late_loss"))
        compared_with = [[float(row[column]) for row in base] for column in ("test_accuracy", "late_loss")]
        itself = setting == BASE
        cells = [
            setting,
            f"{float(own[0]['queries_per_sample']):g}",
            f"{statistics.fmean(accuracy):.1%} ({min(accuracy):.1%} - {max(accuracy):.1%})",
            "" if itself else difference(accuracy, compared_with[0]),
            f"{statistics.fmean(loss):.3f}",
            "" if itself else ratio([a / b for a, b in zip(loss, compared_with[1], strict=True)]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(args: Sequence[str] | None = None) -> None:
    """Run the study."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m experiments.sigma_and_head", description=summary)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and of the tables")
    parser.add_argument("--config", action="append", help=f"configuration file; may be repeated (default {CONFIGS})")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1 (default 5)")
    parser.add_argument("--checkpoints", type=int, default=3, help="checkpoints of the variance (default 3)")
    parser.add_argument("--batches", type=int, default=5, help="batches measured at each (default 5)")
    parser.add_argument("--draws", type=int, default=20, help="estimates of each batch (default 20)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of a run (default: all)")
    parser.add_argument("extra", nargs="*", help="further arguments of main.py fit, after --")
    options = parser.parse_args(args)
    configs = options.config or list(CONFIGS)
    if not Path(configs[0]).is_file():
        parser.error(f"{configs[0]} is not here: start this from the root of a checkout.")
    arguments = [*config_arguments(configs), *options.extra]
    options.output.mkdir(parents=True, exist_ok=True)
    plan, kept = options.output / "plan.txt", repr((arguments, options.checkpoints, options.batches, options.draws))
    if plan.exists() and plan.read_text() != kept:
        parser.error(f"{options.output} holds another study, {plan.read_text()}: give another folder, or remove it.")
    plan.write_text(kept)
    variance, accuracy = options.output / "variance.csv", options.output / "accuracy.csv"
    torch.set_num_threads(options.threads)
    measure_variances(
        arguments, variance, checkpoints=options.checkpoints, batches=options.batches, draws=options.draws
    )  # fmt: skip
    settings = compared(Run(arguments).strategy)
    cells = [Cell(name, settings[name], seed, options.output) for seed in range(options.seeds) for name in settings]
    done = {(row["setting"], int(row["seed"])) for row in read_table(accuracy)}
    for i, cell in enumerate(cells, start=1):
        if (cell.setting, cell.seed) in done:
            continue
        row = cell.row(configs, options.extra, options.threads)
        append(accuracy, ACCURACY_COLUMNS, [row])
        print(f"[{i}/{len(cells)}] {cell.folder}: test accuracy {row[-1]:.1%}", flush=True)
    text = f"{variance_table(read_table(variance))}\n{accuracy_table(read_table(accuracy))}"
    (options.output / "sigma_and_head.md").write_text(text)
    print(f"\n{text}\nwritten to {options.output}")


if __name__ == "__main__":
    main()
