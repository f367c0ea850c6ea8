"""``python -m experiments.fewer_queries --problem NAME --output DIR``: what allocation saves in training.

Every allocator trains the same network on the same batches with the same number of queries a step (``cost_aware``: the
same compute), by ``main.py fit`` in processes of their own. The learning rate is chosen for each allocator alike, by
the training loss of a run with a seed that is not used again. Then every allocator runs with the same seeds, and is
compared with equal counts seed by seed: the training loss over the last quarter of the run, and the queries and
forward-equivalents it took to a training loss and to a validation accuracy.

Finished runs are not repeated. Writes ``fewer_queries.md`` and ``fewer_queries.csv``.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

from experiments.command_line import StudyParser, fit
from experiments.harness import Cell, late_mean, run_all
from experiments.stats import paired_ratio
from experiments.tables import markdown, spread, write_csv

ALLOCATORS = ("equal", "bernoulli", "gaussian", "optimal", "cost_aware")
TUNING_SEED = 1000
SMOOTHED = 10
"""Steps over which the training loss is averaged."""


@dataclass(frozen=True)
class Problem:
    """What is trained.

    Attributes:
        config: Configuration file.
        rates: Learning rates to choose from.
        losses: Training losses whose cost is reported, from early to late.
        accuracy: Validation accuracy whose cost is reported.
        extra: Further arguments.
    """

    config: str
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    accuracy: float
    extra: tuple[str, ...] = ()


PROBLEMS: Mapping[str, Problem] = {
    "digits": Problem(
        "configs/vit_tiny_digits.yaml", (1e-3, 2e-3, 4e-3), (0.5, 0.1, 0.05, 0.03), 0.9,
        ("--trainer.val_check_interval", "5"),
    ),
    "cifar10": Problem(
        "configs/vit_micro_cifar10.yaml", (1e-3, 2e-3), (1.6, 1.4, 1.3), 0.5,
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

    @classmethod
    def of(cls, cell: Cell) -> Curve:
        """The curve of a finished run."""
        loss = cell.curve("train/loss")
        return cls(
            steps=[event.step for event in loss],
            loss=[event.value for event in loss],
            queries=[event.value for event in cell.curve("queries/total")],
            forward_equivalents=[event.value for event in cell.curve("queries/forward_equivalents")],
            accuracy=[(event.step, event.value) for event in cell.curve("val/accuracy")],
            test_accuracy=cell.summary["test_accuracy"],
        )

    @cached_property
    def smooth(self) -> list[float]:
        """Mean loss of the last steps at each step."""
        return [statistics.fmean(self.loss[max(0, i + 1 - SMOOTHED) : i + 1]) for i in range(len(self.loss))]

    def to_loss(self, target: float, spent: Sequence[float]) -> float:
        """What was spent until the smoothed loss fell to ``target``; NaN if it never did."""
        full = range(SMOOTHED - 1, len(self.loss))
        return next((spent[i] for i in full if self.smooth[i] <= target), math.nan)

    def to_accuracy(self, target: float, spent: Sequence[float]) -> float:
        """What was spent until the validation accuracy reached ``target``; NaN if it never did."""
        reached = next((step for step, accuracy in self.accuracy if accuracy >= target), math.inf)
        return next((value for step, value in zip(self.steps, spent, strict=True) if step >= reached), math.nan)


def queries_to_loss(curve: Curve, *, target: float) -> float:
    """Queries until the smoothed training loss fell to ``target``."""
    return curve.to_loss(target, curve.queries)


def compare(own: Sequence[float], equal: Sequence[float]) -> str:
    """Ratio to equal counts with its interval, over the seeds that both reached; how many never did."""
    reached = [i for i, (a, b) in enumerate(zip(own, equal, strict=True)) if math.isfinite(a) and math.isfinite(b)]
    missed = sum(not math.isfinite(a) for a in own)
    if not reached:
        return f"not reached ({missed} of {len(own)})"
    note = f", {missed} of {len(own)} never" if missed else ""
    return paired_ratio([own[i] for i in reached], [equal[i] for i in reached], note)


def report(problem: Problem, curves: Mapping[str, Sequence[Curve]], rates: Mapping[str, float]) -> str:
    """Markdown: every allocator against equal counts."""
    measures: dict[str, Callable[[Curve], float]] = {"training loss at the end": lambda c: late_mean(c.loss)}
    for target in problem.losses:
        measures[f"queries to training loss {target:g}"] = partial(queries_to_loss, target=target)
    late = problem.losses[-1]
    measures[f"forward-equivalents to {late:g}"] = lambda c: c.to_loss(late, c.forward_equivalents)
    measures[f"queries to accuracy {problem.accuracy:.0%}"] = lambda c: c.to_accuracy(problem.accuracy, c.queries)
    rows = []
    for allocator, runs in curves.items():
        row = [allocator, f"{rates[allocator]:g}"]
        for measure in measures.values():
            own, equal = [measure(run) for run in runs], [measure(run) for run in curves["equal"]]
            reached = [value for value in own if math.isfinite(value)]
            amount = f"{statistics.fmean(reached):,.4g}" if reached else "-"
            row.append(amount if allocator == "equal" else compare(own, equal))
        rows.append([*row, spread([run.test_accuracy for run in runs])])
    return markdown(["allocator", "learning rate", *measures, "test accuracy, mean (min - max)"], rows)


def study(options: argparse.Namespace) -> None:
    """Choose learning rates, run what is missing, and write the tables."""
    problem = PROBLEMS[options.problem]
    allocators = list(dict.fromkeys(("equal", *options.allocators)))
    run = partial(
        run_all, jobs=options.jobs, dry_run=options.dry_run, outcome=lambda c: f"training loss {c.late_loss:.4f}"
    )

    def cell(allocator: str, rate: float, seed: int) -> Cell:
        files = (problem.config, f"configs/allocators/{allocator}.yaml")
        own = {"seed_everything": seed, "trainer.log_every_n_steps": 1, "model.init_args.optimizer.lr": rate}
        name = f"{allocator}/lr_{rate:g}/seed_{seed}"
        return fit(options.output, name, files, (*problem.extra, *options.extra), own)

    tuning = {name: {rate: cell(name, rate, TUNING_SEED) for rate in problem.rates} for name in allocators}
    if not run([each for by_rate in tuning.values() for each in by_rate.values()]):
        return
    rates = {name: min(by_rate, key=lambda rate: by_rate[rate].late_loss) for name, by_rate in tuning.items()}
    runs = {(name, seed): cell(name, rates[name], seed) for seed in range(options.seeds) for name in allocators}
    if not run([*runs.values()]):
        return
    curves = {key: Curve.of(each) for key, each in runs.items()}
    text = report(problem, {name: [c for (own, _), c in curves.items() if own == name] for name in allocators}, rates)
    (options.output / "fewer_queries.md").write_text(text)
    columns = ["allocator", "lr", "seed", "late_loss", *(f"queries_to_{target:g}" for target in problem.losses),
               "queries_to_accuracy", "queries", "test_accuracy"]  # fmt: skip
    rows = [
        (name, rates[name], seed, late_mean(c.loss), *(queries_to_loss(c, target=target) for target in problem.losses),
         c.to_accuracy(problem.accuracy, c.queries), c.queries[-1], c.test_accuracy)
        for (name, seed), c in curves.items()
    ]  # fmt: skip
    write_csv(options.output / "fewer_queries.csv", columns, rows)
    print(f"\n{text}\nwritten to {options.output}")


def main(args: Sequence[str] | None = None) -> None:
    """Run the study."""
    parser = StudyParser(__doc__)
    parser.add_argument("--problem", choices=list(PROBLEMS), required=True)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 0 to N-1 (default 5)")
    parser.add_argument("--allocators", nargs="+", default=list(ALLOCATORS), choices=ALLOCATORS)
    options = parser.parse(args, at_least_one=["seeds"])
    with parser.mistakes():
        study(options)


if __name__ == "__main__":
    main()
