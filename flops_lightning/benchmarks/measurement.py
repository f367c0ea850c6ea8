"""One case measured: the contenders, their times, the record."""

from __future__ import annotations

import platform
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
from flops_lightning.benchmarks.cases import Case
from flops_lightning.benchmarks.inference import full_inference, suffix_inference
from flops_lightning.benchmarks.reference import keyed_noise, literal_gradient, reference_gradient
from flops_lightning.benchmarks.report import MEMORY
from flops_lightning.benchmarks.timing import Timings, alternate
from flops_lightning.staging import StagedNetwork, stage_network
from flops_lightning.strategies import SPSA, Backprop, ForwardGradientStrategy, LikelihoodRatio, SiteSpec
from flops_lightning.strategies.site_queries import QueriedOutput
from flops_lightning.strategies.site_specs import default_specs

# Names of what is timed.
STEP, QUERIES = "step", "queries of the step"
FULL, SUFFIX, BACKPROP, CHECKPOINTED = "full inference", "suffix inference", "backprop", "checkpointed backprop"
REFERENCE, BATCHED = "reference", "batched reference"


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
    """

    network: StagedNetwork
    strategy: LikelihoodRatio | SPSA
    inputs: Tensor
    targets: Tensor
    references: bool = True


def set_up(case: Case, device: torch.device) -> Setup:
    """Random weights and data from a fixed seed."""
    torch.manual_seed(0)
    network = stage_network(case.build().to(device))
    strategy = strategy_of(case, network)
    strategy.bind(network, row_cross_entropy)
    inputs = torch.randn(case.batch, *case.image).to(device)
    targets = torch.randint(case.classes, (case.batch,)).to(device)
    return Setup(network, strategy, inputs, targets, case.references)


def strategy_of(case: Case, network: StagedNetwork) -> LikelihoodRatio | SPSA:
    """The strategy under test, unbound; its sites are the paper's (three groups and the head), or every stage."""
    sites = [replace(spec, queries_per_sample=case.queries) for spec in default_specs(network)]
    if case.kind == "block":
        ends = [network.stages[0].name, network.stages[-1].name]
        sites = [SiteSpec(stages=ends, kind="block", queries_per_sample=case.queries)]
    common: dict[str, Any] = {"sites": sites, "chunk_rows": case.chunk_rows, "seed": 0}
    return SPSA(layout="factored", **common) if case.strategy == "SPSA" else LikelihoodRatio(**common)


def contenders(setup: Setup) -> dict[str, Callable[[], object]]:
    """What is timed, by name; see :data:`flops_lightning.benchmarks.report.LEGEND` for what each includes."""
    network, ours, inputs, targets = setup.network, setup.strategy, setup.inputs, setup.targets
    chunk_rows, sites = ours.chunk_rows, ours.sites
    backprop = Backprop()
    backprop.bind(network, row_cross_entropy)
    clean = ours.clean_pass(inputs, targets)
    counts = torch.tensor([[site.queries_per_sample] * len(inputs) for site in sites])
    noise = keyed_noise(ours.seed, draw=clean.draw)

    def step(strategy: ForwardGradientStrategy) -> None:
        network.module.zero_grad()
        strategy.estimate(strategy.clean_pass(inputs, targets))

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
    if setup.references and isinstance(ours, LikelihoodRatio):
        found |= {REFERENCE: literal, BATCHED: batched}
    return found


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """Time a case and return its record."""
    setup = set_up(case, device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    return record(case, setup.strategy, device, alternate(contenders(setup), rounds=case.rounds, synchronize=wait))


def record(case: Case, strategy: LikelihoodRatio | SPSA, device: torch.device, timings: Timings) -> dict[str, Any]:
    """One record of the JSON file: what was measured, the ratios (medians), their quartiles, and on what they ran."""
    ratios = {
        "ratio_full_inference": timings.speed_ratio(FULL, STEP),
        "ratio_suffix_inference": timings.speed_ratio(SUFFIX, QUERIES),
        "ratio_backprop": timings.speed_ratio(BACKPROP, STEP),
        "ratio_checkpointed_backprop": timings.speed_ratio(CHECKPOINTED, STEP),
        "overhead_fraction": timings.excess_fraction(STEP, SUFFIX),
    }
    if REFERENCE in timings.seconds:
        ratios["ratio_reference"] = timings.speed_ratio(REFERENCE, STEP)
        ratios["ratio_batched_reference"] = timings.speed_ratio(BATCHED, STEP)
    return {
        "model": case.model,
        "batch": case.batch,
        "queries": case.queries,
        "strategy": f"{type(strategy).__name__} ({strategy.variant})",
        "layout": "factored" if isinstance(strategy, SPSA) else "activations",
        "sites": case.kind if case.kind == "block" else " ".join(site.name for site in strategy.sites),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **dict.fromkeys(("ratio_reference", "ratio_batched_reference", *MEMORY)),
        **{name: ratio.median for name, ratio in ratios.items()},
        "quartiles": {name: [ratio.low, ratio.high] for name, ratio in ratios.items()},
        "rounds": case.rounds,
        "chunk_rows": case.chunk_rows,
        "dtype": str(next(strategy.network.module.parameters()).dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
        "versions": {
            "flops_lightning": flops_lightning.__version__,
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "timm")},
        },
    }
