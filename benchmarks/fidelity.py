"""``python -m benchmarks.fidelity``: how good an estimate is, and what it costs.

Every strategy and kind of site estimates the gradient of one batch several times, with 20 queries per sample and site
(whole-batch methods: their own numbers). Reported are the mean cosine with backprop's gradient over all parameters and
its standard error over the draws, the forward-equivalents per sample, and ``cos^2 / (1 - cos^2)`` per
forward-equivalent: for an unbiased estimate the squared norm of the gradient over the variance, which grows in
proportion to the queries, so that estimates of different cost compare.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import flops_lightning as fl
from benchmarks.cases import site_specs
from benchmarks.harness import Record, command, finish, mean_and_error, say, table
from benchmarks.precision import NETWORKS, cosine, gradient
from flops_lightning.network.staging import StagedNetwork

Make = Callable[..., fl.ForwardGradientStrategy]


def strategies(network: StagedNetwork, queries: int, rows: int) -> Mapping[str, Make]:
    """By name; each takes a seed."""
    first, second, *_, last = (stage.name for stage in network.stages)
    linear = [
        fl.SiteSpec(stages=[first], kind="block", queries_per_sample=queries),  # class token: no closed form
        fl.SiteSpec(stages=[second, last], kind="linear", queries_per_sample=queries),
    ]
    inside: dict[str, Any] = {"chunk_rows": rows, "sites": site_specs(network, queries)}
    narrow: dict[str, Any] = {**inside, "sigma": 1e-3}
    lr = partial(fl.LikelihoodRatio, **inside)
    return {
        "LikelihoodRatio, groups": lr,
        "LikelihoodRatio, groups, leave-one-out": partial(lr, variant="leave_one_out"),
        "LikelihoodRatio, groups, antithetic": partial(lr, variant="antithetic"),
        "LikelihoodRatio, groups, orthogonal noise": partial(lr, noise={"orthogonal": True}),
        "LikelihoodRatio, groups, factored noise": partial(lr, noise={"layout": "factored"}),
        "LikelihoodRatio, blocks": partial(lr, sites=site_specs(network, queries, "block")),
        "LikelihoodRatio, linear": partial(lr, sites=linear),
        "ForwardMode, groups": partial(fl.ForwardMode, **inside),
        "EvolutionStrategies, shared": partial(fl.EvolutionStrategies, **narrow),
        "SPSA, shared": partial(fl.SPSA, **narrow),
        "SPSA, factored": partial(fl.SPSA, layout="factored", **narrow),
        "SPSA, factored, activation-guided": partial(fl.SPSA, layout="factored", activation_guided=True, **narrow),
        "WeightForwardMode, factored": partial(fl.WeightForwardMode, layout="factored", **inside),
        "MeZO, 2 queries": partial(fl.MeZO, chunk_rows=rows, queries=2),
        "MeZO, 80 queries": partial(fl.MeZO, chunk_rows=rows, queries=4 * queries),
        "CoordinateFiniteDifferences, 80 coordinates": partial(
            fl.CoordinateFiniteDifferences, chunk_rows=rows, coordinates=4 * queries, ratios="uniform"
        ),
    }


def measure(make: Make, network: StagedNetwork, batch: tuple[Tensor, Tensor], truth: Tensor, *, draws: int) -> Record:
    """Cosines of estimates of one kind with the gradient, and forward-equivalents of a sample, clean pass included."""
    cosines, spent = [], 0.0
    for seed in range(draws):
        strategy = make(seed=seed)
        cosines.append(cosine(gradient(strategy, network, batch), truth))
        spent += strategy.meter.total().forward_equivalents
    return {"cosines": cosines, "forward_equivalents": spent / draws / len(batch[0])}


def per_cost(cosines: Sequence[float], forward_equivalents: float) -> float:
    """``cos^2 / (1 - cos^2)`` of the mean cosine, per forward-equivalent."""
    square = statistics.fmean(cosines) ** 2
    return math.inf if square >= 1 else square / (1 - square) / forward_equivalents


def main(argv: Sequence[str] | None = None) -> None:
    parser = command("benchmarks.fidelity", __doc__, draws=8, batch=32, queries=20, rows=128)
    parser.add_argument("--network", choices=NETWORKS, default="digits", help="default digits")
    parser.add_argument("--names", nargs="+", help="default all")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    network, batch = NETWORKS[options.network](options.batch, 0)
    known = strategies(network, options.queries, options.rows)
    unknown = sorted({*(options.names or ())} - {*known})
    if unknown:
        parser.error(f"{unknown[0]!r} is not known; choose from {', '.join(map(repr, known))}.")
    truth, records = gradient(fl.Backprop(), network, batch), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that forward mode does not need
        for name in options.names or known:
            say(f"estimating with {name} ...")
            found = measure(known[name], network, batch, truth, draws=options.draws)
            records.append({"estimate": name, **found, "per_1000": 1000 * per_cost(**found)})
    shown = [record | {"cosine": mean_and_error(record["cosines"])} for record in records]
    columns = {"estimate": "{estimate}", "cosine": "{cosine}", "forward-equivalents": "{forward_equivalents:.1f}"}
    print(table(columns | {"cos^2 / (1 - cos^2) per 1000 of them": "{per_1000:.3g}"}, shown))
    finish(options, records)


if __name__ == "__main__":
    main()
