"""``python -m benchmarks.precision``: what a sigma is worth in each precision.

Every estimate is made in every precision with the same noise. Two cosines over all parameters are reported, the
mean and the standard error over the seeds (each a batch and noise of its own):

* with the gradient of the batch by backprop in float32: what the optimiser gets;
* in brackets with the estimate from exact derivatives along the same directions (forward mode in float32): 1 but for
  rounding, which takes its share at small sigma, and for curvature, which takes its own at large sigma.
"""

from __future__ import annotations

import argparse
import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import tiny_digits_vit, vit_tiny
from benchmarks.measurement import row_cross_entropy
from benchmarks.simulated_tf32 import SimulatedTF32
from flops_lightning.network.staging import StagedNetwork, stage_network
from flops_lightning.strategies import (
    SPSA,
    Backprop,
    ForwardGradientStrategy,
    ForwardMode,
    LikelihoodRatio,
    MeZO,
    SiteSpec,
    WeightForwardMode,
)
from flops_lightning.strategies.site_specs import default_specs

DIGITS_WEIGHTS = "data/assets/vit_tiny_digits_upright.safetensors"
SIGMAS = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)

PRECISIONS: Mapping[str, Callable[[], AbstractContextManager[object]]] = {
    "float32": nullcontext,
    "TF32 (simulated)": SimulatedTF32,
    "float16": partial(torch.autocast, "cpu", dtype=torch.float16),
    "bfloat16": partial(torch.autocast, "cpu", dtype=torch.bfloat16),
}
"""By name: what an estimate runs in."""


@dataclass(frozen=True)
class Setting:
    """One size of the measurement.

    Attributes:
        queries: Queries of a sample at each site.
        rows: Upper bound of rows in one forward pass.
        seed: Seed of the noise.
    """

    queries: int
    rows: int
    seed: int

    def pair(
        self, method: str, network: StagedNetwork, sigma: float
    ) -> tuple[ForwardGradientStrategy, ForwardGradientStrategy]:
        """A method, and the same directions with exact derivatives."""
        common: dict[str, Any] = {"chunk_rows": self.rows, "seed": self.seed}
        ends = [network.stages[0].name, network.stages[-1].name]
        directions = max(2, self.queries // 2)  # of antithetic pairs
        if method == "MeZO":
            whole = SiteSpec(stages=ends, queries_per_sample=directions, name="all")  # MeZO's own name: part of the key
            return MeZO(sigma=sigma, queries=2 * directions, **common), WeightForwardMode(sites=[whole], **common)
        if method == "SPSA, factored":
            exact = [replace(spec, queries_per_sample=directions) for spec in default_specs(network)]
            pairs = [replace(spec, sigma=sigma, queries_per_sample=2 * directions) for spec in exact]
            common["layout"] = "factored"
            return SPSA(sites=pairs, **common), WeightForwardMode(sites=exact, **common)
        spec = SiteSpec(stages=ends, kind="block", queries_per_sample=self.queries)
        return LikelihoodRatio(sites=[replace(spec, sigma=sigma)], **common), ForwardMode(sites=[spec], **common)


METHODS = ("LikelihoodRatio, blocks", "SPSA, factored", "MeZO")


def gradient(strategy: ForwardGradientStrategy, network: StagedNetwork, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The estimate over all trainable parameters as one float64 vector; zeros where all queries were lost."""
    return torch.cat(list(gradients(strategy, network, batch).values()))


def gradients(
    strategy: ForwardGradientStrategy, network: StagedNetwork, batch: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """The same, one float64 vector a parameter, by its name."""
    strategy.bind(network, row_cross_entropy)
    network.module.zero_grad()
    strategy.estimate(strategy.clean_pass(*batch))
    filled = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in network.trainable().items()}
    return {name: value.detach().double().flatten() for name, value in filled.items()}


def cosines(
    method: str,
    network: StagedNetwork,
    batch: tuple[Tensor, Tensor],
    setting: Setting,
    *,
    sigmas: Sequence[float],
    precisions: Sequence[str],
) -> dict[tuple[str, float], tuple[float, float]]:
    """Cosines with the gradient, and with exact derivatives along the same directions, by precision and sigma."""
    truth = gradient(Backprop(), network, batch)
    along = gradient(setting.pair(method, network, sigmas[0])[1], network, batch)
    found = {}
    for precision in precisions:
        for sigma in sigmas:
            strategy = setting.pair(method, network, sigma)[0]
            with PRECISIONS[precision]():
                estimate = gradient(strategy, network, batch)
            of = (float(F.cosine_similarity(estimate, each, dim=0)) for each in (truth, along))
            found[precision, sigma] = (next(of), next(of))
    return found


def digits(batch: int, seed: int) -> tuple[StagedNetwork, tuple[Tensor, Tensor]]:
    """The quickstart's network and start weights, and a batch of its turned digits."""
    from safetensors.torch import load_file

    from flops_lightning.datamodules import DigitsDataModule

    network = tiny_digits_vit().eval()
    network.load_state_dict(load_file(DIGITS_WEIGHTS))
    data = DigitsDataModule(batch_size=batch, rotation=40.0)
    data.setup("fit")
    torch.manual_seed(seed)
    images, labels = next(iter(data.train_dataloader()))
    return stage_network(network), (images, labels)


def random_vit_tiny(batch: int, seed: int) -> tuple[StagedNetwork, tuple[Tensor, Tensor]]:
    """ViT-Tiny/16 with random weights, and noise for images."""
    torch.manual_seed(seed)
    network = stage_network(vit_tiny().eval())
    return network, (torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,)))


