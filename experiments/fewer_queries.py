"""``python -m experiments.fewer_queries --problem NAME --output DIR``: what allocation saves in training.

Every allocator trains the same network on the same batches with the same number of queries a step (``cost_aware``: the
same compute), by ``main.py fit`` in processes of their own. The learning rate is chosen for each allocator alike, by
the training loss of runs with seeds that are not used again. Then every allocator runs with the same seeds, and is
compared with equal counts seed by seed: the training loss over the last quarter of the run, and the queries and
forward-equivalents it took to a training loss and to a validation accuracy.

Finished runs are not repeated. Writes ``fewer_queries.md`` and ``fewer_queries.csv``.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from experiments.allocation_scores import interval

ALLOCATORS = ("equal", "bernoulli", "gaussian", "optimal", "cost_aware")
TUNING_SEEDS = (1000,)
SMOOTHED = 10
"""Steps over which the training loss is averaged."""


@dataclass(frozen=True)
class Problem:
    """What is trained.

    Attributes:
        configs: Configuration files.
        rates: Learning rates to choose from.
        losses: Training losses whose cost is reported, from early to late.
        accuracy: Validation accuracy whose cost is reported.
        extra: Further arguments.
    """

    configs: tuple[str, ...]
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    accuracy: float
    extra: tuple[str, ...] = ()


PROBLEMS: Mapping[str, Problem] = {
    "digits": Problem(
        ("configs/vit_tiny_digits.yaml",), (1e-3, 2e-3, 4e-3), (0.5, 0.1, 0.05, 0.03), 0.9,
        ("--trainer.val_check_interval", "5"),
    ),
    "cifar10": Problem(
        ("configs/vit_micro_cifar10.yaml",), (1e-3, 2e-3), (1.6, 1.4, 1.3), 0.5,
        (
            "--trainer.val_check_interval", "10", "--trainer.max_epochs", "1", "--data.init_args.batch_size", "32",
            "--data.init_args.images_per_class", "200", "--data.init_args.val_images", "300",
            "--data.init_args.test_images", "500",
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """One run.

    Attributes:
        steps: Optimiser steps at which the training loss was logged.
        loss: Training loss of these batches, before the step.
        queries: Queries so far.
        forward_equivalents: Compute so far.
        accuracy: ``(step, validation accuracy)``.
        test_accuracy: At the end.
    """

    steps: list[int]
    loss: list[float]
    queries: list[float]
    forward_equivalents: list[float]
    accuracy: list[tuple[int, float]]
    test_accuracy: float

    @cached_property
    def smooth(self) -> list[float]:
        """Mean loss of the last steps at each step."""
        return [statistics.fmean(self.loss[max(0, i + 1 - SMOOTHED) : i + 1]) for i in range(len(self.loss))]

    @property
    def late_loss(self) -> float:
        """Mean training loss over the last quarter of the run."""
        return statistics.fmean(self.loss[-(len(self.loss) // 4) :])

    def to_loss(self, target: float, spent: Sequence[float]) -> float:
        """What was spent until the smoothed loss fell to ``target``; NaN if it never did."""
        full = range(SMOOTHED - 1, len(self.loss))
        return next((spent[i] for i in full if self.smooth[i] <= target), math.nan)

    def to_accuracy(self, target: float, spent: Sequence[float]) -> float:
        """What was spent until the validation accuracy reached ``target``; NaN if it never did."""
        reached = next((step for step, accuracy in self.accuracy if accuracy >= target), math.inf)
        return next((value for step, value in zip(self.steps, spent, strict=True) if step >= reached), math.nan)


@dataclass(frozen=True)
class Cell:
    """One run of the study."""

    problem: Problem
    allocator: str
    rate: float
    seed: int
    output: Path = field(compare=False)
    extra: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """Where its files go."""
        return self.output / self.allocator / f"lr_{self.rate:g}" / f"seed_{self.seed}"

    def run(self, threads: int) -> Curve:
        """Its curve, from a run that is made if there is none.

        Raises:
            RuntimeError: the run failed; its output is in ``log.txt`` of its folder.
        """
        if not list(self.folder.rglob("summary.json")):
            self.folder.mkdir(parents=True, exist_ok=True)
            files = [*self.problem.configs, f"configs/allocators/{self.allocator}.yaml"]
            command = [sys.executable, "main.py", "fit", *(part for file in files for part in ("--config", file))]
            settings = {
                "seed_everything": self.seed,
                "trainer.default_root_dir": self.folder,
                "trainer.enable_progress_bar": "false",
                "trainer.log_every_n_steps": 1,
                "model.init_args.optimizer.lr": self.rate,
            }
            command += [part for name, value in settings.items() for part in (f"--{name}", str(value))]
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            with (self.folder / "log.txt").open("w") as log:
                done = subprocess.run(
                    [*command, *self.problem.extra, *self.extra], stdout=log, stderr=log, env=environment, check=False
                )
            if done.returncode:
                raise RuntimeError(f"{self.folder}: exit code {done.returncode}, see log.txt there")
        return read_curve(self.folder)


def read_curve(folder: Path) -> Curve:
    """The curve of a finished run, from its TensorBoard events and summary."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = folder.rglob("events.out.tfevents.*")
    reader = EventAccumulator(str(events), size_guidance={"scalars": 0})
    reader.Reload()
    (summary,) = folder.rglob("summary.json")
    loss = reader.Scalars("train/loss_step" if "train/loss_step" in reader.Tags()["scalars"] else "train/loss")
    named = {name: [event.value for event in reader.Scalars(name)] for name in QUANTITIES.values()}
    return Curve(
        steps=[event.step for event in loss],
        loss=[event.value for event in loss],
        queries=named["queries/total"],
        forward_equivalents=named["queries/forward_equivalents"],
        accuracy=[(event.step, event.value) for event in reader.Scalars("val/accuracy")],
        test_accuracy=json.loads(summary.read_text())["test_accuracy"],
    )


