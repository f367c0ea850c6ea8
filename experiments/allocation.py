"""``python -m experiments.allocation --config FILE --output DIR``: what allocation gains along a run.

The network of a configuration is trained with equal counts, by its own strategy and optimiser. Some batches before each
of a series of checkpoints, every allocator starts to look on, with a budget of its own that does not touch the run:
those that learn, learn from queries spent as they would have spent them. At the checkpoint each allocates some batches,
and is scored by traces of many directions that nobody saw: ``gain = J_equal / J`` over all sites, in squared units of
the parameters, pilots paid from the same budget. ``gain_optimal`` is what exact traces would give at each site,
``gain_best_linear`` the best allocation linear in tanh(loss) under the traces that the row's allocator had. Gains of
``cost-aware`` are at equal compute and may exceed ``gain_optimal``, which is at equal queries of each site.

Writes ``allocation.csv`` (all sites), ``allocation_sites.csv`` (each site by itself), ``traces.csv`` (rank correlations
of traces, and of the activation-space proxy with parameter space) and ``allocation.png``. Interrupted, it goes on from
the last checkpoint measured when started again.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from experiments.allocation_cases import CASES, Case
from experiments.allocation_parameters import proxy_rows
from experiments.allocation_plot import draw
from experiments.allocation_scores import HeldOut, interval
from flops_lightning.allocators import Allocation, QueryAllocator, QueryBudget, SampleStatistics, TraceObservation
from flops_lightning.allocators.rank_correlation import rank_correlation
from flops_lightning.errors import SettingError
from flops_lightning.optim.optimizers import build_optimizer, build_schedule, clip_gradients
from flops_lightning.queries import CleanPass
from flops_lightning.strategies import LikelihoodRatio
from flops_lightning.strategies.pilots import PilotSpec
from flops_lightning.tasks import ForwardImageClassifier

COLUMNS = (
    "checkpoint", "train_accuracy", "budget", "allocator", "gain", "gain_low", "gain_high", "gain_optimal",
    "gain_best_linear",
)  # fmt: skip
SITE_COLUMNS = (*COLUMNS[:4], "site", *COLUMNS[4:8])
TRACE_COLUMNS = ("checkpoint", "site", "quantity", "value")

# First query of what is looked at: apart from each other and from the queries that train.
PILOTS, OWN, HELD_OUT = 10_000, 100_000, 1_000_000
TRAIN_IMAGES = 2000
"""Images of the training set whose accuracy is reported, at most."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        checkpoints: Optimiser steps before which it is.
        budgets: Queries of a sample at each site.
        batches: Batches that are allocated and scored at each checkpoint.
        directions: Held-out directions of each sample at each site.
        window: Batches before a checkpoint from which allocators learn.
        arguments: The configuration, as after ``main.py fit``.
    """

    checkpoints: tuple[int, ...]
    budgets: tuple[int, ...]
    batches: int
    directions: int
    window: int
    arguments: tuple[str, ...]


class Run:
    """The network of a configuration, trained with equal counts, step by step."""

    def __init__(self, arguments: Sequence[str]) -> None:
        """Build it.

        Raises:
            SettingError: the configuration is not one that this study can measure.
        """
        from flops_lightning.cli.command import build

        cli = build(arguments)
        strategy = getattr(cli.model, "strategy", None)
        if not isinstance(cli.model, ForwardImageClassifier) or not isinstance(strategy, LikelihoodRatio):
            raise SettingError(
                "config", list(arguments), f"trains with {type(strategy).__name__} and not with LikelihoodRatio, which "
                "has queries to allocate.", "Give for example configs/vit_tiny_digits.yaml.",
            )  # fmt: skip
        self.task, self.data, self.strategy = cli.model, cli.datamodule, strategy
        self.strategy.pilots = PilotSpec()  # the study spends pilots itself
        self.data.setup("fit")
        self.loader = self.data.train_dataloader()
        self.steps = (cli.trainer.max_epochs or 1) * len(self.loader)
        self.optimizer: Optimizer = build_optimizer(self.task.backbone, self.task.optimizer_settings)
        self.schedule: LRScheduler = build_schedule(self.optimizer, self.task.optimizer_settings, self.steps)
        self.task.train()
        self._piloted: dict[tuple[int, str, int], TraceObservation] = {}

    def pilots(self, clean: CleanPass, where: str, number: int) -> TraceObservation:
        """Traces of so many pilots at the ``lowest`` or ``deepest`` site or at ``all``; spent once a batch."""
        key = (clean.draw, where, number)
        if key not in self._piloted:
            self._piloted = {kept: seen for kept, seen in self._piloted.items() if kept[0] == clean.draw}
            counts = torch.zeros(len(self.strategy.sites), clean.batch_size, dtype=torch.int64)
            counts[{"lowest": slice(0, 1), "deepest": slice(-1, None), "all": slice(None)}[where]] = number
            self._piloted[key] = self.strategy.observe_traces(clean, counts, first_query=PILOTS)
        return self._piloted[key]

    def batches(self, start: int) -> Iterator[tuple[int, list[Tensor]]]:
        """Steps from ``start`` on, with the batches of the seed's order."""
        for epoch in range(start // len(self.loader), math.ceil((self.steps + 1) / len(self.loader))):
            self.loader.sampler.set_epoch(epoch)
            for step, batch in enumerate(self.loader, epoch * len(self.loader)):
                if step >= start:
                    yield step, batch

    def step(self, clean: CleanPass) -> None:
        """One optimiser step from equal counts."""
        for i, names in enumerate(groups := self.strategy.update_groups):
            clean = self.strategy.refresh(clean, groups[i - 1]) if i else clean
            self.optimizer.zero_grad()
            if not self.strategy.estimate(clean, None, names).lost_batch:
                clip_gradients(self.task.backbone.named_parameters(), self.task.clip_settings)
                self.optimizer.step()
        self.schedule.step()

    @torch.no_grad()
    def train_accuracy(self) -> float:
        """Accuracy on the first images of the training set."""
        data, right, seen = self.data.train_set, 0, 0
        while seen < min(TRAIN_IMAGES, len(data)):
            images, labels = zip(*(data[i] for i in range(seen, min(seen + 200, TRAIN_IMAGES, len(data)))), strict=True)
            with self.task.network.evaluating():
                predicted = self.task(torch.stack(images)).argmax(dim=1)
            right += int((predicted == torch.as_tensor(labels)).sum())
            seen += len(images)
        return right / seen

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("task", "optimizer", "schedule", "strategy")}


