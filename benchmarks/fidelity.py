"""``python -m benchmarks.fidelity``: how good an estimate is, and what it costs.

Every strategy and kind of site estimates the gradient of one batch several times, with 20 queries a sample at each site
(whole-batch methods: their own numbers), and is compared with backprop. Reported are the mean cosine over all
parameters with its standard error over the draws, the forward-equivalents of a sample, and ``cos^2 / (1 - cos^2)`` per
forward-equivalent: for an unbiased estimate the squared norm of the gradient over the variance, which grows in
proportion to the queries, so that estimates of different cost compare.
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.precision import NETWORKS, gradient
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.strategies import (
    SPSA,
    Backprop,
    CoordinateFiniteDifferences,
    EvolutionStrategies,
    ForwardGradientStrategy,
    ForwardMode,
    LikelihoodRatio,
    MeZO,
    SiteSpec,
    WeightForwardMode,
)
from flops_lightning.strategies.site_specs import default_specs

Make = Callable[..., ForwardGradientStrategy]


@dataclass(frozen=True)
class Fidelity:
    """What estimates of one kind are worth.

    Attributes:
        cosines: With the gradient, one a draw.
        forward_equivalents: Of a sample, queries, local derivatives and the clean pass together.
    """

    cosines: Sequence[float]
    forward_equivalents: float

    @property
    def cosine(self) -> float:
        """Mean over the draws."""
        return statistics.fmean(self.cosines)

    @property
    def error(self) -> float:
        """Standard error of the mean; NaN with one draw."""
        return statistics.stdev(self.cosines) / math.sqrt(len(self.cosines)) if len(self.cosines) > 1 else math.nan

    @property
    def per_cost(self) -> float:
        """``cos^2 / (1 - cos^2)`` per forward-equivalent."""
        square = self.cosine**2
        return math.inf if square >= 1 else square / (1 - square) / self.forward_equivalents


def strategies(network: StagedNetwork, queries: int, rows: int) -> Mapping[str, Make]:
    """By name; each takes a seed."""
    ends = [network.stages[0].name, network.stages[-1].name]
    groups = [replace(spec, queries_per_sample=queries) for spec in default_specs(network)]
    blocks = [SiteSpec(stages=ends, kind="block", queries_per_sample=queries)]
    above = [network.stages[1].name, ends[1]]  # class token and positions have no closed form
    linear = [
        SiteSpec(stages=ends[:1], kind="block", queries_per_sample=queries),
        SiteSpec(stages=above, kind="linear", queries_per_sample=queries),
    ]
    inside: dict[str, Any] = {"chunk_rows": rows}
    narrow: dict[str, Any] = {"chunk_rows": rows, "sigma": 1e-3}
    lr = partial(LikelihoodRatio, **inside)
    return {
        "LikelihoodRatio, groups": partial(lr, sites=groups),
        "LikelihoodRatio, groups, leave-one-out": partial(lr, sites=groups, variant="leave_one_out"),
        "LikelihoodRatio, groups, antithetic": partial(lr, sites=groups, variant="antithetic"),
        "LikelihoodRatio, groups, orthogonal noise": partial(lr, sites=groups, noise={"orthogonal": True}),
        "LikelihoodRatio, groups, factored noise": partial(lr, sites=groups, noise={"layout": "factored"}),
        "LikelihoodRatio, blocks": partial(lr, sites=blocks),
        "LikelihoodRatio, linear": partial(lr, sites=linear),
        "ForwardMode, groups": partial(ForwardMode, sites=groups, **inside),
        "EvolutionStrategies, shared": partial(EvolutionStrategies, sites=groups, **narrow),
        "SPSA, shared": partial(SPSA, sites=groups, **narrow),
        "SPSA, factored": partial(SPSA, sites=groups, layout="factored", **narrow),
        "SPSA, factored, activation-guided": partial(
            SPSA, sites=groups, layout="factored", activation_guided=True, **narrow
        ),
        "WeightForwardMode, factored": partial(WeightForwardMode, sites=groups, layout="factored", **inside),
        "MeZO, 2 queries": partial(MeZO, chunk_rows=rows, queries=2),
        "MeZO, 80 queries": partial(MeZO, chunk_rows=rows, queries=4 * queries),
        "CoordinateFiniteDifferences, 80 coordinates": partial(
            CoordinateFiniteDifferences, chunk_rows=rows, coordinates=4 * queries, ratios="uniform"
        ),
    }


def measure(make: Make, network: StagedNetwork, batch: tuple[Tensor, Tensor], truth: Tensor, *, draws: int) -> Fidelity:
    """Compare estimates of one kind with the gradient."""
    cosines, spent = [], 0.0
    for seed in range(draws):
        strategy = make(seed=seed)
        estimate = gradient(strategy, network, batch)
        cosines.append(float(F.cosine_similarity(estimate, truth, dim=0)))
        spent += strategy.meter.total().forward_equivalents
    return Fidelity(cosines, spent / draws / len(batch[0]))


def main(args: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=summary)
    parser.add_argument("--network", choices=NETWORKS, default="digits", help="default digits")
    parser.add_argument("--names", nargs="+", help="default all")
    parser.add_argument("--draws", type=int, default=8, help="estimates of each kind (default 8)")
    parser.add_argument("--batch", type=int, default=32, help="samples (default 32)")
    parser.add_argument("--queries", type=int, default=20, help="of a sample at each site (default 20)")
    parser.add_argument("--rows", type=int, default=128, help="rows of a forward pass (default 128)")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    network, batch = NETWORKS[options.network](options.batch, 0)
    known = strategies(network, options.queries, options.rows)
    unknown = sorted({*(options.names or ())} - {*known})
    if unknown:
        parser.error(f"{unknown[0]!r} is not known; choose from {', '.join(map(repr, known))}.")
    truth = gradient(Backprop(), network, batch)
    print("| estimate | cosine | forward-equivalents | cos^2 / (1 - cos^2) per 1000 of them |\n|---|---|---|---|")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that forward mode does not need
        for name in options.names or known:
            found = measure(known[name], network, batch, truth, draws=options.draws)
            cost = f"{found.forward_equivalents:.1f}"
            print(
                f"| {name} | {found.cosine:.3f} ± {found.error:.3f} | {cost} | {1000 * found.per_cost:.3g} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
