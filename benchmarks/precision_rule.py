"""``python -m benchmarks.precision_rule``: how wide noise must be, in rounding steps.

A rounding step is the precision's machine epsilon times the root mean square of what is perturbed, at each site its own
(:class:`~flops_lightning.strategies.precision.Resolution`). Reported is the cosine of an estimate with the one from
exact derivatives along the same directions (forward mode in float32), lowest and highest of the sites of the default
layout: 1 but for rounding and curvature, however few the directions are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Record, command, finish, say, table
from benchmarks.precision import NETWORKS, PRECISIONS, Batch, cosine, gradients
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.objectives import cross_entropy
from flops_lightning.strategies import EvolutionStrategies, ForwardMode, LikelihoodRatio, SiteSpec, WeightForwardMode
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
SIZES = {"digits": (16, 10), "vit_tiny": (2, 8), "mlp20": (16, 10)}
"""By network: samples in the batch, and queries of each at each site."""
SEED = 0

Make = Callable[[Sequence[SiteSpec]], QueryStrategy[Any]]


def _maker(cls: Any, **settings: Any) -> Make:
    return lambda sites: cls(sites=list(sites), seed=SEED, chunk_rows=16, **settings)


METHODS = {
    "activations": (_maker(LikelihoodRatio), _maker(ForwardMode)),
    "parameters, shared": (_maker(EvolutionStrategies), _maker(WeightForwardMode)),
    "parameters, factored": (
        _maker(EvolutionStrategies, layout="factored"),
        _maker(WeightForwardMode, layout="factored"),
    ),
}
"""By name: a method, and exact derivatives along the same directions."""


def estimate(strategy: QueryStrategy[Any], network: StagedNetwork, batch: Batch) -> dict[str, Tensor]:
    """The estimate of each site as a float64 vector, by the site's name."""
    found = gradients(strategy, network, batch)
    return {site.name: torch.cat([found[name] for name in site.parameters]) for site in strategy.sites}


def step_widths(strategy: QueryStrategy[Any], network: StagedNetwork, batch: Batch, eps: float) -> dict[str, float]:
    """Sigma of one rounding step at each site."""
    strategy.bind(network, cross_entropy)
    clean, step = strategy.clean_pass(*batch), Resolution("", eps, 1.0)
    return {site.name: step.least_width(*perturbed_values(site, clean)) for site in strategy.sites}


def cosine_ranges(
    network_name: str, method: str, precision: str, *, steps: Sequence[float] = STEPS
) -> list[tuple[float, float]]:
    """Lowest and highest cosine of the sites at each number of rounding steps."""
    samples, queries = SIZES[network_name]
    network, batch = NETWORKS[network_name](samples, SEED)
    make, make_exact = METHODS[method]
    specs = [replace(spec, queries_per_sample=queries) for spec in default_specs(network)]
    exact = estimate(make_exact(specs), network, batch)
    width = step_widths(make(specs), network, batch, EPS[precision])
    found = []
    for step in steps:
        strategy = make([replace(spec, sigma=step * width[str(spec.name)]) for spec in specs])
        with PRECISIONS[precision]():
            estimates = estimate(strategy, network, batch)
        cosines = [cosine(estimates[name], exact[name]) for name in exact]
        found.append((min(cosines), max(cosines)))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = command("benchmarks.precision_rule", __doc__)
    choices: Mapping[str, Sequence[str]] = {
        "networks": list(SIZES), "methods": list(METHODS), "precisions": list(PRECISIONS),
    }  # fmt: skip
    for name, known in choices.items():
        parser.add_argument(f"--{name}", nargs="+", choices=known, default=known, help="default all")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", RuntimeWarning)  # of the sigmas that are too small: that is what is measured
    records: list[Record] = []
    for network in options.networks:
        for method in options.methods:
            say(f"estimating {network}, {method} ...")
            for precision in options.precisions:
                ranges = dict(zip(map(str, STEPS), cosine_ranges(network, method, precision), strict=True))
                records.append({"network": network, "method": method, "precision": precision, "cosines": ranges})
    columns = {"network, noise": "{network}, {method}", "precision": "{precision}"}
    columns |= {f"{step:g}": f"{{cosines[{step}][0]:.2f}} - {{cosines[{step}][1]:.2f}}" for step in STEPS}
    print(table(columns, records))
    finish(options, records)


if __name__ == "__main__":
    main()
