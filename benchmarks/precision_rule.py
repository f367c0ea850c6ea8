"""``python -m benchmarks.precision_rule``: how wide noise must be, in rounding steps.

A rounding step is the precision's machine epsilon times the root mean square of what is perturbed, at each site its own
(:class:`~flops_lightning.strategies.precision.Resolution`). Reported is the cosine of an estimate with the one from
exact derivatives along the same directions (forward mode in float32), lowest and highest of the sites of the default
layout: 1 but for rounding and curvature, however few the directions are.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measurement import row_cross_entropy
from benchmarks.precision import PRECISIONS, digits, gradients, random_vit_tiny
from flops_lightning.network.staging import StagedNetwork, stage_network
from flops_lightning.strategies import (
    EvolutionStrategies,
    ForwardMode,
    LikelihoodRatio,
    SiteSpec,
    WeightForwardMode,
)
from flops_lightning.strategies.precision import TF32_EPS, Resolution, perturbed_values
from flops_lightning.strategies.query_strategy import QueryStrategy
from flops_lightning.strategies.site_specs import default_specs

EPS = {
    "float32": torch.finfo(torch.float32).eps,
    "TF32 (simulated)": TF32_EPS,
    "float16": torch.finfo(torch.float16).eps,
    "bfloat16": torch.finfo(torch.bfloat16).eps,
}
STEPS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)

Batch = tuple[Tensor, Tensor]
Make = Callable[[Sequence[SiteSpec]], QueryStrategy[Any]]


def deep_mlp(batch: int, seed: int) -> tuple[StagedNetwork, Batch]:
    """20 layers of width 64 with norms, random weights, and noise for data."""
    torch.manual_seed(seed)
    layers = [layer for _ in range(20) for layer in (nn.Linear(64, 64), nn.LayerNorm(64), nn.GELU())]
    network = stage_network(nn.Sequential(*layers, nn.Linear(64, 10)))
    return network, (torch.randn(batch, 64), torch.randint(10, (batch,)))


NETWORKS: Mapping[str, tuple[Callable[[int, int], tuple[StagedNetwork, Batch]], int, int]] = {
    "digits": (digits, 16, 10),
    "vit_tiny": (random_vit_tiny, 2, 8),
    "mlp20": (deep_mlp, 16, 10),
}
"""By name: the network with a batch of given size and seed, the batch's size, queries of a sample at each site."""


def methods(seed: int) -> Mapping[str, tuple[Make, Make]]:
    """By name: a method, and the same directions with exact derivatives."""

    def maker(cls: Any, **settings: Any) -> Make:
        return lambda sites: cls(sites=list(sites), seed=seed, chunk_rows=16, **settings)

    return {
        "activations": (maker(LikelihoodRatio), maker(ForwardMode)),
        "parameters, shared": (maker(EvolutionStrategies), maker(WeightForwardMode)),
        "parameters, factored": (
            maker(EvolutionStrategies, layout="factored"),
            maker(WeightForwardMode, layout="factored"),
        ),
    }


def estimate(strategy: QueryStrategy[Any], network: StagedNetwork, batch: Batch) -> dict[str, Tensor]:
    """The estimate of each site as a float64 vector, by the site's name."""
    found = gradients(strategy, network, batch)
    return {site.name: torch.cat([found[name] for name in site.parameters]) for site in strategy.sites}


def widths(strategy: QueryStrategy[Any], network: StagedNetwork, batch: Batch, eps: float) -> dict[str, float]:
    """Sigma of one rounding step at each site."""
    strategy.bind(network, row_cross_entropy)
    clean, step = strategy.clean_pass(*batch), Resolution("", eps, 1.0)
    return {site.name: step.least_width(*perturbed_values(site, clean)) for site in strategy.sites}


def line(
    network: StagedNetwork,
    batch: Batch,
    queries: int,
    pair: tuple[Make, Make],
    *,
    precision: str,
    steps: Sequence[float] = STEPS,
) -> list[tuple[float, float]]:
    """Lowest and highest cosine of the sites at each number of rounding steps."""  # fmt: skip
    make, make_exact = pair
    specs = [replace(spec, queries_per_sample=queries) for spec in default_specs(network)]
    exact = estimate(make_exact(specs), network, batch)
    width = widths(make(specs), network, batch, EPS[precision])
    found = []
    for step in steps:
        strategy = make([replace(spec, sigma=step * width[str(spec.name)]) for spec in specs])
        with PRECISIONS[precision]():
            estimates = estimate(strategy, network, batch)
        cosines = [float(F.cosine_similarity(estimates[name], exact[name], dim=0)) for name in exact]
        found.append((min(cosines), max(cosines)))
    return found


def main(args: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision_rule",
        description="Cosine with exact derivatives along the same directions against sigma in rounding steps.",
    )
    seed = 0
    known = methods(seed)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="default all")
    parser.add_argument("--methods", nargs="+", choices=known, default=list(known), help="default all")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="default all")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    print("| network, noise | precision | " + " | ".join(f"{step:g}" for step in STEPS) + " |")
    print("|" + "---|" * (2 + len(STEPS)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the sigmas that are too small: that is what is measured
        for name in options.networks:
            build, size, queries = NETWORKS[name]
            network, batch = build(size, seed)
            for method in options.methods:
                for precision in options.precisions:
                    cells = line(network, batch, queries, known[method], precision=precision)
                    shown = " | ".join(f"{low:.2f} - {high:.2f}" for low, high in cells)
                    print(f"| {name}, {method} | {precision} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
