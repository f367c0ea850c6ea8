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

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from experiments.allocation_scores import HeldOut, proxy_rows
from experiments.command_line import StudyParser, configs
from experiments.harness import claim
from experiments.pictures import draw_allocation, draw_if_possible
from experiments.tables import geometric_interval, write_csv
from experiments.training import EqualCountsRun
from flops_lightning import allocators
from flops_lightning.allocators import QueryAllocator, QueryBudget, SampleStatistics, TraceObservation, TraceSettings
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
Key = tuple[int, str]  # budget and name of the case
PLAN = ("checkpoints", "budgets", "batches", "directions", "window", "arguments")
"""Options that say what is measured, and the run's arguments."""


MOST_PILOTS = 4


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], QueryAllocator]
    pilots: str = ""  # at the lowest, the deepest or all sites; paid from the same budget and reused
    best_linear: str = "best linear"  # the case of the best allocation linear in tanh(loss) under the same traces

    def pilot_queries(self, budget: int, *, multiple: int, minimum: int) -> int:
        """Pilots of a sample at each of its sites: four, or what a small budget leaves beside the minimum."""
        if not self.pilots:
            return 0
        most = min(MOST_PILOTS * multiple, (budget - max(minimum, multiple)) // multiple * multiple)
        return most if most >= 2 * multiple else 0


bernoulli, gaussian, optimal = (
    partial(cls, traces=TraceSettings(source="prediction"))
    for cls in (allocators.BernoulliAllocator, allocators.GaussianAllocator, allocators.OptimalAllocator)
)
piloted = allocators.GaussianAllocator
exact = partial(piloted, gradient="exact")

CASES: Sequence[Case] = (
    Case("equal", allocators.EqualAllocator),
    Case("bernoulli", bernoulli),
    Case("bernoulli, p = 0.5", partial(allocators.BernoulliAllocator, optimise=False)),
    Case("gaussian", gaussian),
    Case("gaussian, score gradient", partial(gaussian, gradient="score")),
    Case("gaussian, diagonal", partial(gaussian, covariance="diagonal")),
    Case("gaussian, pilots lowest", piloted, "lowest", "best linear, pilots lowest"),
    Case("gaussian, pilots deepest", piloted, "deepest", "best linear, pilots deepest"),
    Case("best linear", partial(gaussian, gradient="exact")),
    Case("best linear, pilots lowest", exact, "lowest", "best linear, pilots lowest"),
    Case("best linear, pilots deepest", exact, "deepest", "best linear, pilots deepest"),
    Case("optimal", optimal),
    Case("optimal, loss only", partial(optimal, traces=TraceSettings(predictors=["loss"]))),
    Case("optimal, pilots everywhere", partial(optimal, traces=TraceSettings("pilots")), pilots="all"),
    Case("optimal, both", partial(optimal, traces=TraceSettings("both")), pilots="lowest"),
    Case("cost-aware", partial(allocators.CostAwareAllocator, traces=TraceSettings(source="prediction"))),
)


class Spectators:
    """The allocators of each budget, which look on; pilots are spent once for all of them."""

    def __init__(self, run: EqualCountsRun, budgets: Sequence[int]) -> None:
        self.strategy, self.budgets = run.strategy, budgets
        self.limits: dict[str, Any] = {"multiple": run.strategy.budget.multiple, "minimum": run.strategy.budget.minimum}
        self.cases = {(budget, case.name): case for budget in budgets for case in CASES}
        self.allocators: dict[Key, QueryAllocator] = {key: case.make() for key, case in self.cases.items()}
        self.names = frozenset(name for allocator in self.allocators.values() for name in allocator.requests)
        self._pilots: dict[tuple[int, str, int], TraceObservation] = {}

    def learn(self, clean: CleanPass, statistics: SampleStatistics) -> None:
        """Let those that learn see queries spent as the optimal allocator of their budget would have spent them."""
        for budget in self.budgets:
            counts = self.allocate((budget, "optimal"), clean, statistics)[0].counts
            traces = self.strategy.observe_traces(clean, counts, first_query=OWN)
            for key, allocator in self.allocators.items():
                if key[0] == budget and allocator.learns:
                    if key[1] != "optimal":
                        self.allocate(key, clean, statistics)
                    allocator.observe(traces)

    def allocate(self, key: Key, clean: CleanPass, statistics: SampleStatistics) -> tuple[Any, Tensor]:
        """Counts of a batch by budget and case, and the ``(s, b)`` pilots that were spent before."""
        pilots = torch.zeros(len(self.strategy.sites), clean.batch_size, dtype=torch.int64)
        if number := self._pilot_queries(key):
            traces = self._traces(clean, self.cases[key].pilots, number)
            pilots[traces.trace.isfinite().any(dim=1).cpu()] = number
            statistics = replace(statistics, trace=traces.trace, trace_queries=traces.queries)
        budget = QueryBudget(tuple(key[0] - int(line.max()) for line in pilots), **self.limits)
        return self.allocators[key].allocate(statistics, budget), pilots

    def affordable(self) -> list[Key]:
        """Budgets and cases whose pilots the budget suffices for."""
        return [key for key, case in self.cases.items() if not case.pilots or self._pilot_queries(key)]

    def _pilot_queries(self, key: Key) -> int:
        return self.cases[key].pilot_queries(key[0], **self.limits)

    def _traces(self, clean: CleanPass, where: str, number: int) -> TraceObservation:
        key = (clean.draw, where, number)
        if key not in self._pilots:
            self._pilots = {kept: traces for kept, traces in self._pilots.items() if kept[0] == clean.draw}
            counts = torch.zeros(len(self.strategy.sites), clean.batch_size, dtype=torch.int64)
            counts[{"lowest": slice(0, 1), "deepest": slice(-1, None), "all": slice(None)}[where]] = number
            self._pilots[key] = self.strategy.observe_traces(clean, counts, first_query=PILOTS)
        return self._pilots[key]


def measure(run: EqualCountsRun, plan: Any, step: int, spectators: Spectators, bar: Any) -> dict[str, list[Any]]:
    accuracy, order, size = run.train_accuracy(), run.shuffled(step), run.data.batch_size
    held: list[HeldOut] = []
    scores: dict[Key, list[Tensor]] = {}
    rows: dict[str, list[Any]] = {name: [] for name in TABLES}
    sites = [site.name for site in run.strategy.sites]
    draw_counter = run.strategy.draw
    for i in range(plan.batches):
        clean = run.strategy.clean_pass(*run.images(order[i * size : (i + 1) * size]))
        statistics = run.strategy.sample_statistics(clean, spectators.names | {"scale"})
        everywhere = torch.full((len(sites), clean.batch_size), plan.directions)
        traces = run.strategy.observe_traces(clean, everywhere, first_query=HELD_OUT)
        held.append(HeldOut.of(traces, cast("Tensor", statistics.scale)))
        for key in spectators.affordable():
            allocation, pilots = spectators.allocate(key, clean, statistics)
            j = held[-1].of_counts(allocation.counts, pilots, allocation.pilot_weight, key[0])
            scores.setdefault(key, []).append(j)
        if i == 0:
            rows["traces"] = trace_rows(run, clean, held[-1], step)
        bar.update()
    run.strategy.draw = draw_counter  # the run draws its noise as if it had not been looked at
    best_linear = {case.name: case.best_linear for case in CASES}
    for (budget, name), js in scores.items():
        equal, optimal = [h.equal(budget) for h in held], [h.optimal(budget) for h in held]
        found, linear = (step, accuracy, budget, name), scores[budget, best_linear[name]]
        rows["allocation"].append((*found, *gains(equal, js), gains(equal, optimal)[0], gains(equal, linear)[0]))
        for k, site in enumerate(sites):
            if kept := [i for i, e in enumerate(equal) if e[k] > 0]:
                base, own, best = ([tensors[i][k] for i in kept] for tensors in (equal, js, optimal))
                rows["allocation_sites"].append((*found, site, *gains(base, own), gains(base, best)[0]))
    return rows


def gains(equal: Sequence[Tensor], own: Sequence[Tensor]) -> tuple[float, float, float]:
    """Gain over equal counts with its interval, from the J of each batch."""
    return geometric_interval(float(e.sum() / j.sum()) for e, j in zip(equal, own, strict=True))


def trace_rows(run: EqualCountsRun, clean: CleanPass, held: HeldOut, step: int) -> list[tuple[Any, ...]]:
    sites = [site.name for site in run.strategy.sites]
    pilots = run.strategy.observe_traces(clean, torch.full((len(sites), clean.batch_size), 4), first_query=PILOTS)
    compared = {}
    for name, other in (("lowest", 0), ("deepest", -1)):
        compared[f"trace with 4 pilots at the {name} site"] = pilots.trace[other].double().cpu()
        compared[f"trace with that at the {name} site"] = held.trace[other]
    compared["trace with loss"] = clean.loss.cpu()
    rows: list[tuple[Any, ...]] = []
    for site, exact in zip(sites, held.trace, strict=True):
        rows += [(step, site, name, float(rank_correlation(values, exact))) for name, values in compared.items()]
    return rows + proxy_rows(run.strategy, clean, step)


def study(options: argparse.Namespace) -> None:
    """Train, keep what is measured at the checkpoints as it comes, and draw the picture."""
    from tqdm import tqdm

    options.arguments = (*configs(options.config), *options.extra)
    run, output, window = EqualCountsRun(options.arguments), options.output, options.window
    halves = [run.steps // 2**k for k in range(5)]  # learning is fastest early
    options.checkpoints = sorted(options.checkpoints or {0, *(step for step in halves if step > 5)})
    options.budgets = list(dict.fromkeys(options.budgets))
    claim(output, {name: getattr(options, name) for name in PLAN})
    state, done = output / "run.pt", -1
    if state.exists():
        kept = torch.load(state, weights_only=True)
        for name, part in run.parts.items():
            part.load_state_dict(kept["run"][name])
        done = kept["step"]
    left = [step for step in options.checkpoints if step > done]
    spectators: Spectators | None = None
    total = sum(options.batches + min(window, step) for step in left)
    bar = tqdm(total=total, unit="batch", desc="allocation", mininterval=5.0)
    for step, (images, labels) in run.batches(max(done, 0)):
        if not left:
            break
        clean = run.strategy.clean_pass(images, labels)
        if left[0] - window <= step <= left[0]:
            spectators = spectators or Spectators(run, options.budgets)
        if spectators and step < left[0]:
            spectators.learn(clean, run.strategy.sample_statistics(clean, spectators.names))
            bar.update()
        elif spectators:
            for name, rows in measure(run, options, left.pop(0), spectators, bar).items():
                texts = [[f"{value:.6g}" if isinstance(value, float) else value for value in row] for row in rows]
                write_csv(output / f"{name}.csv", TABLES[name], texts, append=True)
            spectators = None
            run.strategy.draw -= 1  # the batch's clean pass is made again when a run is resumed here
            states = {name: part.state_dict() for name, part in run.parts.items()}
            torch.save({"step": step, "run": states}, state.with_suffix(".part"))
            state.with_suffix(".part").replace(state)  # an interruption leaves the old file or the new one
            run.strategy.draw += 1
        run.step(clean)
    bar.close()
    draw_if_possible(draw_allocation, output)
    print(f"written to {output}")


def main(args: Sequence[str] | None = None) -> None:
    batches, directions = (6, "batches scored at each checkpoint"), (128, "held-out directions per sample")
    parser = StudyParser(__doc__, runs=False, batches=batches, directions=directions)
    add = parser.add_argument
    add("--config", action="append", required=True, help="configuration file; may be repeated")
    add("--checkpoints", type=int, nargs="+", help="optimiser steps (default: 0 and halves of the run)")
    add("--budgets", type=int, nargs="+", default=[4, 10, 20, 60, 200], help="queries per sample at each site")
    add("--window", type=int, default=10, help="batches that allocators learn from (default 10)")
    parser.run(study, args)


if __name__ == "__main__":
    main()
