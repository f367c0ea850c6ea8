"""``python -m experiments.fewer_queries --problem NAME --output DIR``: what allocation saves in training.

Every allocator trains the same network on the same batches with the same number of queries a step (``cost_aware``: the
same compute), by ``main.py fit`` in processes of their own. The learning rate is chosen for each allocator alike, by
the training loss of a run with a seed that is not used again, from a grid that goes on until the best is inside. Then
every allocator runs with the same seeds, and is compared with equal counts seed by seed: the training loss over the
last quarter of the run, and the queries and forward-equivalents it took to a training loss and to a validation
accuracy.

Finished runs are not repeated. Writes ``fewer_queries.md`` and ``fewer_queries.csv``.
"""

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from experiments.command_line import StudyParser, arguments, fit
from experiments.harness import Cell, late_mean, run_all
from experiments.rates import TUNING_SEED, choose_rates
from experiments.tables import markdown, paired_ratio, spread, write_csv, write_report

ALLOCATORS = ("equal", "bernoulli", "gaussian", "optimal", "cost_aware")
SMOOTHED = 10  # steps over which the training loss is averaged


@dataclass(frozen=True)
class Problem:
    config: str
    rates: tuple[float, ...]  # to choose from
    losses: tuple[float, ...]  # training losses whose cost is reported, from early to late
    accuracy: float  # validation accuracy whose cost is reported
    settings: Mapping[str, int]


DIGITS = Problem(
    "configs/vit_tiny_digits.yaml", (1e-3, 2e-3, 4e-3), (0.5, 0.1, 0.05, 0.03), 0.9, {"trainer.val_check_interval": 5}
)
CIFAR10_PART = {"batch_size": 32, "images_per_class": 200, "val_images": 300, "test_images": 500}
CIFAR10 = Problem(
    "configs/vit_micro_cifar10.yaml", (1e-3, 2e-3), (1.6, 1.4, 1.3), 0.5,
    {"trainer.val_check_interval": 10, "trainer.max_epochs": 1,
     **{f"data.init_args.{name}": value for name, value in CIFAR10_PART.items()}},
)  # fmt: skip
PROBLEMS = {"digits": DIGITS, "cifar10": CIFAR10}


@dataclass(frozen=True)
class Curve:
    steps: list[int]  # at which the training loss was logged
    loss: list[float]  # of the batches of these steps, before the step
    queries: list[float]  # so far
    forward_equivalents: list[float]  # so far
    accuracy: list[tuple[int, float]]  # step and validation accuracy
    test_accuracy: float  # at the end

    @classmethod
    def of(cls, cell: Cell) -> "Curve":
        """The curve of a finished run."""
        tags = ("train/loss", "queries/total", "queries/forward_equivalents")
        loss, queries, equivalents = ([event.value for event in cell.curve(tag)] for tag in tags)
        steps = [event.step for event in cell.curve(tags[0])]
        accuracy = [(event.step, event.value) for event in cell.curve("val/accuracy")]
        return cls(steps, loss, queries, equivalents, accuracy, cell.summary["test_accuracy"])

    def to_loss(self, target: float, spent: Sequence[float] | None = None) -> float:
        """What was spent (None: queries) until the mean loss of some steps fell to ``target``; NaN if it never did."""
        ends = range(SMOOTHED, len(self.loss) + 1)
        reached = (i for i in ends if statistics.fmean(self.loss[i - SMOOTHED : i]) <= target)
        return next(((spent or self.queries)[i - 1] for i in reached), math.nan)

    def to_accuracy(self, target: float) -> float:
        """Queries until the validation accuracy reached ``target``; NaN if it never did."""
        reached = next((step for step, accuracy in self.accuracy if accuracy >= target), math.inf)
        return next((value for step, value in zip(self.steps, self.queries, strict=True) if step >= reached), math.nan)


def compare(own: Sequence[float], equal: Sequence[float]) -> str:
    """Ratio to equal counts with its interval, over the seeds that both reached; how many never did."""
    reached = [i for i, (a, b) in enumerate(zip(own, equal, strict=True)) if math.isfinite(a) and math.isfinite(b)]
    missed = sum(not math.isfinite(a) for a in own)
    note = f", {missed} of {len(own)} never" if missed else ""
    ratio = paired_ratio([own[i] for i in reached], [equal[i] for i in reached], note) if reached else ""
    return ratio or f"not reached ({missed} of {len(own)})"


def report(problem: Problem, curves: Mapping[str, Sequence[Curve]], rates: Mapping[str, float]) -> str:
    """Markdown: every allocator against equal counts."""
    late, accuracy = problem.losses[-1], problem.accuracy
    measures: dict[str, Callable[[Curve], float]] = {
        "training loss at the end": lambda c: late_mean(c.loss),
        **{f"queries to training loss {loss:g}": partial(Curve.to_loss, target=loss) for loss in problem.losses},
        f"forward-equivalents to {late:g}": lambda c: c.to_loss(late, c.forward_equivalents),
        f"queries to accuracy {accuracy:.0%}": lambda c: c.to_accuracy(accuracy),
    }
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
    problem = PROBLEMS[options.problem]
    allocators = list(dict.fromkeys(("equal", *options.allocators)))

    def run(runs: Iterable[Cell]) -> bool:
        return run_all([*runs], **options.launch, outcome=lambda cell: f"loss {cell.late_loss:.4f}")

    def cell(allocator: str, rate: float, seed: int) -> Cell:
        files = (problem.config, f"configs/allocators/{allocator}.yaml")
        own = {"seed_everything": seed, "trainer.log_every_n_steps": 1, "model.init_args.optimizer.lr": rate}
        name = f"{allocator}/lr_{rate:g}/seed_{seed}"
        extra, may_diverge = (*arguments(problem.settings), *options.extra), seed == TUNING_SEED
        return fit(options.output, name, files, extra, own, may_diverge=may_diverge)

    tried = {name: partial(cell, name, seed=TUNING_SEED) for name in allocators}
    chosen = choose_rates(tried, dict.fromkeys(allocators, problem.rates), run)
    if chosen is None:
        return
    rates = {name: choice.rate for name, choice in chosen.items()}
    runs = {(name, seed): cell(name, rates[name], seed) for seed in range(options.seeds) for name in allocators}
    if not run(runs.values()):
        return
    curves = {key: Curve.of(each) for key, each in runs.items()}
    columns = ["allocator", "lr", "seed", "late_loss", *(f"queries_to_{target:g}" for target in problem.losses),
               "queries_to_accuracy", "queries", "test_accuracy"]  # fmt: skip
    rows = [
        (name, rates[name], seed, late_mean(c.loss), *map(c.to_loss, problem.losses),
         c.to_accuracy(problem.accuracy), c.queries[-1], c.test_accuracy)
        for (name, seed), c in curves.items()
    ]  # fmt: skip
    write_csv(options.output / "fewer_queries.csv", columns, rows)
    text = report(problem, {name: [c for (own, _), c in curves.items() if own == name] for name in allocators}, rates)
    write_report(options.output / "fewer_queries.md", text)


def main(args: Sequence[str] | None = None) -> None:
    parser = StudyParser(__doc__, seeds=(5, "seeds 0 to N-1"))
    parser.add_argument("--problem", choices=list(PROBLEMS), required=True)
    parser.add_argument("--allocators", nargs="+", default=list(ALLOCATORS), choices=ALLOCATORS)
    parser.run(study, args)


if __name__ == "__main__":
    main()