QUANTITIES = {"queries": "queries/total", "forward-equivalents": "queries/forward_equivalents"}


def queries_to_loss(curve: Curve, *, target: float) -> float:
    """Queries until the smoothed training loss fell to ``target``."""
    return curve.to_loss(target, curve.queries)


def compare(own: Sequence[float], equal: Sequence[float]) -> str:
    """Geometric mean of the ratios to equal counts, seed by seed, with its 95 % interval; how many never got there."""
    pairs = [a / b for a, b in zip(own, equal, strict=True) if math.isfinite(a) and math.isfinite(b)]
    missed = sum(not math.isfinite(a) for a in own)
    if not pairs:
        return f"not reached ({missed} of {len(own)})"
    mean, low, high = interval(pairs)
    note = f", {missed} of {len(own)} never" if missed else ""
    return f"{mean:.2f} ({low:.2f} - {high:.2f}{note})"


def table(problem: Problem, curves: Mapping[str, Sequence[Curve]], rates: Mapping[str, float]) -> str:
    """Markdown: every allocator against equal counts."""
    columns: dict[str, Callable[[Curve], float]] = {"training loss at the end": lambda c: c.late_loss}
    for target in problem.losses:
        columns[f"queries to training loss {target:g}"] = partial(queries_to_loss, target=target)
    late = problem.losses[-1]
    columns[f"forward-equivalents to {late:g}"] = lambda c: c.to_loss(late, c.forward_equivalents)
    columns[f"queries to accuracy {problem.accuracy:.0%}"] = lambda c: c.to_accuracy(problem.accuracy, c.queries)
    names = ["allocator", "learning rate", *columns, "test accuracy, mean (min - max)"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for allocator, runs in curves.items():
        cells = [allocator, f"{rates[allocator]:g}"]
        for column in columns.values():
            own, equal = [column(run) for run in runs], [column(run) for run in curves["equal"]]
            reached = [value for value in own if math.isfinite(value)]
            amount = f"{statistics.fmean(reached):,.4g}" if reached else "-"
            cells.append(amount if allocator == "equal" else compare(own, equal))
        accuracy = [run.test_accuracy for run in runs]
        cells.append(f"{statistics.fmean(accuracy):.1%} ({min(accuracy):.1%} - {max(accuracy):.1%})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(args: Sequence[str] | None = None) -> None:
    """Run the study."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m experiments.fewer_queries", description=summary)
    parser.add_argument("--problem", choices=list(PROBLEMS), required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and of the table")
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1 (default 5)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; they share the cores (default 1)")
    parser.add_argument("--allocators", nargs="+", default=list(ALLOCATORS), choices=ALLOCATORS)
    parser.add_argument("extra", nargs="*", help="further arguments of main.py fit, after --")
    options = parser.parse_args(args)
    problem, extra = PROBLEMS[options.problem], tuple(options.extra)
    if not Path(problem.configs[0]).is_file():
        parser.error(f"{problem.configs[0]} is not here: start this from the root of a checkout.")
    allocators = list(dict.fromkeys(("equal", *options.allocators)))
    threads = max(1, (os.cpu_count() or 1) // options.jobs)

    def run_all(cells: Sequence[Cell]) -> list[Curve]:
        with ThreadPoolExecutor(options.jobs) as pool:
            curves = []
            for i, curve in enumerate(pool.map(lambda cell: cell.run(threads), cells), start=1):
                print(f"[{i}/{len(cells)}] {cells[i - 1].folder}: training loss {curve.late_loss:.4f}", flush=True)
                curves.append(curve)
            return curves

    tuning = [
        Cell(problem, allocator, rate, seed, options.output, extra)
        for seed in TUNING_SEEDS for allocator in allocators for rate in problem.rates
    ]  # fmt: skip
    losses: dict[str, dict[float, list[float]]] = {allocator: {} for allocator in allocators}
    for cell, curve in zip(tuning, run_all(tuning), strict=True):
        losses[cell.allocator].setdefault(cell.rate, []).append(curve.late_loss)
    rates = {name: min(by_rate, key=lambda rate: statistics.fmean(by_rate[rate])) for name, by_rate in losses.items()}
    cells = [
        Cell(problem, name, rates[name], seed, options.output, extra)
        for seed in range(options.seeds) for name in allocators
    ]  # fmt: skip
    finished = run_all(cells)
    curves = {
        name: [c for cell, c in zip(cells, finished, strict=True) if cell.allocator == name] for name in allocators
    }
    text = table(problem, curves, rates)
    (options.output / "fewer_queries.md").write_text(text)
    write_csv(options.output / "fewer_queries.csv", problem, cells, finished)
    print(f"\n{text}\nwritten to {options.output}")


def write_csv(path: Path, problem: Problem, cells: Sequence[Cell], curves: Sequence[Curve]) -> None:
    """One line a run."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        to_loss = [f"queries_to_{target:g}" for target in problem.losses]
        writer.writerow(
            ["allocator", "lr", "seed", "late_loss", *to_loss, "queries_to_accuracy", "queries", "test_accuracy"]
        )
        for cell, curve in zip(cells, curves, strict=True):
            values: list[Any] = [curve.to_loss(target, curve.queries) for target in problem.losses]
            values += [curve.to_accuracy(problem.accuracy, curve.queries), curve.queries[-1], curve.test_accuracy]
            writer.writerow([cell.allocator, cell.rate, cell.seed, curve.late_loss, *values])


if __name__ == "__main__":
    main()
