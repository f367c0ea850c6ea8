"""One case measured: the contenders, their times, the record."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import flops_lightning
from flops_lightning.benchmarks.cases import Case
from flops_lightning.benchmarks.inference import full_inference, suffix_inference
from flops_lightning.benchmarks.reference import keyed_noise, reference_gradient
from flops_lightning.benchmarks.timing import Timings, alternate
from flops_lightning.staging import StagedNetwork, stage_network
from flops_lightning.strategies import Backprop, ForwardGradientStrategy, LikelihoodRatio
from flops_lightning.strategies.site_queries import SiteQueries
from flops_lightning.strategies.site_specs import default_specs

# Names of what is timed.
STEP, QUERIES = "step", "queries of the step"
FULL, SUFFIX, BACKPROP, REFERENCE = "full inference", "suffix inference", "backprop", "reference"


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
    """

    network: StagedNetwork
    strategy: LikelihoodRatio
    inputs: Tensor
    targets: Tensor


def set_up(case: Case, device: torch.device) -> Setup:
    """Random weights and data from a fixed seed, likelihood ratio at the paper's sites (three groups and the head)."""
    torch.manual_seed(0)
    network = stage_network(case.build().to(device))
    sites = [replace(spec, queries_per_sample=case.queries) for spec in default_specs(network)]
    strategy = LikelihoodRatio(sites=sites, chunk_rows=case.chunk_rows, seed=0)
    strategy.bind(network, row_cross_entropy)
    inputs = torch.randn(case.batch, *case.image).to(device)
    return Setup(network, strategy, inputs, torch.randint(case.classes, (case.batch,)).to(device))


def contenders(setup: Setup) -> dict[str, Callable[[], object]]:
    """What is timed, by name; see :data:`flops_lightning.benchmarks.report.LEGEND` for what each includes."""
    network, ours, inputs, targets = setup.network, setup.strategy, setup.inputs, setup.targets
    chunk_rows, sites = ours.chunk_rows, ours.sites
    backprop = Backprop()
    backprop.bind(network, row_cross_entropy)
    clean = ours.clean_pass(inputs, targets)
    queries = SiteQueries(network, row_cross_entropy, ours.variant, chunk_rows, ours.seed, ours.rank)
    counts = torch.tensor([[site.queries_per_sample] * len(inputs) for site in sites])
    noise = keyed_noise(ours.seed, draw=clean.draw)

    def step(strategy: ForwardGradientStrategy) -> None:
        network.module.zero_grad()
        strategy.estimate(strategy.clean_pass(inputs, targets))

    @torch.no_grad()
    def only_queries() -> None:
        with network.evaluating():
            for site in sites:
                sums = queries.sums(site, clean, np.full(len(inputs), site.queries_per_sample))
                assert sums is not None  # every sample has queries
                sums.delta()

    def reference() -> None:
        reference_gradient(
            network, row_cross_entropy, sites, inputs, targets, counts, noise=noise, rows=chunk_rows
        )  # fmt: skip

    return {
        STEP: lambda: step(ours),
        QUERIES: only_queries,
        FULL: full_inference(network, sites, inputs, chunk_rows=chunk_rows),
        SUFFIX: suffix_inference(network, sites, clean, chunk_rows=chunk_rows),
        BACKPROP: lambda: step(backprop),
        REFERENCE: reference,
    }


def measure(case: Case, device: torch.device) -> dict[str, Any]:
    """Time a case and return its record."""
    setup = set_up(case, device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    return record(case, setup.strategy, device, alternate(contenders(setup), rounds=case.rounds, synchronize=wait))


def record(case: Case, strategy: LikelihoodRatio, device: torch.device, timings: Timings) -> dict[str, Any]:
    """One record of the JSON file: what was measured, the ratios (medians), their quartiles, and on what they ran."""
    ratios = {
        "ratio_full_inference": timings.speed_ratio(FULL, STEP),
        "ratio_suffix_inference": timings.speed_ratio(SUFFIX, QUERIES),
        "ratio_backprop": timings.speed_ratio(BACKPROP, STEP),
        "ratio_reference": timings.speed_ratio(REFERENCE, STEP),
        "overhead_fraction": timings.excess_fraction(STEP, SUFFIX),
    }
    return {
        "model": case.model,
        "batch": case.batch,
        "queries": case.queries,
        "strategy": f"{type(strategy).__name__} ({strategy.variant})",
        "sites": " ".join(site.name for site in strategy.sites),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
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