NETWORKS = {"digits": digits, "vit_tiny": random_vit_tiny}


def table(found: Sequence[Mapping[tuple[str, float], tuple[float, float]]]) -> str:
    """Markdown: one row a sigma, one column a precision."""
    precisions, sigmas = (list(dict.fromkeys(key[i] for key in found[0])) for i in (0, 1))
    lines = ["| sigma | " + " | ".join(map(str, precisions)) + " |", "|" + "---|" * (1 + len(precisions))]
    for sigma in sigmas:
        cells = [_cell([each[precision, sigma] for each in found]) for precision in precisions]  # type: ignore[index]
        lines.append(f"| {sigma:g} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(pairs: Sequence[tuple[float, float]]) -> str:
    true, along = zip(*pairs, strict=True)
    error = statistics.stdev(true) / math.sqrt(len(true)) if len(true) > 1 else math.nan
    return f"{statistics.fmean(true):.3f} ± {error:.3f} ({statistics.fmean(along):.2f})"


def main(args: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision",
        description="Cosine of estimates with the gradient against sigma, in each precision.",
    )
    parser.add_argument("--network", choices=NETWORKS, default="digits", help="default digits")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="default all")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS), help="default all")
    parser.add_argument("--sigmas", nargs="+", type=float, default=SIGMAS, help=f"default {SIGMAS}")
    parser.add_argument("--seeds", type=int, default=4, help="seeds 0 to N-1 (default 4)")
    parser.add_argument("--batch", type=int, default=16, help="samples (default 16)")
    parser.add_argument("--queries", type=int, default=20, help="queries of a sample at each site (default 20)")
    parser.add_argument("--rows", type=int, default=128, help="rows of a forward pass (default 128)")
    options = parser.parse_args(args)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the sigmas that are too small: that is what is measured
        for method in options.methods:
            found = []
            for seed in range(options.seeds):
                network, batch = NETWORKS[options.network](options.batch, seed)
                setting = Setting(options.queries, options.rows, seed)
                sigmas, precisions = options.sigmas, options.precisions
                found.append(cosines(method, network, batch, setting, sigmas=sigmas, precisions=precisions))
            print(f"{method}:\n\n{table(found)}", flush=True)


if __name__ == "__main__":
    main()
