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
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cached_property
from itertools import pairwise
from pathlib import Path

from experiments.running import RUNNING
from experiments.strategies_budget import BUDGETS, BudgetKind, Cell, Reference, cell
from experiments.strategies_plot import draw
from experiments.strategies_runs import Job, arguments, fit
from experiments.strategies_table import (
    AT_END,
    AT_START,
    Cosines,
    Row,
    Run,
    report,
    write_cosines,
    write_csv,
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


class Study:
    """The runs of a comparison, in their order."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Take the command line's settings."""
        self.options = options
        self.output: Path = options.output
        self.methods: list[str] = list(dict.fromkeys(options.methods))
        self.extra: tuple[str, ...] = tuple(options.extra)
        self.threads = max(1, (os.cpu_count() or 1) // options.jobs)

    # -- what is run ---------------------------------------------------------------------------------------------------

    def files(self, method: str) -> tuple[str, ...]:
        """Configuration files of a method."""
        return (*self.options.config, f"configs/method/{method}.yaml")

    @cached_property
    def reference_job(self) -> Job:
        """The run that fixes the budgets."""
        folder, settings = self.output / "reference", {"seed_everything": 0}
        return fit(folder, self.files(REFERENCE), self.extra, settings, keep_weights=True)

    def probe(self, method: str) -> Job:
        """A run of a few steps."""
        settings = {"seed_everything": 0, "trainer.log_every_n_steps": 1}
        return fit(self.output / "probes" / method, self.files(method), self.extra, settings, steps=PROBE_STEPS)

    def training(self, method: str, rate: float, steps: int, seed: int) -> Job:
        """A run; two budgets that buy the same number of steps share it."""
        folder = self.output / "runs" / method / f"lr_{rate:g}" / f"steps_{steps}" / f"seed_{seed}"
        settings = {"seed_everything": seed, "model.init_args.optimizer.lr": rate}
        return fit(folder, self.files(method), self.extra, settings, steps=steps)

    def cosine(self, method: str, where: str) -> Job:
        """Estimates of a method beside the gradient."""
        number = f"{self.options.batches}_batches_{self.options.draws}_draws"
        folder = self.output / "cosines" / method / where / number
        configs = [part for file in self.files(method) for part in ("--config", file)]
        settings: dict[str, object] = {"seed_everything": TUNING_SEED, "trainer.default_root_dir": folder}
        if where == AT_END:
            (weights,) = self.reference_job.folder.rglob("model.safetensors")
            settings["model.init_args.checkpoint"] = weights
        own = {"output": folder / "cosines.json", "batches": self.options.batches, "draws": self.options.draws}
        given = [*arguments(own), "--", *configs, *self.extra, *arguments(settings)]
        command = (sys.executable, "-m", "experiments.strategies_cosine", *given)
        return Job(folder, command, result="cosines.json")

    # -- what follows from it ------------------------------------------------------------------------------------------

    @cached_property
    def reference(self) -> Reference:
        """What the budgets are."""
        return Reference.of(self.reference_job.output)

    @cached_property
    def costs(self) -> dict[str, Cost]:
        """What a step of each method costs."""
        costs = {}
        for method in self.methods:
            job = self.probe(method)
            summary = job.output
            queries, times = job.curve("queries/total")
            curves = {"queries": queries, "forward_equivalents": job.curve("queries/forward_equivalents")[0]}
            costs[method] = Cost.of(
                curves,
                [summary["samples"] / summary["steps"]] * len(times),
                seconds=typical_seconds([b - a for a, b in pairwise(times)]),
                seconds_once=max(0.0, summary["train_seconds"] - (times[-1] - times[0])),
            )
        return costs

    def cell(self, budget: BudgetKind, method: str) -> Cell:
        """Steps of a method under a budget, or why they are not made."""
        limits = {"max_steps_factor": self.options.max_steps_factor, "max_minutes": self.options.max_minutes}
        return cell(budget, self.costs[method], self.reference, **limits)

    def tuning_steps(self, method: str) -> int:
        """Steps of a run that tries a learning rate; 0 for a method that no budget is feasible for."""
        feasible = [c.steps for budget in BUDGETS if not (c := self.cell(budget, method)).reason]
        return max(1, round(self.options.tuning_fraction * feasible[0])) if feasible else 0

    def tuning(self, method: str) -> dict[float, Job]:
        """Runs that try learning rates; none where there is no choice."""
        steps, rates = self.tuning_steps(method), sorted(set(self.options.rates))
        if not steps or len(rates) == 1:
            return {}
        return {rate: self.training(method, rate, steps, TUNING_SEED) for rate in rates}

    @cached_property
    def rates(self) -> dict[str, float]:
        """The best learning rate of each method; NaN where all diverged or none was tried."""
        best = {}
        for method in self.methods:
            if len(set(self.options.rates)) == 1:
                best[method] = self.options.rates[0]
                continue
            losses = {rate: job.late_loss for rate, job in self.tuning(method).items()}
            finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
            best[method] = min(finite, key=finite.__getitem__) if finite else math.nan
        return best

    def row(self, budget: BudgetKind, method: str, cosines: Cosines) -> Row:
        """A method's line under a budget."""
        planned, rate = self.cell(budget, method), self.rates[method]
        if not planned.reason and math.isnan(rate):
            planned = Cell(planned.steps, "it diverged at every learning rate")
        if planned.reason:
            return Row(method, planned, cosines=cosines)
        tried = sorted(set(self.options.rates))
        jobs = {seed: self.training(method, rate, planned.steps, seed) for seed in range(self.options.seeds)}
        runs = [Run(seed, None if job.diverged else job.output) for seed, job in jobs.items()]
        return Row(method, planned, rate, len(tried) > 1 and rate in (tried[0], tried[-1]), runs, cosines)

    def finals(self) -> list[Job]:
        """The runs of the tables."""
        return [
            self.training(method, self.rates[method], planned.steps, seed)
            for seed in range(self.options.seeds)
            for budget in BUDGETS
            for method in self.methods
            if not (planned := self.cell(budget, method)).reason and math.isfinite(self.rates[method])
        ]

    def plan(self) -> str:
        """What is about to be run, and about how long it takes."""
        lines, total = [], 0.0
        for method in self.methods:
            cost, cells = self.costs[method], {budget: self.cell(budget, method) for budget in BUDGETS}
            steps = {c.steps for c in cells.values() if not c.reason}  # equal numbers share their runs
            tried = len(self.tuning(method))
            made = self.options.seeds * sum(steps) + tried * self.tuning_steps(method)
            runs = self.options.seeds * len(steps) + tried
            seconds = made * cost.seconds + runs * cost.seconds_once
            total += seconds
            told = "; ".join(f"{BUDGETS[b]}: {c.reason or f'{c.steps:,} steps'}" for b, c in cells.items())
            lines.append(
                f"{method}: {cost.queries:g} queries and {cost.forward_equivalents:.3g} forward-equivalents a sample, "
                f"{cost.seconds:.3g} s a step; {told}; {seconds / 60:.0f} min"
            )
        hours = total / 3600 / self.options.jobs
        lines.append(f"training: about {hours:.1f} hours with {self.options.jobs} at a time, processes' start apart")
        return "\n".join(lines)

    def about(self) -> dict[str, str]:
        """What the report tells of the settings."""
        options = self.options
        return {
            "configs": " + ".join(options.config) + (f" {' '.join(self.extra)}" if self.extra else ""),
            "start_accuracy": f"{self.reference_job.output['start_accuracy']:.1%}",
            "rates": ", ".join(f"{rate:g}" for rate in sorted(set(options.rates))),
            "tuning": f"the best by the late training loss of one run with seed {TUNING_SEED}, not used again, over "
            f"{options.tuning_fraction:g} of the method's steps (of the first table that it has any in) with a "
            "schedule that ends there; the same rate serves both tables",
            "cosines": f"mean ± standard deviation over {options.draws} draws on each of {options.batches} batches",
            "processes": f"{options.jobs} at a time on {os.cpu_count()} cores",
        }

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Run what is not finished and write the tables."""
        probes = [self.probe(method) for method in self.methods]
        run_all([self.reference_job, *probes], "costs", self.options.jobs, self.threads)
        print(self.plan(), flush=True)
        if self.options.plan:
            return
        tuning = [job for method in self.methods for job in self.tuning(method).values()]
        run_all(tuning, "learning rates", self.options.jobs, self.threads)
        run_all(self.finals(), "training", self.options.jobs, self.threads)
        jobs = {method: {where: self.cosine(method, where) for where in (AT_START, AT_END)} for method in self.methods}
        run_all([job for each in jobs.values() for job in each.values()], "cosines", self.options.jobs, self.threads)
        cosines = {method: {w: job.output["cosines"] for w, job in each.items()} for method, each in jobs.items()}
        self.write(cosines)

    def write(self, cosines: Mapping[str, Cosines]) -> None:
        """Write tables and plot."""
        tables = {budget: [self.row(budget, method, cosines[method]) for method in self.methods] for budget in BUDGETS}
        text = report(tables, self.reference, self.about())
        (self.output / "strategies.md").write_text(text)
        write_csv(self.output / "strategies.csv", tables)
        write_cosines(self.output / "cosines.csv", cosines)
        try:
            draw(self.output)
        except SettingError as error:  # matplotlib is an extra, and hours of training are not to end in an error
            print(f"no plot: {error}")
        print(f"\n{text}\nwritten to {self.output}")


def run_all(jobs: Sequence[Job], what: str, at_a_time: int, threads: int) -> None:
    """Run jobs that are not finished, with a bar on a terminal and lines elsewhere.

    Raises:
        RuntimeError: one failed; those that run are ended first, the rest is not begun.
        StudyStopped: a signal ended the study.
    """
    from tqdm import tqdm

    unique = {job.folder: job for job in jobs}
    left = [job for job in unique.values() if not job.finished]
    with (
        tqdm(total=len(unique), initial=len(unique) - len(left), desc=what, unit="run", disable=None) as bar,
        ThreadPoolExecutor(at_a_time) as pool,
    ):
        futures = {pool.submit(job.run, threads): job for job in left}
        try:
            for i, future in enumerate(as_completed(futures), start=len(unique) - len(left) + 1):
                future.result()
                bar.update()
                if bar.disable:
                    ending = " diverged" if futures[future].diverged else ""
                    print(f"[{i}/{len(unique)}] {what}: {futures[future].folder}{ending}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def check_output(output: Path, settings: Mapping[str, object]) -> None:
    """Take a folder for these settings, or go on in one that was taken for them.

    Raises:
        SettingError: the folder holds runs of other settings.
    """
    file, text = output / "study.json", json.dumps(settings, indent=2) + "\n"
    if file.exists() and file.read_text() != text:
        raise SettingError(
            "output", str(output), "holds runs of another configuration, see study.json there.",
            "Give another folder, or remove it.",
        )  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def _parser() -> argparse.ArgumentParser:
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m experiments.compare_strategies", description=summary)
    add = parser.add_argument
    add("--config", action="append", required=True, help="configuration file; may be repeated")
    add("--output", type=Path, required=True, help="folder of the runs, the tables and the plot")
    add("--methods", nargs="+", default=list(METHODS), help="names of configs/method/*.yaml (default: all)")
    add("--seeds", type=int, default=5, help="seeds 0 to N-1 (default 5)")
    add("--jobs", type=int, default=1, help="runs at a time; they share the cores (default 1)")
    add("--rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3], help="learning rates to choose from")
    add("--tuning-fraction", type=float, default=0.25, help="part of a run that rates are tried for (default 0.25)")
    add("--max-steps-factor", type=float, default=50.0, help="steps of a run, in those of lr, at most (default 50)")
    add("--max-minutes", type=float, default=20.0, help="foreseen minutes of a run, at most (default 20)")
    add("--batches", type=int, default=4, help="batches on which cosines are measured (default 4)")
    add("--draws", type=int, default=8, help="estimates of each (default 8)")
    add("--plan", action="store_true", help="measure what steps cost, say what would be run, and stop")
    add("extra", nargs="*", help="further arguments of main.py fit, after --")
    return parser


def main(args: Sequence[str] | None = None) -> None:
    """Run the study.

    Raises:
        StudyStopped: a signal ended it; its runs were ended first.
    """
    parser = _parser()
    options = parser.parse_args(args)
    for name in options.methods:
        if not Path(f"configs/method/{name}.yaml").is_file():
            parser.error(f"configs/method/{name}.yaml is not here: start this from the root of a checkout.")
    if not 0 < options.tuning_fraction <= 1:
        parser.error(f"--tuning-fraction {options.tuning_fraction:g} is not in (0, 1].")
    for name in ("seeds", "jobs", "batches", "draws"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)} is below 1.")
    try:
        check_output(options.output, {"config": options.config, "extra": options.extra})
    except SettingError as error:
        parser.error(str(error))
    with RUNNING.ended_by_signals():
        Study(options).run()


if __name__ == "__main__":
    main()
