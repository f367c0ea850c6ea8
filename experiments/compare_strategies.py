"""``python -m experiments.compare_strategies --config FILE --output DIR``: every method at equal cost.

All methods of ``configs/method/`` train the network of a configuration from the same weights, once with equal total
queries and once with equal forward-equivalents: those that ``lr`` spends in the configuration's epochs. What a step of
a method costs is read from a run of a few steps, never computed. Learning rates are chosen for each method alike, by
the training loss of runs with a seed that is not used again. A method that would need too many steps or minutes is
marked and not run. Estimates are compared with the gradient apart (``strategies_cosine.py``).

Everything runs as ``main.py fit`` in processes of their own. Finished runs are not repeated. Writes ``strategies.md``,
``strategies.csv``, ``cosines.csv`` and ``strategies.png``.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments.command_line import StudyParser, arguments, configs, fit
from experiments.harness import Cell, run_all
from experiments.pictures import draw_if_possible, draw_strategies
from experiments.strategies_table import (
    AT_END,
    AT_START,
    BUDGETS,
    BudgetKind,
    Cosines,
    Length,
    Reference,
    Row,
    length,
    report,
    write_tables,
)
from flops_lightning.errors import SettingError
from flops_lightning.plan.cost import Cost, typical_seconds

METHODS = (
    "bp", "lr", "ops_lr", "es", "spsa", "ops_spsa", "spsa_guided", "mezo", "mezo_nspsa", "deepzero_spsa",
    "deepzero_cge", "forward_mode",
)  # fmt: skip
REFERENCE = "lr"
TUNING_SEED = 1000
PROBE_STEPS = 5
LOGGED_STEPS = 200
"""Steps of a run whose training loss is logged, about: logging every step would slow the fast methods."""


class Study:
    """The runs of a comparison, in their order."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Take the command line's settings."""
        self.options = options
        self.output: Path = options.output
        self.methods: list[str] = list(dict.fromkeys(options.methods))
        self.tried: list[float] = sorted(set(options.rates))

    # -- what is run ---------------------------------------------------------------------------------------------------

    def files(self, method: str) -> tuple[str, ...]:
        """Configuration files of a method."""
        return (*self.options.config, f"configs/method/{method}.yaml")

    def fit(self, name: str, method: str, seed: int, *, steps: int = 0, settings: Any = (), **cell: Any) -> Cell:
        """A run of so many optimiser steps (0: as configured), without validation and checkpoints."""
        own = {"trainer.enable_checkpointing": "false", "trainer.limit_val_batches": 0, "seed_everything": seed}
        if steps:
            logged = max(1, steps // LOGGED_STEPS)
            own |= {"trainer.max_epochs": -1, "trainer.max_steps": steps, "trainer.log_every_n_steps": logged}
        return fit(self.output, name, self.files(method), self.options.extra, {**own, **dict(settings)}, **cell)

    @cached_property
    def reference_run(self) -> Cell:
        """The run that fixes the budgets."""
        return self.fit("reference", REFERENCE, 0, keeps_weights=True)

    def probe(self, method: str) -> Cell:
        """A run of a few steps."""
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
        folder = self.output / name
        settings: dict[str, Any] = {"seed_everything": TUNING_SEED, "trainer.default_root_dir": folder}
        if where == AT_END:
            (settings["model.init_args.checkpoint"],) = self.reference_run.folder.rglob("model.safetensors")
        command = ("-m", "experiments.strategies_cosine", *arguments({"output": folder / "cosines.json", **own}), "--",
                   *configs(self.files(method)), *self.options.extra, *arguments(settings))  # fmt: skip
        return Cell(self.output, name, command, result="cosines.json")

    # -- what follows from it ------------------------------------------------------------------------------------------

    @cached_property
    def reference(self) -> Reference:
        """What the budgets are."""
        return Reference.of(self.reference_run.summary)

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """What a step of each method costs."""
        costs = {}
        for method in self.methods:
            probe = self.probe(method)
            summary, queries = probe.summary, probe.curve("queries/total")
            times = [event.wall_time for event in queries]
            curves = {
                "queries": [event.value for event in queries],
                "forward_equivalents": [event.value for event in probe.curve("queries/forward_equivalents")],
            }
            costs[method] = Cost.of(
                curves,
                [summary["samples"] / summary["steps"]] * len(times),
                seconds=typical_seconds([b - a for a, b in pairwise(times)]),
                seconds_once=max(0.0, summary["train_seconds"] - (times[-1] - times[0])),
            )
        return costs

    def length(self, budget: BudgetKind, method: str) -> Length:
        """Steps of a method under a budget, or why it is not run."""
        limits = {"max_steps_factor": self.options.max_steps_factor, "max_minutes": self.options.max_minutes}
        return length(budget, self.costs[method], self.reference, **limits)

    def tuning_steps(self, method: str) -> int:
        """Steps of a run that tries a learning rate; 0 for a method that no budget is feasible for."""
        feasible = [found.steps for budget in BUDGETS if not (found := self.length(budget, method)).reason]
        return max(1, round(self.options.tuning_fraction * feasible[0])) if feasible else 0

    def tuning(self, method: str) -> dict[float, Cell]:
        """Runs that try learning rates; none where there is no choice."""
        steps = self.tuning_steps(method)
        if not steps or len(self.tried) == 1:
            return {}
        return {rate: self.training(method, rate, steps, TUNING_SEED) for rate in self.tried}

    @cached_property
    def rates(self) -> dict[str, float]:
        """The best learning rate of each method; NaN where all diverged or none was tried."""
        if len(self.tried) == 1:
            return dict.fromkeys(self.methods, self.tried[0])
        best = {}
        for method in self.methods:
            losses = {rate: cell.late_loss for rate, cell in self.tuning(method).items()}
            rate = min(losses, key=losses.__getitem__, default=math.nan)
            best[method] = rate if math.isfinite(losses.get(rate, math.inf)) else math.nan
        return best

    def runs(self, budget: BudgetKind, method: str) -> dict[int, Cell]:
        """The runs of a row by seed; none where it is infeasible."""
        found, rate = self.length(budget, method), self.rates[method]
        if found.reason or math.isnan(rate):
            return {}
        return {seed: self.training(method, rate, found.steps, seed) for seed in range(self.options.seeds)}

    def row(self, budget: BudgetKind, method: str, cosines: Cosines) -> Row:
        """A method's line under a budget."""
        found, rate, runs = self.length(budget, method), self.rates[method], self.runs(budget, method)
        if not runs:
            reason = found.reason or "it diverged at every learning rate"
            return Row(method, Length(found.steps, reason), cosines=cosines)
        edge = len(self.tried) > 1 and rate in (self.tried[0], self.tried[-1])
        summaries = {seed: None if cell.diverged else cell.summary for seed, cell in runs.items()}
        return Row(method, found, rate, edge, summaries, cosines)

    def finals(self) -> list[Cell]:
        """The runs of the tables; seeds change slowest."""
        rows = [self.runs(budget, method) for budget in BUDGETS for method in self.methods]
        return [row[seed] for seed in range(self.options.seeds) for row in rows if row]

    def plan(self) -> str:
        """What is about to be run, and about how long it takes."""
        lines, total = [], 0.0
        for method in self.methods:
            cost, found = self.costs[method], {budget: self.length(budget, method) for budget in BUDGETS}
            steps = {each.steps for each in found.values() if not each.reason}  # equal numbers share their runs
            tried = len(self.tuning(method))
            made = self.options.seeds * sum(steps) + tried * self.tuning_steps(method)
            seconds = made * cost.seconds + (self.options.seeds * len(steps) + tried) * cost.seconds_once
            total += seconds
            text = "; ".join(f"{BUDGETS[b]}: {each.reason or f'{each.steps:,} steps'}" for b, each in found.items())
            lines.append(
                f"{method}: {cost.queries:g} queries and {cost.forward_equivalents:.3g} forward-equivalents a sample, "
                f"{cost.seconds:.3g} s a step; {text}; {seconds / 60:.0f} min"
            )
        hours = total / 3600 / self.options.jobs
        lines.append(f"training: about {hours:.1f} hours with {self.options.jobs} at a time, processes' start apart")
        return "\n".join(lines)

    def about(self) -> dict[str, str]:
        """What the report tells of the settings."""
        options = self.options
        return {
            "configs": " ".join((" + ".join(options.config), *options.extra)),
            "start_accuracy": f"{self.reference_run.summary['start_accuracy']:.1%}",
            "rates": ", ".join(f"{rate:g}" for rate in self.tried),
            "tuning": f"the best by the late training loss of one run with seed {TUNING_SEED}, not used again, over "
            f"{options.tuning_fraction:g} of the method's steps (of the first table that it has any in) with a "
            "schedule that ends there; the same rate serves both tables",
            "cosines": f"mean ± standard deviation over {options.draws} draws on each of {options.batches} batches",
            "processes": f"{options.jobs} at a time on {os.cpu_count()} cores",
        }

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run what is not finished and write the tables; each phase needs the one before."""
        run = partial(run_all, jobs=self.options.jobs, dry_run=self.options.dry_run)
        if not run([self.reference_run, *map(self.probe, self.methods)]):
            return
        print(self.plan(), flush=True)
        if self.options.plan:
            return
        if not run([cell for method in self.methods for cell in self.tuning(method).values()]) or not run(
            self.finals()
        ):
            return
        by_method = {method: {where: self.cosine(method, where) for where in (AT_START, AT_END)}
                     for method in self.methods}  # fmt: skip
        if run([cell for by_weights in by_method.values() for cell in by_weights.values()]):
            self.write({m: {where: c.summary["cosines"] for where, c in each.items()} for m, each in by_method.items()})

    def write(self, cosines: Mapping[str, Cosines]) -> None:
        """Write tables and picture."""
        tables = {budget: [self.row(budget, method, cosines[method]) for method in self.methods] for budget in BUDGETS}
        text = report(tables, self.reference, self.about())
        (self.output / "strategies.md").write_text(text)
        write_tables(self.output, tables, cosines)
        draw_if_possible(draw_strategies, self.output)
        print(f"\n{text}\nwritten to {self.output}")


def parse(args: Sequence[str] | None) -> tuple[StudyParser, argparse.Namespace]:
    """Read the command line."""
    parser = StudyParser(__doc__)
    add = parser.add_argument
    add("--config", action="append", required=True, help="configuration file; may be repeated")
    add("--methods", nargs="+", default=list(METHODS), help="names of configs/method/*.yaml (default: all)")
    add("--seeds", type=int, default=5, help="seeds 0 to N-1 (default 5)")
    add("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3], help="learning rates to choose from")
    add("--tuning-fraction", type=float, default=0.25, help="part of a run that rates are tried for (default 0.25)")
    add("--max-steps-factor", type=float, default=50.0, help="steps of a run, in those of lr, at most (default 50)")
    add("--max-minutes", type=float, default=20.0, help="foreseen minutes of a run, at most (default 20)")
    add("--batches", type=int, default=4, help="batches on which cosines are measured (default 4)")
    add("--draws", type=int, default=8, help="estimates of each (default 8)")
    add("--plan", action="store_true", help="measure what steps cost, say what would be run, and stop")
    return parser, parser.parse(args, at_least_one=["seeds", "batches", "draws"])


def main(args: Sequence[str] | None = None) -> None:
    """Run the study."""
    parser, options = parse(args)
    with parser.mistakes():
        for name in options.methods:
            if not Path(f"configs/method/{name}.yaml").is_file():
                raise SettingError(
                    "--methods", name, f"has no configs/method/{name}.yaml.", "Name files of configs/method."
                )
        if not 0 < options.tuning_fraction <= 1:
            raise SettingError(
                "--tuning-fraction",
                options.tuning_fraction,
                "must be above 0 and at most 1.",
                "Write for example 0.25.",
            )
        Study(options).run()


if __name__ == "__main__":
    main()