class Spectators:
    """The allocators of one budget, which look on."""

    def __init__(self, run: Run, budget: int) -> None:
        """Make a new one of each that the budget suffices for."""
        self.run, self.queries = run, budget
        self.unit, self.minimum = run.strategy.budget.multiple, run.strategy.budget.minimum
        self.allocators: dict[str, tuple[Case, QueryAllocator]] = {case.name: (case, case.make()) for case in CASES}
        self.names = frozenset(name for _, allocator in self.allocators.values() for name in allocator.requests)

    def learn(self, clean: CleanPass, statistics: SampleStatistics) -> None:
        """Let those that learn see queries spent as the optimal allocator would have spent them."""
        counts = self.allocate("optimal", clean, statistics)[0].counts
        seen = self.run.strategy.observe_traces(clean, counts, first_query=OWN)
        for name, (_, allocator) in self.allocators.items():
            if allocator.learns:
                if name != "optimal":
                    self.allocate(name, clean, statistics)
                allocator.observe(seen)

    def allocate(self, name: str, clean: CleanPass, statistics: SampleStatistics) -> tuple[Allocation, Tensor]:
        """Counts of a batch and the ``(s, b)`` pilots that were spent before."""
        case, allocator = self.allocators[name]
        sites = self.run.strategy.sites
        pilots = torch.zeros(len(sites), clean.batch_size, dtype=torch.int64)
        number = case.pilot_queries(self.queries, unit=self.unit, minimum=self.minimum)
        if number:
            seen = self.run.pilots(clean, case.pilots, number)
            pilots[seen.trace.isfinite().any(dim=1).cpu()] = number
            statistics = replace(statistics, trace=seen.trace, trace_queries=seen.queries)
        left = tuple(self.queries - int(line.max()) for line in pilots)
        budget = QueryBudget(left, multiple=self.unit, minimum=self.minimum)
        return allocator.allocate(statistics, budget), pilots

    def fits(self, name: str) -> bool:
        """Whether the budget suffices for the case's pilots."""
        case = self.allocators[name][0]
        return not case.pilots or case.pilot_queries(self.queries, unit=self.unit, minimum=self.minimum) > 0


