"""What is run on several ranks: networks, strategies, and their steps as the model of the ranks counts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.cases import DIGITS, VIT_MICRO, VIT_TINY, Case
from benchmarks.measurement import row_cross_entropy
from benchmarks.ranks_load import SiteLoad, StepLoad
from flops_lightning.allocators.ranks import gather_observation, gather_statistics
from flops_lightning.distributed import reduce_gradients
from flops_lightning.network.staging import StagedNetwork, flops, stage_network
from flops_lightning.queries import EMBEDDING_FEATURES
from flops_lightning.strategies import SPSA, LikelihoodRatio
from flops_lightning.strategies.base import Exchange
from flops_lightning.strategies.costs import site_costs
from flops_lightning.strategies.site_specs import default_specs


@dataclass(frozen=True)
class Method:
    """A strategy at the paper's sites (three groups and the head) and what its ranks tell each other.

    Attributes:
        name: In tables and records.
        drawn: ``SPSA`` with shared directions instead of ``LikelihoodRatio``.
        exchange: Gradients, or losses (``SPSA`` only).
        allocated: Ranks also gather what an allocator needs: losses and embeddings before the queries, traces after.
    """

    name: str
    drawn: bool = False
    exchange: Exchange = "gradients"
    allocated: bool = False

    def strategy(self, network: StagedNetwork, *, queries: int, chunk_rows: int) -> LikelihoodRatio | SPSA:
        """Bound to the network, with so many queries of a sample at each site."""
        sites = [replace(spec, queries_per_sample=queries) for spec in default_specs(network)]
        made: LikelihoodRatio | SPSA
        if self.drawn:
            made = SPSA(sites=sites, sigma=1e-3, exchange=self.exchange, chunk_rows=chunk_rows, seed=0)
        else:
            made = LikelihoodRatio(sites=sites, chunk_rows=chunk_rows, seed=0)
        made.bind(network, row_cross_entropy)
        return made


METHODS = (
    Method("LikelihoodRatio, gradients"),
    Method("LikelihoodRatio, gradients, allocator", allocated=True),
    Method("SPSA shared, gradients", drawn=True),
    Method("SPSA shared, losses", drawn=True, exchange="losses"),
)


def perceptron() -> nn.Module:
    """Four layers on images of 8x8 pixels; small enough for a test of bytes."""
    layers = [nn.Linear(64, 32), nn.Linear(32, 32), nn.Linear(32, 32)]
    return nn.Sequential(nn.Flatten(), *(nn.Sequential(layer, nn.Tanh()) for layer in layers), nn.Linear(32, 10))


PERCEPTRON = Case("perceptron", perceptron, (1, 8, 8), 10, batch=64, queries=20, chunk_rows=128, rounds=5)
MODELS: Mapping[str, Case] = {
    "perceptron": PERCEPTRON,
    "digits": DIGITS,
    "vit-micro": VIT_MICRO,
    "vit-tiny": VIT_TINY,
}
"""What is measured, by the word of the command line."""


def batch_of(case: Case, samples: int, ranks: int, rank: int) -> tuple[Tensor, Tensor]:
    """A rank's part of a batch that is the same however many ranks split it; ``samples`` of it are the rank's."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples * ranks, *case.image, generator=generator)
    targets = torch.randint(case.classes, (samples * ranks,), generator=generator)
    own = slice(rank * samples, (rank + 1) * samples)
    return inputs[own], targets[own]


def load_of(method: Method, strategy: LikelihoodRatio | SPSA, inputs: Tensor) -> StepLoad:
    """A step as the model counts it.

    Args:
        method: The method.
        strategy: What it made.
        inputs: ``(b, ...)`` inputs, of which the first sample is run.
    """
    costs = site_costs(strategy.network, strategy.sites, inputs)
    sites = tuple(
        SiteLoad(
            sum(p.numel() for p in site.parameters.values()), len(site.parameters), site.queries_per_sample,
            costs.query[site.name], costs.gradient[site.name],
        )
        for site in strategy.sites
    )  # fmt: skip
    dtype = next(iter(strategy.sites[0].parameters.values())).dtype
    gathered: tuple[int, ...] = ()
    if method.allocated:
        with torch.no_grad():
            embedding = strategy.network.run(inputs[:1], 0, len(strategy.network) - 1)
        gathered = (1 + min(embedding.numel(), EMBEDDING_FEATURES), 2 * len(sites))
    return StepLoad(
        sites, method.drawn, exchange=method.exchange, gathered=gathered, chunk_rows=strategy.chunk_rows,
        itemsize=dtype.itemsize,
    )  # fmt: skip


def run_step(method: Method, strategy: LikelihoodRatio | SPSA, inputs: Tensor, targets: Tensor) -> None:
    """A step of this rank up to the gradients of all, without an optimiser."""
    strategy.network.module.zero_grad()
    ranks = strategy.communicator
    clean = strategy.clean_pass(inputs, targets)
    if method.allocated:
        gather_statistics(ranks, strategy.sample_statistics(clean))
    estimate = strategy.estimate(clean, traces=method.allocated)
    if estimate.observation is not None:
        gather_observation(ranks, estimate.observation)
    if method.exchange == "gradients":
        reduce_gradients(ranks, taught(strategy), weight=len(inputs))


def taught(strategy: LikelihoodRatio | SPSA) -> Sequence[nn.Parameter]:
    """Parameters of all sites, in the same order on every rank."""
    return [p for site in strategy.sites for p in site.parameters.values()]


def vit_loads(name: str, methods: Sequence[Method], *, queries: int) -> tuple[dict[str, StepLoad], float]:
    """Steps of methods on a ViT at 224 pixels and FLOPs of its forward pass of a sample; no weight is made.

    Args:
        name: As ``timm`` knows it.
        methods: The methods.
        queries: Of a sample at each site.
    """
    import timm

    with torch.device("meta"):
        network = stage_network(timm.create_model(name))
        image = torch.empty(1, 3, 224, 224)
    chunk_rows = 256
    loads = {
        method.name: load_of(method, method.strategy(network, queries=queries, chunk_rows=chunk_rows), image)
        for method in methods
    }
    with torch.no_grad():
        return loads, flops(network.run, image)[0]
