"""Time of a training step beside the inference it is made of, beside backprop, and beside plain reference steps."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import Case
from benchmarks.harness import Record, Timings, alternate, synchronizer
from benchmarks.reference import Reference
from flops_lightning.allocators import GaussianAllocator, QueryAllocator
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.objectives import cross_entropy
from flops_lightning.phases import PHASES, phase, timed_phases
from flops_lightning.queries import CleanPass, plan_rows
from flops_lightning.strategies import SPSA, Backprop, ForwardGradientStrategy, LikelihoodRatio
from flops_lightning.strategies.costs import site_costs
from flops_lightning.strategies.perturbation import boundary_activation
from flops_lightning.strategies.query_strategy import QueryStrategy
from flops_lightning.strategies.sites import Site

STEP, QUERIES = "step", "queries of the step"
FULL, SUFFIX, BACKPROP, CHECKPOINTED = "full inference", "suffix inference", "backprop", "checkpointed backprop"
REFERENCE, BATCHED = "reference", "batched reference"
RATIOS = {
    f"ratio_{theirs.replace(' ', '_')}": (theirs, QUERIES if theirs == SUFFIX else STEP)
    for theirs in (FULL, SUFFIX, BACKPROP, CHECKPOINTED, REFERENCE, BATCHED)
}
"""Key in the record -> (theirs, ours): time of the first over that of the second."""


@dataclass(frozen=True, eq=False)
class Setup:
    """A case on a device: its bound strategy, a batch, and the allocator (None: equal counts)."""

    case: Case
    network: StagedNetwork
    strategy: LikelihoodRatio | SPSA
    inputs: Tensor
    targets: Tensor
    allocator: QueryAllocator | None = None


def set_up(case: Case, device: torch.device) -> Setup:
    network, inputs, targets = case.load(device)
    strategy = case.make_strategy(network)
    strategy.bind(network, cross_entropy)
    allocator = GaussianAllocator() if case.allocation == "gaussian" else None
    return Setup(case, network, strategy, inputs, targets, allocator)


def step(setup: Setup, strategy: ForwardGradientStrategy | None = None) -> None:
    """``.grad`` of a batch: clean pass, pilots and allocation if there are any, queries, local VJP; no optimiser."""
    strategy, allocator = strategy or setup.strategy, setup.allocator
    setup.network.module.zero_grad()
    clean = strategy.clean_pass(setup.inputs, setup.targets)
    if allocator is None or not isinstance(strategy, QueryStrategy):
        strategy.estimate(clean)
        return
    with phase("allocation"):
        allocation = allocator.allocate(strategy.sample_statistics(clean, allocator.requests), strategy.budget)
    counts, weight = allocation.counts, allocation.pilot_weight
    estimate = strategy.estimate(clean, counts, pilot_weight=weight, traces=allocator.learns)
    if estimate.observation is not None:
        with phase("allocation"):
            allocator.observe(estimate.observation)


@torch.no_grad()
def run_queries(strategy: QueryStrategy[Any], clean: CleanPass) -> Iterator[tuple[Site, Any]]:
    """Each site with the sums at its output, or with its gradient by name where noise is in the parameters."""
    engine: Any = strategy.engine
    with strategy.network.evaluating():
        for site in strategy.sites:
            result = engine.query(site, clean, np.full(clean.batch_size, site.queries_per_sample))
            if site.in_parameters:
                yield site, engine.mixed_gradient(site, clean, [(result, torch.ones_like(clean.loss))])
            else:
                yield site, result.sums.delta()
            del result  # no site's sums outlive it


def forward_equivalents(strategy: LikelihoodRatio | SPSA, inputs: Tensor) -> float:
    """What the meter counts for one sample of a step, known before any step is made."""
    costs = site_costs(strategy.network, strategy.sites, inputs)
    return 1 + sum(s.queries_per_sample * costs.query[s.name] + costs.gradient[s.name] for s in strategy.sites)


def seconds_by_phase(setup: Setup, synchronize: Callable[[], object]) -> dict[str, float]:
    """Seconds of each phase of a step, its optimiser (AdamW) included, and of the ``rest``; the second of two steps."""
    optimizer = torch.optim.AdamW(setup.network.module.parameters(), lr=0.0)
    for _ in range(2):
        synchronize()
        with timed_phases(synchronize) as seconds:
            start = time.perf_counter()
            step(setup)
            with phase("optimiser"):
                optimizer.step()
            whole = time.perf_counter() - start
    return {name: seconds.get(name, 0.0) for name in PHASES} | {"rest": whole - sum(seconds.values())}


# Yardsticks: plain inference of as many rows as the step has queries, repeated beforehand, in chunks as large as the
# step's own: for each site a stage, and chunks of rows that go through the network from there on.
Rows = Sequence[tuple[int, Sequence[Tensor]]]


@torch.inference_mode()
def infer(network: StagedNetwork, rows: Rows) -> None:
    with network.evaluating():
        for start, chunks in rows:
            for h in chunks:
                network.run_suffix(h if start else network.run(h, 0, 1), start or 1)


def full_rows(sites: Iterable[Site], inputs: Tensor, chunk_rows: int) -> Rows:
    """Every query of every site as one row through the whole network."""
    chunks = {queries: _repeated(inputs, int(queries), chunk_rows) for queries in {s.queries_per_sample for s in sites}}
    return [(0, chunks[site.queries_per_sample]) for site in sites]


def suffix_rows(sites: Iterable[Site], clean: CleanPass, chunk_rows: int) -> Rows:
    """Every query of every ``block`` or ``group`` site as one row through what is above the noise."""
    begins = [(s, clean.activations[s.start] if s.in_parameters else boundary_activation(s, clean)) for s in sites]
    return [(site.start, _repeated(h, int(site.queries_per_sample), chunk_rows)) for site, h in begins]


def _repeated(h: Any, queries: int, chunk_rows: int) -> Sequence[Tensor]:
    even = plan_rows(np.full(len(h), queries), chunk_rows).chunk_rows
    return h.repeat_interleave(queries, dim=0).split(even)


def contenders(setup: Setup) -> dict[str, Callable[[], object]]:
    """What is timed, by name; ``LEGEND`` of ``benchmarks/__main__.py`` says what each includes."""
    ours, network, inputs, targets = setup.strategy, setup.network, setup.inputs, setup.targets
    rows, sites = ours.chunk_rows, ours.sites
    backprop = Backprop()
    backprop.bind(network, cross_entropy)
    clean = ours.clean_pass(inputs, targets)
    counts = torch.tensor([[site.queries_per_sample] * len(inputs) for site in sites])
    reference = Reference(network, cross_entropy, sites, inputs, targets, counts, ours.seed, clean.draw)

    def checkpointed() -> None:
        network.module.zero_grad()
        h = inputs
        for stage in network.stages:
            h = checkpoint(stage.run, h, use_reentrant=False)
        cross_entropy(h, targets).mean().backward()

    found: dict[str, Callable[[], object]] = {
        QUERIES: lambda: [None for _ in run_queries(ours, clean)],
        SUFFIX: partial(infer, network, suffix_rows(sites, clean, rows)),
    }
    if not setup.case.suffixes_only:
        full = partial(infer, network, full_rows(sites, inputs, rows))
        found |= {STEP: partial(step, setup), FULL: full}
        found |= {BACKPROP: partial(step, setup, backprop), CHECKPOINTED: checkpointed}
        if setup.case.references and isinstance(ours, LikelihoodRatio):
            found |= {REFERENCE: reference.literal, BATCHED: partial(reference.batched, rows)}
    return found


def measure(case: Case, device: torch.device) -> Record:
    setup, wait = set_up(case, device), synchronizer(device)
    timings = alternate(contenders(setup), rounds=case.rounds, synchronize=wait)
    return record(setup, timings) | {"seconds_by_phase": seconds_by_phase(setup, wait)}


def record(setup: Setup, timings: Timings) -> Record:
    """What was measured, and the ratios; None where a contender was not timed."""
    case, strategy, timed = setup.case, setup.strategy, timings.seconds
    names = ("model", "batch", "queries", "allocation", "compiled", "rounds", "chunk_rows")
    return {
        **{name: getattr(case, name) for name in names},
        "strategy": f"{type(strategy).__name__} ({strategy.variant})",
        "layout": "factored" if isinstance(strategy, SPSA) else "activations",
        "sites": case.kind if case.kind == "block" else " ".join(site.name for site in strategy.sites),
        **{key: timings.ratio(*pair) if timed.keys() >= set(pair) else None for key, pair in RATIOS.items()},
        "overhead_fraction": timings.excess(STEP, SUFFIX) if STEP in timed else None,
    }