def measure(run: Run, plan: Plan, step: int, spectators: Sequence[Spectators], advance: Any) -> dict[str, list[Any]]:
    """Rows of the three tables at one checkpoint."""
    accuracy = run.train_accuracy()
    held: list[HeldOut] = []
    scores: dict[tuple[int, str], list[Tensor]] = {}
    traces: list[tuple[Any, ...]] = []
    generator = torch.Generator().manual_seed(step)
    order = torch.randperm(len(run.data.train_set), generator=generator)
    names = frozenset().union(*(each.names for each in spectators)) | {"scale"}
    sites = [site.name for site in run.strategy.sites]
    draw_counter = run.strategy.draw
    for i in range(plan.batches):
        size = run.data.batch_size
        images, labels = zip(*(run.data.train_set[int(j)] for j in order[i * size : (i + 1) * size]), strict=True)
        clean = run.strategy.clean_pass(torch.stack(images), torch.as_tensor(labels))
        statistics = run.strategy.sample_statistics(clean, names)
        scale = statistics.scale
        if scale is None:
            raise TypeError("The scale was asked for.")
        everywhere = torch.full((len(sites), clean.batch_size), plan.directions)
        seen = run.strategy.observe_traces(clean, everywhere, first_query=HELD_OUT)
        held.append(HeldOut.of(seen, scale))
        for each in spectators:
            for name in each.allocators:
                if each.fits(name):
                    allocation, pilots = each.allocate(name, clean, statistics)
                    j = held[-1].of_counts(allocation.counts, pilots, allocation.pilot_weight, each.queries)
                    scores.setdefault((each.queries, name), []).append(j)
        if i == 0:
            traces += trace_rows(run, clean, held[-1], step)
        advance()
    run.strategy.draw = draw_counter  # the run draws its noise as if nobody had looked on
    rows: dict[str, list[Any]] = {"allocation": [], "sites": [], "traces": traces}
    for (budget, name), js in scores.items():
        equal = [h.equal(budget) for h in held]
        gains = [float(e.sum() / j.sum()) for e, j in zip(equal, js, strict=True)]
        optimal = interval([float(e.sum() / h.optimal(budget).sum()) for e, h in zip(equal, held, strict=True)])[0]
        linear = scores[budget, CASE_OF[name].best_linear]
        best = interval([float(e.sum() / j.sum()) for e, j in zip(equal, linear, strict=True)])[0]
        rows["allocation"].append((step, accuracy, budget, name, *interval(gains), optimal, best))
        for k, site in enumerate(sites):
            by_site = [float(e[k] / j[k]) for e, j in zip(equal, js, strict=True) if e[k] > 0]
            at_best = [float(e[k] / h.optimal(budget)[k]) for e, h in zip(equal, held, strict=True) if e[k] > 0]
            if by_site:
                rows["sites"].append((step, accuracy, budget, name, site, *interval(by_site), interval(at_best)[0]))
    return rows


CASE_OF = {case.name: case for case in CASES}


def trace_rows(run: Run, clean: CleanPass, held: HeldOut, step: int) -> list[tuple[Any, ...]]:
    """Rank correlations of the traces of one batch."""
    sites = [site.name for site in run.strategy.sites]
    pilots = run.strategy.observe_traces(clean, torch.full((len(sites), clean.batch_size), 4), first_query=PILOTS)
    rows: list[tuple[Any, ...]] = []
    for k, site in enumerate(sites):
        here = held.trace[k]
        for name, other in (("lowest", 0), ("deepest", -1)):
            pilot = pilots.trace[other].double().cpu()
            rows.append((step, site, f"trace with 4 pilots at the {name} site", float(rank_correlation(pilot, here))))
            there = float(rank_correlation(held.trace[other], here))
            rows.append((step, site, f"trace with that at the {name} site", there))
        rows.append((step, site, "trace with loss", float(rank_correlation(clean.loss.cpu(), here))))
    return rows + proxy_rows(run.strategy, clean, step)


