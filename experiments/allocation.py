"""``python -m experiments.allocation --config FILE --output DIR``: what allocation gains along a run.

The network of a configuration is trained with equal counts, by its own strategy and optimiser. Some batches before each
of a series of checkpoints, every allocator starts to look on, with a budget of its own that does not touch the run:
those that learn, learn from queries spent as they would have spent them. At the checkpoint each allocates some batches,
and is scored by traces of many directions that no allocator saw: ``gain = J_equal / J`` over all sites, in squared
units of the parameters, pilots paid from the same budget. ``gain_optimal`` is what exact traces would give at each
site, ``gain_best_linear`` the best allocation linear in tanh(loss) under the traces that the row's allocator had. Gains
of ``cost-aware`` are at equal compute and may exceed ``gain_optimal``, which is at equal queries of each site.

Writes ``allocation.csv`` (all sites), ``allocation_sites.csv`` (each site by itself), ``traces.csv`` (rank correlations
of traces, and of the activation-space proxy with parameter space) and ``allocation.png``. Interrupted, it continues
from the last checkpoint measured when started again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.allocation_cases import CASES, Case
from experiments.allocation_scores import HeldOut, proxy_rows
from experiments.command_line import StudyParser, configs
from experiments.harness import claim
from experiments.pictures import draw_allocation, draw_if_possible
from experiments.stats import geometric_interval
from experiments.tables import write_csv
from experiments.training import EqualCountsRun
from flops_lightning.allocators import Allocation, QueryAllocator, QueryBudget, SampleStatistics, TraceObservation
from flops_lightning.allocators.held_back import rank_correlation
from flops_lightning.queries import CleanPass

COLUMNS = (
    "checkpoint", "train_accuracy", "budget", "allocator", "gain", "gain_low", "gain_high", "gain_optimal",
    "gain_best_linear",
)  # fmt: skip
TABLES = {
    "allocation": COLUMNS,
    "allocation_sites": (*COLUMNS[:4], "site", *COLUMNS[4:8]),
    "traces": ("checkpoint", "site", "quantity", "value"),
}
# First query of each kind: apart from each other and from the queries that train.
PILOTS, OWN, HELD_OUT = 10_000, 100_000, 1_000_000


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


class Pilots:
    """Pilots of a batch, spent once for all allocators."""

    def __init__(self, run: EqualCountsRun) -> None:
        self.run = run
        self._spent: dict[tuple[int, str, int], TraceObservation] = {}

    def traces(self, clean: CleanPass, where: str, number: int) -> TraceObservation:
        """Traces of so many pilots at the ``lowest`` or ``deepest`` site or at ``all``."""
        key = (clean.draw, where, number)
        if key not in self._spent:
            self._spent = {kept: traces for kept, traces in self._spent.items() if kept[0] == clean.draw}
            counts = torch.zeros(len(self.run.strategy.sites), clean.batch_size, dtype=torch.int64)
            counts[{"lowest": slice(0, 1), "deepest": slice(-1, None), "all": slice(None)}[where]] = number
            self._spent[key] = self.run.strategy.observe_traces(clean, counts, first_query=PILOTS)
        return self._spent[key]


class Spectators:
    """The allocators of one budget, which look on."""

    def __init__(self, run: EqualCountsRun, pilots: Pilots, budget: int) -> None:
        self.run, self.pilots, self.queries = run, pilots, budget
        self.unit, self.minimum = run.strategy.budget.multiple, run.strategy.budget.minimum
        self.allocators: dict[str, tuple[Case, QueryAllocator]] = {case.name: (case, case.make()) for case in CASES}
        self.names = frozenset(name for _, allocator in self.allocators.values() for name in allocator.requests)

    def learn(self, clean: CleanPass, statistics: SampleStatistics) -> None:
        """Let those that learn see queries spent as the optimal allocator would have spent them."""
        counts = self.allocate("optimal", clean, statistics)[0].counts
        traces = self.run.strategy.observe_traces(clean, counts, first_query=OWN)
        for name, (_, allocator) in self.allocators.items():
            if allocator.learns:
                if name != "optimal":
                    self.allocate(name, clean, statistics)
                allocator.observe(traces)

    def allocate(self, name: str, clean: CleanPass, statistics: SampleStatistics) -> tuple[Allocation, Tensor]:
        """Counts of a batch and the ``(s, b)`` pilots that were spent before."""
        case, allocator = self.allocators[name]
        pilots = torch.zeros(len(self.run.strategy.sites), clean.batch_size, dtype=torch.int64)
        if number := self._pilot_queries(case):
            traces = self.pilots.traces(clean, case.pilots, number)
            pilots[traces.trace.isfinite().any(dim=1).cpu()] = number
            statistics = replace(statistics, trace=traces.trace, trace_queries=traces.queries)
        left = tuple(self.queries - int(line.max()) for line in pilots)
        return allocator.allocate(statistics, QueryBudget(left, multiple=self.unit, minimum=self.minimum)), pilots

    def affordable(self) -> list[str]:
        """Names of the cases whose pilots the budget suffices for."""
        return [name for name, (case, _) in self.allocators.items() if not case.pilots or self._pilot_queries(case)]

    def _pilot_queries(self, case: Case) -> int:
        return case.pilot_queries(self.queries, unit=self.unit, minimum=self.minimum)


def measure(
    run: EqualCountsRun, plan: Plan, step: int, spectators: Sequence[Spectators], advance: Callable[[], Any]
) -> dict[str, list[Any]]:
    """Rows of the three tables at one checkpoint."""
    accuracy, order, size = run.train_accuracy(), run.shuffled(step), run.data.batch_size
    held: list[HeldOut] = []
    scores: dict[tuple[int, str], list[Tensor]] = {}
    rows: dict[str, list[Any]] = {name: [] for name in TABLES}
    names = frozenset().union(*(each.names for each in spectators)) | {"scale"}
    sites = [site.name for site in run.strategy.sites]
    draw_counter = run.strategy.draw
    for i in range(plan.batches):
        clean = run.strategy.clean_pass(*run.images(order[i * size : (i + 1) * size]))
        statistics = run.strategy.sample_statistics(clean, names)
        if statistics.scale is None:
            raise TypeError("The scale was asked for.")
        everywhere = torch.full((len(sites), clean.batch_size), plan.directions)
        traces = run.strategy.observe_traces(clean, everywhere, first_query=HELD_OUT)
        held.append(HeldOut.of(traces, statistics.scale))
        for each in spectators:
            for name in each.affordable():
                allocation, pilots = each.allocate(name, clean, statistics)
                j = held[-1].of_counts(allocation.counts, pilots, allocation.pilot_weight, each.queries)
                scores.setdefault((each.queries, name), []).append(j)
        if i == 0:
            rows["traces"] = trace_rows(run, clean, held[-1], step)
        advance()
    run.strategy.draw = draw_counter  # the run draws its noise as if it had not been looked at
    best_linear = {case.name: case.best_linear for case in CASES}
    for (budget, name), js in scores.items():
        equal, optimal = [h.equal(budget) for h in held], [h.optimal(budget) for h in held]
        found = (step, accuracy, budget, name)
        linear = scores[budget, best_linear[name]]
        rows["allocation"].append((*found, *gains(equal, js), gains(equal, optimal)[0], gains(equal, linear)[0]))
        for k, site in enumerate(sites):
            kept = [i for i, e in enumerate(equal) if e[k] > 0]
            if kept:
                base, own, best = ([tensors[i][k] for i in kept] for tensors in (equal, js, optimal))
                rows["allocation_sites"].append((*found, site, *gains(base, own), gains(base, best)[0]))
    return rows


def gains(equal: Sequence[Tensor], own: Sequence[Tensor]) -> tuple[float, float, float]:
    """Gain over equal counts with its interval, from the J of each batch."""
    return geometric_interval([float(e.sum() / j.sum()) for e, j in zip(equal, own, strict=True)])


def trace_rows(run: EqualCountsRun, clean: CleanPass, held: HeldOut, step: int) -> list[tuple[Any, ...]]:
    """Rank correlations of the traces of one batch."""
    sites = [site.name for site in run.strategy.sites]
    pilots = run.strategy.observe_traces(clean, torch.full((len(sites), clean.batch_size), 4), first_query=PILOTS)
    compared = {}
    for name, other in (("lowest", 0), ("deepest", -1)):
        compared[f"trace with 4 pilots at the {name} site"] = pilots.trace[other].double().cpu()
        compared[f"trace with that at the {name} site"] = held.trace[other]
    compared["trace with loss"] = clean.loss.cpu()
    rows = [
        (step, site, quantity, float(rank_correlation(values, held.trace[k])))
        for k, site in enumerate(sites) for quantity, values in compared.items()
    ]  # fmt: skip
    return rows + proxy_rows(run.strategy, clean, step)


def study(run: EqualCountsRun, plan: Plan, output: Path) -> None:
    """Train, measure at the checkpoints, and keep what was measured as it comes."""
    from tqdm import tqdm

    claim(output, asdict(plan))
    state, done = output / "run.pt", -1
    if state.exists():
        kept = torch.load(state, weights_only=True)
        run.load_state_dict(kept["run"])
        done = kept["step"]
    left = [step for step in plan.checkpoints if step > done]
    pilots, spectators = Pilots(run), list[Spectators]()
    looked_on = sum(min(plan.window, step) for step in left) * len(plan.budgets)
    bar = tqdm(total=len(left) * plan.batches + looked_on, unit="batch", desc="allocation", mininterval=5.0)
    for step, (images, labels) in run.batches(max(done, 0)):
        if not left:
            break
        clean = run.strategy.clean_pass(images, labels)
        if left[0] - plan.window <= step <= left[0]:
            spectators = spectators or [Spectators(run, pilots, budget) for budget in plan.budgets]
        if left[0] - plan.window <= step < left[0]:
            statistics = run.strategy.sample_statistics(clean, spectators[0].names)
            for each in spectators:
                each.learn(clean, statistics)
                bar.update()
        if step == left[0]:
            for name, rows in measure(run, plan, step, spectators, bar.update).items():
                texts = [[f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows]
                write_csv(output / f"{name}.csv", TABLES[name], texts, append=True)
            left.pop(0)
            spectators = []
            run.strategy.draw -= 1  # the batch's clean pass is made again when a run is resumed here
            torch.save({"step": step, "run": run.state_dict()}, state.with_suffix(".part"))
            state.with_suffix(".part").replace(state)  # an interruption leaves the old file or the new one
            run.strategy.draw += 1
        run.step(clean)
    bar.close()


def default_checkpoints(steps: int) -> tuple[int, ...]:
    """Before the first step, after the last, and at halves of it in between: learning is fastest early."""
    return tuple(sorted({0, *(steps // 2**k for k in range(5) if steps // 2**k > 5)}))


def main(args: Sequence[str] | None = None) -> None:
    """Run the study."""
    parser = StudyParser(__doc__, runs=False)
    add = parser.add_argument
    add("--config", action="append", required=True, help="configuration file; may be repeated")
    add("--checkpoints", type=int, nargs="+", help="optimiser steps (default: 0 and halves of the run)")
    add("--budgets", type=int, nargs="+", default=[4, 10, 20, 60, 200], help="queries of a sample")
    add("--batches", type=int, default=6, help="batches scored at each checkpoint (default 6)")
    add("--directions", type=int, default=128, help="held-out directions of a sample (default 128)")
    add("--window", type=int, default=10, help="batches that allocators learn from (default 10)")
    options = parser.parse(args, at_least_one=["batches", "directions"])
    with parser.mistakes():
        arguments = (*configs(options.config), *options.extra)
        run = EqualCountsRun(arguments)
        checkpoints = tuple(sorted(options.checkpoints or default_checkpoints(run.steps)))
        budgets = tuple(options.budgets)
        plan = Plan(checkpoints, budgets, options.batches, options.directions, options.window, arguments)
        study(run, plan, options.output)
    draw_if_possible(draw_allocation, options.output)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
