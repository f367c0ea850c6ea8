"""``python -m experiments.compare_strategies --config FILE --output DIR``: every method at equal cost.

All methods of ``configs/method/`` train the network of a configuration from the same weights, once with equal total
queries and once with equal forward-equivalents (``--budgets``): those that ``lr`` spends in the configuration's epochs,
or ``--shares`` of them. What a step of a method costs is read from a run of a few steps, never computed. Learning rates
are chosen for each method alike, by the training loss of runs with a seed that is not used again, from a grid that goes
on until the best is not at its edge. A method that would need too many steps or minutes is marked and not run.
Estimates are compared with the gradient apart (``strategies_cosine.py``).

Everything runs as ``main.py fit`` in processes of their own. Finished runs are not repeated. Writes ``strategies.md``,
``strategies.csv``, ``cosines.csv``, ``strategies.png`` and ``pareto.png``.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments import strategies_table
from experiments.command_line import StudyParser, arguments, configs, fit
from experiments.harness import Cell, run_all
from experiments.pictures import draw_if_possible, draw_pareto, draw_strategies
from experiments.rates import TUNING_SEED, Choice, choose_rates
from experiments.strategies_table import KINDS, Budget, Cosines, Length, Reference, Row
from experiments.tables import write_report
from flops_lightning.errors import SettingError, check_positive
from flops_lightning.plan.cost import Cost, typical_seconds

METHODS = (
    "bp", "lr", "ops_lr", "lr_muon", "es", "spsa", "ops_spsa", "spsa_guided", "spsa_flipout", "grzo", "mezo",
    "mezo_nspsa", "deepzero_spsa", "deepzero_cge", "forward_mode", "zo_muon",
)  # fmt: skip
REFERENCE = "lr"
PROBE_STEPS = 5
LOGGED_STEPS = 200  # of a run, about: logging every step would slow the fast methods


class Study:
    """The runs of a comparison, in their order; each phase needs the one before."""

    def __init__(self, options: argparse.Namespace) -> None:
        for name in options.methods:
            if not Path(f"configs/method/{name}.yaml").is_file():
                problem = f"has no configs/method/{name}.yaml."
                raise SettingError("--methods", name, problem, "Name files that are there.")
        part = options.tuning_fraction
        if not 0 < part <= 1:
            raise SettingError("--tuning-fraction", part, "must be above 0 and at most 1.", "Write, for example, 0.25.")
        for share in options.shares:
            check_positive("--shares", share, "Write, for example, 25 100.")
        self.options = options
        self.output: Path = options.output
        self.methods: list[str] = list(dict.fromkeys(options.methods))
        shares = sorted(set(options.shares), reverse=True)
        self.budgets = [Budget(kind, share) for share in shares for kind in KINDS if kind in options.budgets]
        self.choices: dict[str, Choice] = {}

    def fit(self, name: str, method: str, seed: int, *, steps: int = 0, settings: Any = (), **cell: Any) -> Cell:
        """A run of so many optimiser steps (0: as configured), without validation and checkpoints."""
        own = {"trainer.enable_checkpointing": "false", "trainer.limit_val_batches": 0, "seed_everything": seed}
        if steps:
            logged = max(1, steps // LOGGED_STEPS)
            own |= {"trainer.max_epochs": -1, "trainer.max_steps": steps, "trainer.log_every_n_steps": logged}
        return fit(self.output, name, self.files(method), self.options.extra, {**own, **dict(settings)}, **cell)

    def files(self, method: str) -> tuple[str, ...]:
        return (*self.options.config, f"configs/method/{method}.yaml")

    @cached_property
    def reference_run(self) -> Cell:
        return self.fit("reference", REFERENCE, 0, keeps_weights=True)

    @cached_property
    def reference(self) -> Reference:
        return Reference(*map(self.reference_run.summary.__getitem__, Reference._fields))

    def probe(self, method: str) -> Cell:
        return self.fit(f"probes/{method}", method, 0, steps=PROBE_STEPS)

    def training(self, method: str, rate: float, steps: int, seed: int) -> Cell:
        """A run; two budgets that buy the same number of steps share it."""
        name = f"runs/{method}/lr_{rate:g}/steps_{steps}/seed_{seed}"
        settings = {"model.init_args.optimizer.lr": rate}
        return self.fit(name, method, seed, steps=steps, settings=settings, may_diverge=True)

    def cosine(self, method: str, where: str) -> Cell:
        """Estimates of a method beside the gradient."""
        own = {"batches": self.options.batches, "draws": self.options.draws}
        name = f"cosines/{method}/{where}/{own['batches']}_batches_{own['draws']}_draws"
        settings: dict[str, Any] = {"seed_everything": TUNING_SEED, "trainer.default_root_dir": self.output / name}
        if where == strategies_table.AT_END:
            (settings["model.init_args.checkpoint"],) = self.reference_run.folder.rglob("model.safetensors")
        own_arguments = arguments({"output": self.output / name / "cosines.json", **own})
        command = ("-m", "experiments.strategies_cosine", *own_arguments, "--",
                   *configs(self.files(method)), *self.options.extra, *arguments(settings))  # fmt: skip
        return Cell(self.output, name, command, result="cosines.json")

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """What a step of each method costs, from the difference between the steps of its probe."""
        costs = {}
        for method in self.methods:
            probe = self.probe(method)
            summary, times = probe.summary, [event.wall_time for event in probe.curve("queries/total")]
            tags = {"queries": "queries/total", "forward_equivalents": "queries/forward_equivalents"}
            costs[method] = Cost.of(
                {name: [event.value for event in probe.curve(tag)] for name, tag in tags.items()},
                [summary["samples"] / summary["steps"]] * len(times),
                seconds=typical_seconds([b - a for a, b in pairwise(times)]),
                seconds_once=max(0.0, summary["train_seconds"] - (times[-1] - times[0])),
            )
        return costs

    def length(self, budget: Budget, method: str) -> Length:
        limits = {"max_steps_factor": self.options.max_steps_factor, "max_minutes": self.options.max_minutes}
        return strategies_table.length(budget, self.costs[method], self.reference, **limits)

    def tuning_steps(self, method: str) -> int:
        """Steps of a run that tries a learning rate; 0 for a method that no budget is feasible for."""
        feasible = [found.steps for budget in self.budgets if not (found := self.length(budget, method)).reason]
        return max(1, round(self.options.tuning_fraction * feasible[0])) if feasible else 0

    def tuning(self, method: str, rate: float) -> Cell:
        """The run that tries a learning rate."""
        return self.training(method, rate, self.tuning_steps(method), TUNING_SEED)

    def launch(self, cells: Sequence[Cell]) -> bool:
        return run_all(cells, **self.options.launch)

    def tune(self) -> bool:
        """Choose the learning rate of each method that a budget is feasible for; whether that is done."""
        tuned = [method for method in self.methods if self.tuning_steps(method)]
        cells = {method: partial(self.tuning, method) for method in tuned}
        found = choose_rates(cells, dict.fromkeys(tuned, self.options.rates), self.launch, required=False)
        self.choices = {**dict.fromkeys(self.methods, Choice()), **(found or {})}
        return found is not None

    def runs(self, budget: Budget, method: str) -> dict[int, Cell]:
        """The runs of a row by seed; none where it is infeasible."""
        found, rate = self.length(budget, method), self.choices[method].rate
        seeds = range(0 if found.reason or math.isnan(rate) else self.options.seeds)
        return {seed: self.training(method, rate, found.steps, seed) for seed in seeds}

    def row(self, budget: Budget, method: str, cosines: Cosines) -> Row:
        found, choice, runs = self.length(budget, method), self.choices[method], self.runs(budget, method)
        if not runs:
            reason = found.reason or "it diverged at every learning rate"
            return Row(method, Length(found.steps, reason), cosines=cosines)
        summaries = {seed: None if cell.diverged else cell.summary for seed, cell in runs.items()}
        return Row(method, found, *choice, summaries, cosines)

    def finals(self) -> list[Cell]:
        """The runs of the tables; seeds change slowest."""
        rows = [self.runs(budget, method) for budget in self.budgets for method in self.methods]
        return [row[seed] for seed in range(self.options.seeds) for row in rows if row]

    def plan(self) -> str:
        """What is about to be run, and about how long it takes."""
        lines, total, seeds = [], 0.0, self.options.seeds
        for method in self.methods:
            cost, found = self.costs[method], {budget: self.length(budget, method) for budget in self.budgets}
            steps = {each.steps for each in found.values() if not each.reason}  # equal numbers share their runs
            tried = len(set(self.options.rates)) if steps else 0  # at least
            made = seeds * sum(steps) + tried * self.tuning_steps(method)
            seconds = made * cost.seconds + (seeds * len(steps) + tried) * cost.seconds_once
            total += seconds
            text = "; ".join(f"{b.title}: {each.reason or f'{each.steps:,} steps'}" for b, each in found.items())
            lines.append(
                f"{method}: {cost.queries:g} queries and {cost.forward_equivalents:.3g} forward-equivalents per "
                f"sample, {cost.seconds:.3g} s per step; {text}; {seconds / 60:.0f} min"
            )
        hours = total / 3600 / self.options.jobs
        lines.append(f"training: about {hours:.1f} hours with {self.options.jobs} at a time, processes' start apart")
        return "\n".join(lines)

    def run(self) -> None:
        run = self.launch
        if not run([self.reference_run, *map(self.probe, self.methods)]):
            return
        print(self.plan(), flush=True)
        if self.options.plan or not self.tune():
            return
        if run(self.finals()):
            weights = (strategies_table.AT_START, strategies_table.AT_END)
            by_method = {m: {where: self.cosine(m, where) for where in weights} for m in self.methods}
            if run([cell for cells in by_method.values() for cell in cells.values()]):
                self.write({m: {w: c.summary["cosines"] for w, c in cells.items()} for m, cells in by_method.items()})

    def write(self, cosines: Mapping[str, Cosines]) -> None:
        tables = {b: [self.row(b, method, cosines[method]) for method in self.methods] for b in self.budgets}
        strategies_table.write_tables(self.output, tables, cosines)
        for draw in (draw_strategies, draw_pareto):
            draw_if_possible(draw, self.output)
        start = self.reference_run.summary["start_accuracy"]
        text = strategies_table.report(tables, self.reference, start, self.options)
        write_report(self.output / "strategies.md", text)


def command_line() -> StudyParser:
    batches = (4, "batches on which cosines are measured")
    parser = StudyParser(__doc__, seeds=(5, "seeds 0 to N-1"), batches=batches, draws=(8, "estimates of each"))
    add = parser.add_argument
    add("--config", action="append", required=True, help="configuration file; may be repeated")
    add("--methods", nargs="+", default=list(METHODS), help="names of configs/method/*.yaml (default: all)")
    add("--budgets", nargs="+", choices=list(KINDS), default=list(KINDS), help="what runs spend alike (default: both)")
    add("--shares", type=float, nargs="+", default=[100.0], help="per cent of what lr spends (default 100)")
    add("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3], help="learning rates to choose from at first")
    add("--tuning-fraction", type=float, default=0.25, help="part of a run that rates are tried for (default 0.25)")
    add("--max-steps-factor", type=float, default=50.0, help="steps of a run, in those of lr, at most (default 50)")
    add("--max-minutes", type=float, default=20.0, help="foreseen minutes of a run, at most (default 20)")
    add("--plan", action="store_true", help="measure what steps cost, say what would be run, and stop")
    return parser


def main(args: Sequence[str] | None = None) -> None:
    command_line().run(lambda options: Study(options).run(), args)


if __name__ == "__main__":
    main()