def write(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Append rows to a table, with its header first."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(columns)
        writer.writerows([[f"{v:.6g}" if isinstance(v, float) else v for v in row] for row in rows])


def study(run: Run, plan: Plan, output: Path) -> None:
    """Train, measure at the checkpoints, and keep what was measured as it comes."""
    from tqdm import tqdm

    state, done = output / "run.pt", -1
    if state.exists():
        kept = torch.load(state, weights_only=True)
        if kept["plan"] != repr(plan):
            raise SettingError(
                "output", str(output), f"holds another study: {kept['plan']}.", "Give another folder, or remove it."
            )
        run.load_state_dict(kept["run"])
        done = kept["step"]
    left = [step for step in plan.checkpoints if step > done]
    spectators: list[Spectators] = []
    looked_on = sum(min(plan.window, step) for step in left) * len(plan.budgets)
    bar = tqdm(total=len(left) * plan.batches + looked_on, unit="batch", desc="allocation", mininterval=5.0)
    for step, (images, labels) in run.batches(max(done, 0)):
        if not left:
            break
        clean = run.strategy.clean_pass(images, labels)
        if left[0] - plan.window <= step < left[0]:
            spectators = spectators or [Spectators(run, budget) for budget in plan.budgets]
            statistics = run.strategy.sample_statistics(clean, spectators[0].names)
            for each in spectators:
                each.learn(clean, statistics)
                bar.update()
        if step == left[0]:
            rows = measure(run, plan, step, spectators or [Spectators(run, b) for b in plan.budgets], bar.update)
            for name, columns in (("allocation", COLUMNS), ("sites", SITE_COLUMNS), ("traces", TRACE_COLUMNS)):
                write(output / ("allocation_sites.csv" if name == "sites" else f"{name}.csv"), columns, rows[name])
            left.pop(0)
            spectators = []
            run.strategy.draw -= 1  # the batch's clean pass is made again when a run is resumed here
            keep(state, {"plan": repr(plan), "step": step, "run": run.state_dict()})
            run.strategy.draw += 1
        run.step(clean)
    bar.close()


def keep(path: Path, state: dict[str, Any]) -> None:
    """Save in one move, so that an interruption leaves the old file or the new one."""
    torch.save(state, path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def default_checkpoints(steps: int) -> tuple[int, ...]:
    """Before the first step, after the last, and at halves of it in between: learning is fastest early."""
    return tuple(sorted({0, *(steps // 2**k for k in range(5) if steps // 2**k > 5)}))


def main(args: Sequence[str] | None = None) -> None:
    """Run the study."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m experiments.allocation", description=summary)
    parser.add_argument("--config", action="append", required=True, help="configuration file; may be repeated")
    parser.add_argument("--output", type=Path, required=True, help="folder of the tables and the plot")
    parser.add_argument("--checkpoints", type=int, nargs="+", help="optimiser steps (default: 0 and halves of the run)")
    parser.add_argument("--budgets", type=int, nargs="+", default=[4, 10, 20, 60, 200], help="queries of a sample")
    parser.add_argument("--batches", type=int, default=6, help="batches scored at each checkpoint (default 6)")
    parser.add_argument("--directions", type=int, default=128, help="held-out directions of a sample (default 128)")
    parser.add_argument("--window", type=int, default=10, help="batches that allocators learn from (default 10)")
    parser.add_argument("extra", nargs="*", help="further arguments of main.py fit, after --")
    options = parser.parse_args(args)
    arguments = [part for path in options.config for part in ("--config", path)] + options.extra
    run = Run(arguments)
    checkpoints = tuple(sorted(options.checkpoints or default_checkpoints(run.steps)))
    plan = Plan(
        checkpoints,
        tuple(options.budgets),
        options.batches,
        options.directions,
        options.window,
        tuple(arguments),
    )
    options.output.mkdir(parents=True, exist_ok=True)
    study(run, plan, options.output)
    try:
        draw(options.output)
    except SettingError as error:  # matplotlib is an extra, and minutes of measuring are not to end in an error
        print(f"no plot: {error}")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
