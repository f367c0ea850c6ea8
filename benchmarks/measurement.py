"""One case measured: the contenders, their times, the record."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import flops_lightning
from benchmarks.cases import PILOTS, Case
from benchmarks.inference import full_inference, suffix_inference
from benchmarks.reference import keyed_noise, literal_gradient, reference_gradient
from benchmarks.report import MEMORY
from benchmarks.timing import Timings, alternate, waiting_for
from flops_lightning.allocators import GaussianAllocator, QueryAllocator
from flops_lightning.network.staging import StagedNetwork, stage_network
from flops_lightning.phases import PHASES, phase, timed_phases
from flops_lightning.strategies import SPSA, Backprop, ForwardGradientStrategy, LikelihoodRatio, PilotSpec, SiteSpec
from flops_lightning.strategies.query_strategy import QueryStrategy
from flops_lightning.strategies.site_queries import QueriedOutput
from flops_lightning.strategies.site_specs import default_specs

# Names of what is timed.
STEP, QUERIES = "step", "queries of the step"
FULL, SUFFIX, BACKPROP, CHECKPOINTED = "full inference", "suffix inference", "backprop", "checkpointed backprop"
REFERENCE, BATCHED = "reference", "batched reference"
RATIOS = {
    "ratio_full_inference": (FULL, STEP),
    "ratio_suffix_inference": (SUFFIX, QUERIES),
    "ratio_backprop": (BACKPROP, STEP),
    "ratio_checkpointed_backprop": (CHECKPOINTED, STEP),
    "ratio_reference": (REFERENCE, STEP),
    "ratio_batched_reference": (BATCHED, STEP),
}
"""Key in the record -> (theirs, ours): time of the first over that of the second."""


def row_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """``(r,)`` cross entropy of each row."""
    return F.cross_entropy(outputs, targets, reduction="none")


@dataclass(frozen=True, eq=False)
class Setup:
    """A case on a device.

    Attributes:
        network: The staged network.
        strategy: The bound strategy under test.
        inputs: ``(b, c, h, w)`` images.
        targets: ``(b,)`` labels.
        references: Whether the plain reference steps are timed as well.
        allocator: Who chooses the counts; None: they are equal.
        suffixes_only: Time nothing but the queries and inference of the same suffixes.
    """

    network: StagedNetwork
    strategy: LikelihoodRatio | SPSA
    inputs: Tensor
    targets: Tensor
    references: bool = True
    allocator: QueryAllocator | None = None
    suffixes_only: bool = False


def set_up(case: Case, device: torch.device) -> Setup:
    """Random weights and data from a fixed seed."""
    torch.manual_seed(0)
    network = stage_network(case.build().to(device))
    strategy = strategy_of(case, network)
    strategy.bind(network, row_cross_entropy)
    inputs = torch.randn(case.batch, *case.image).to(device)
    targets = torch.randint(case.classes, (case.batch,)).to(device)
    allocator = GaussianAllocator() if case.allocation == "gaussian" else None
    return Setup(network, strategy, inputs, targets, case.references, allocator, case.suffixes_only)


def strategy_of(case: Case, network: StagedNetwork) -> LikelihoodRatio | SPSA:
    """The strategy under test, unbound; its sites are the paper's (three groups and the head), or every stage."""
    sites = [replace(spec, queries_per_sample=case.queries) for spec in default_specs(network)]
    if case.kind == "block":
        ends = [network.stages[0].name, network.stages[-1].name]
        sites = [SiteSpec(stages=ends, kind="block", queries_per_sample=case.queries)]
    common: dict[str, Any] = {
        "sites": sites, "chunk_rows": case.chunk_rows, "compile_suffixes": case.compiled, "seed": 0,
    }  # fmt: skip
    if case.allocation == "gaussian":
        common["pilots"] = PilotSpec(sites[-2].name, queries=PILOTS)  # the highest group
    return SPSA(layout="factored", **common) if case.strategy == "SPSA" else LikelihoodRatio(**common)


def one_step(strategy: ForwardGradientStrategy, setup: Setup) -> None:
    """Add a batch's estimate to ``.grad``: clean pass, pilots and allocation if there are any, queries, local VJP."""
    clean = strategy.clean_pass(setup.inputs, setup.targets)
    if setup.allocator is None or not isinstance(strategy, QueryStrategy):
        strategy.estimate(clean)
        return
    with phase("allocation"):
        known = strategy.sample_statistics(clean, setup.allocator.requests)
        chosen = setup.allocator.allocate(known, strategy.budget)
    estimate = strategy.estimate(clean, chosen.counts, pilot_weight=chosen.pilot_weight, traces=setup.allocator.learns)
    if estimate.observation is not None:
        with phase("allocation"):
            setup.allocator.observe(estimate.observation)


def seconds_by_phase(setup: Setup, synchronize: Callable[[], object]) -> dict[str, float]:
    """Seconds of each phase of a step, its optimiser (AdamW) included, and of the ``rest``; the second of two steps."""
    optimizer = torch.optim.AdamW(setup.network.module.parameters(), lr=0.0)

    def step() -> dict[str, float]:
        optimizer.zero_grad()
        synchronize()
        with timed_phases(synchronize) as seconds:
            start = time.perf_counter()
            one_step(setup.strategy, setup)
            with phase("optimiser"):
                optimizer.step()
            whole = time.perf_counter() - start
        return {name: seconds.get(name, 0.0) for name in PHASES} | {"rest": whole - sum(seconds.values())}

    step()
    return step()


def contenders(setup: Setup) -> dict[str, Callable[[], object]]:
    """What is timed, by name; see :data:`benchmarks.report.LEGEND` for what each includes."""
    ours, inputs, targets = setup.strategy, setup.inputs, setup.targets
    network = ours.network
    chunk_rows, sites = ours.chunk_rows, ours.sites
    backprop = Backprop()
    backprop.bind(network, row_cross_entropy)
    clean = ours.clean_pass(inputs, targets)
    counts = torch.tensor([[site.queries_per_sample] * len(inputs) for site in sites])
    noise = keyed_noise(ours.seed, draw=clean.draw)

    def step(strategy: ForwardGradientStrategy) -> None:
        network.module.zero_grad()
        one_step(strategy, setup)

    @torch.no_grad()
    def only_queries() -> None:
        with network.evaluating():
            for site in sites:
                queried = ours.engine.query(site, clean, np.full(len(inputs), site.queries_per_sample))
                if isinstance(queried, QueriedOutput):
                    queried.sums.delta()
                elif queried is not None:  # parameters were perturbed: the sums are the gradient
                    shares = torch.ones_like(clean.loss)
                    cast("Any", ours.engine).mixed_gradient(site, clean, [(queried, shares)])

    def batched() -> None:
        reference_gradient(
            network, row_cross_entropy, sites, inputs, targets, counts, noise=noise, rows=chunk_rows
        )  # fmt: skip

    def literal() -> None:
        literal_gradient(network, row_cross_entropy, sites, inputs, targets, counts, noise=noise)

    def checkpointed() -> None:
        network.module.zero_grad()
        h = inputs
        for stage in network.stages:
            h = checkpoint(stage.run, h, use_reentrant=False)
        row_cross_entropy(h, targets).mean().backward()

    found: dict[str, Callable[[], object]] = {
        STEP: lambda: step(ours),
        QUERIES: only_queries,
        FULL: full_inference(network, sites, inputs, chunk_rows=chunk_rows),
        SUFFIX: suffix_inference(network, sites, clean, chunk_rows=chunk_rows),
        BACKPROP: lambda: step(backprop),
        CHECKPOINTED: checkpointed,
    }
    if setup.suffixes_only:
        return {name: found[name] for name in (QUERIES, SUFFIX)}
    if setup.references and isinstance(ours, LikelihoodRatio):
        found |= {REFERENCE: literal, BATCHED: batched}
    return found


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """Time a case and return its record."""
    setup = set_up(case, device)
    wait = waiting_for(device)
    timings = alternate(contenders(setup), rounds=case.rounds, synchronize=wait)
    return record(case, setup.strategy, device, timings) | {"seconds_by_phase": seconds_by_phase(setup, wait)}


def record(case: Case, strategy: LikelihoodRatio | SPSA, device: torch.device, timings: Timings) -> dict[str, Any]:
    """One record of the JSON file: what was measured, the ratios (medians), their quartiles, and on what they ran."""
    timed = timings.seconds
    ratios = {
        key: timings.speed_ratio(other, own) for key, (other, own) in RATIOS.items() if other in timed and own in timed
    }
    if STEP in timed:
        ratios["overhead_fraction"] = timings.excess_fraction(STEP, SUFFIX)
    return {
        "model": case.model,
        "batch": case.batch,
        "queries": case.queries,
        "allocation": case.allocation,
        "compiled": case.compiled,
        "strategy": f"{type(strategy).__name__} ({strategy.variant})",
        "layout": "factored" if isinstance(strategy, SPSA) else "activations",
        "sites": case.kind if case.kind == "block" else " ".join(site.name for site in strategy.sites),
        **dict.fromkeys((*RATIOS, "overhead_fraction", *MEMORY)),
        **{name: ratio.median for name, ratio in ratios.items()},
        "quartiles": {name: [ratio.low, ratio.high] for name, ratio in ratios.items()},
        "rounds": case.rounds,
        "chunk_rows": case.chunk_rows,
        **environment_of(strategy.network, device),
    }


def environment_of(network: StagedNetwork, device: torch.device) -> dict[str, Any]:
    """On what a record was measured."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(next(network.module.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "versions": {
            "flops_lightning": flops_lightning.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "timm")},
        },
    }
