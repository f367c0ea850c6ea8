"""A model of the seconds of a training step on several ranks.

On ``n`` ranks a step takes ``T(n) = T_passes(n) + T_draws(n) + T_exchange(n)``: passes counted in forward-equivalents
(one forward pass of one sample), draws in numbers, the exchange collective by collective on one ring over all ranks
(Patarasuk and Yuan, 2009), at the pace of its slowest link. Nothing overlaps. Left out: ranks that wait for a slower
one, the optimiser, the data, and copies within a device. The counts are exact; the seconds are as good as the speeds
that are put in.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.cases import site_specs, vit
from benchmarks.harness import Record, table
from benchmarks.speed import forward_equivalents
from flops_lightning.distributed import BUCKET
from flops_lightning.network.operations import flops
from flops_lightning.network.staging import StagedNetwork, stage_network
from flops_lightning.objectives import cross_entropy
from flops_lightning.queries import EMBEDDING_FEATURES
from flops_lightning.strategies import SPSA, LikelihoodRatio
from flops_lightning.strategies.base import Exchange

VITS = {"ViT-Base/16": "vit_base_patch16_224", "ViT-Large/16": "vit_large_patch16_224"}
SCALINGS = {
    "strong": "strong scaling: one batch split over the ranks; efficiency T(1) / (n T(n))",
    "weak": "weak scaling: a batch of one size on every rank; efficiency T(1) / T(n)",
}


@dataclass(frozen=True)
class StepLoad:
    """What a step of a strategy on a network consists of, whatever the ranks; numbers are float32."""

    numbers: int  # d, in all parameters
    tensors: int  # parameters
    sites: int
    queries: int  # A, of a sample at each site
    sample: float  # forward-equivalents of a sample
    # Directions dense in the parameters, in antithetic pairs, shared by the samples of a rank; or noise in activations.
    drawn: bool
    exchange: Exchange = "gradients"
    gathered: tuple[int, ...] = ()  # numbers of a sample that an allocator gathers, in each of its gathers
    chunk_rows: int = 256  # samples of a forward pass at most

    def drawn_numbers(self, samples: int, ranks: int) -> int:
        """Random numbers that a rank draws: ``A / 2 * d * (ceil(b / chunk_rows) + k)``.

        Each of the ``A / 2`` directions of a site is drawn for every chunk of samples, both signs at once, and ``k``
        times for the gradient: once where gradients are exchanged, ``n`` times (those of all ranks) where losses are.
        """
        chunks, again = -(-samples // self.chunk_rows), ranks if self.exchange == "losses" else 1
        return self.drawn * (self.queries // 2) * self.numbers * (chunks + again)

    def collectives(self, samples: int, ranks: int) -> Iterator[tuple[Literal["sum", "gather"], int]]:
        """All-reduces (``sum``) and all-gathers of a step with the bytes that a rank hands to each, if not alone."""
        if ranks == 1:
            return
        if self.gathered:
            yield "gather", 8  # the width of this rank's embeddings, of which texts have different ones
        for numbers in self.gathered:  # of an allocator, after how many samples there are
            yield from (("gather", 8), ("gather", 4 * samples * numbers))
        if self.exchange == "losses":  # how many directions; of each its index, scalar and samples; is there any query?
            yield from (("gather", 8), ("gather", 24 * (self.queries // 2))) * self.sites
            yield "sum", 4 * self.sites
        else:  # a header (weight of the rank, which parameters have a gradient), then buckets as if all were full
            yield "sum", 8 * (1 + self.tensors)
            yield from (("sum", 4 * min(BUCKET, self.numbers - start)) for start in range(0, self.numbers, BUCKET))

    def bytes_sent(self, samples: int, ranks: int) -> int:
        """Bytes that a rank hands to collectives in a step (:attr:`Communicator.sent`)."""
        return sum(size for _, size in self.collectives(samples, ranks))


@dataclass(frozen=True)
class Method:
    """A strategy at the paper's sites (three groups and the head) and what its ranks tell each other."""

    name: str
    drawn: bool = False  # SPSA with shared directions instead of LikelihoodRatio
    exchange: Exchange = "gradients"
    allocated: bool = False  # also what an allocator needs: losses and embeddings before the queries, traces after

    def strategy(self, network: StagedNetwork, *, queries: int, chunk_rows: int) -> LikelihoodRatio | SPSA:
        """Bound to the network, with so many queries of a sample at each site."""
        common: dict[str, Any] = {"sites": site_specs(network, queries), "chunk_rows": chunk_rows, "seed": 0}
        made = SPSA(sigma=1e-3, exchange=self.exchange, **common) if self.drawn else LikelihoodRatio(**common)
        made.bind(network, cross_entropy)
        return made

    def load(self, strategy: LikelihoodRatio | SPSA, inputs: Tensor) -> StepLoad:
        """What the model counts, on the first sample of ``inputs``."""
        parameters, sites = parameters_of(strategy), strategy.sites
        gathered: tuple[int, ...] = ()
        if self.allocated:
            with torch.no_grad():
                embedding = strategy.network.run(inputs[:1], 0, len(strategy.network) - 1)
            gathered = (1 + min(embedding.numel(), EMBEDDING_FEATURES), 2 * len(sites))
        return StepLoad(
            sum(p.numel() for p in parameters), len(parameters), len(sites), int(sites[0].queries_per_sample),
            forward_equivalents(strategy, inputs), self.drawn, self.exchange, gathered, strategy.chunk_rows,
        )  # fmt: skip


METHODS = (
    Method("LikelihoodRatio, gradients"),
    Method("LikelihoodRatio, gradients, allocator", allocated=True),
    Method("SPSA shared, gradients", drawn=True),
    Method("SPSA shared, losses", drawn=True, exchange="losses"),
)


def parameters_of(strategy: LikelihoodRatio | SPSA) -> list[nn.Parameter]:
    """Of all sites, in the same order on every rank."""
    return [p for site in strategy.sites for p in site.parameters.values()]


class Machine(NamedTuple):
    """What a rank does in a second, and links within a node, then between nodes."""

    passes: float
    draws: float  # random numbers, drawn and added
    bandwidth: Sequence[float]  # bytes a second in one direction
    latency: Sequence[float]  # seconds a message
    ranks_per_node: int = 8


class StepSeconds(NamedTuple):
    passes: float
    draws: float
    exchange: float


def ring_seconds(kind: str, size: int, ranks: int, bandwidth: float, latency: float) -> float:
    """``2 (n - 1)`` messages of ``size / n`` bytes for a sum, ``n - 1`` of ``size`` for a gather."""
    messages, share = (2 * (ranks - 1), size / ranks) if kind == "sum" else (ranks - 1, size)
    return messages * (share / bandwidth + latency)


def step_seconds(load: StepLoad, samples: int, ranks: int, machine: Machine) -> StepSeconds:
    """``T(n)`` of ranks with so many samples each."""
    slowest = int(ranks > machine.ranks_per_node)
    link = machine.bandwidth[slowest], machine.latency[slowest]
    return StepSeconds(
        samples * load.sample / machine.passes,
        load.drawn_numbers(samples, ranks) / machine.draws,
        sum(ring_seconds(kind, size, ranks, *link) for kind, size in load.collectives(samples, ranks)),
    )


def efficiency(alone: float, together: float, ranks: int, scaling: str) -> float:
    """``T(1) / (n T(n))`` of one batch split over ``n`` ranks, ``T(1) / T(n)`` of a batch of one size on each."""
    return alone / (together * (ranks if scaling == "strong" else 1))


def even_bandwidth(directions: int, ranks: int, draws: float) -> float:
    """Bytes a second below which exchanging losses is faster than exchanging gradients, up to latencies and headers.

    ``2 (n - 1) / n * 4 d / bandwidth`` seconds of gradients equal ``(n - 1) P d / draws`` of drawing the ``P``
    directions per site of the other ranks at ``8 * draws / (n P)``, whatever ``d``.
    """
    return 8 * draws / (ranks * directions)


def vit_loads(name: str, *, queries: int) -> tuple[dict[str, StepLoad], float]:
    """Steps of methods on a ViT of timm, and FLOPs of its forward pass of a sample."""
    with torch.device("meta"), torch.no_grad():
        network, image = stage_network(vit(name)), torch.empty(1, 3, 224, 224)
        methods = {m: m.strategy(network, queries=queries, chunk_rows=256) for m in METHODS if not m.allocated}
        return {m.name: m.load(made, image) for m, made in methods.items()}, flops(network.run, image)[0]


def modelled(options: argparse.Namespace) -> list[Record]:
    """Steps of ViT-Base and ViT-Large by method and number of ranks, as the options assume; no weight is made.

    A batch is split over the ranks; under weak scaling each rank has its share at the most ranks.
    """
    ranks, batch = options.modelled_ranks, options.modelled_batch
    bandwidth, latency = [b * 1e9 for b in options.bandwidth], [s * 1e-6 for s in options.latency]
    records: list[Record] = []
    for title, name in VITS.items():
        loads, forward_flops = vit_loads(name, queries=options.queries)
        passes = options.flops_per_second / forward_flops
        machine = Machine(passes, options.draws_per_second, bandwidth, latency, options.ranks_per_node)
        for (method, load), scaling, n in product(loads.items(), SCALINGS, ranks):
            samples = batch // (n if scaling == "strong" else max(ranks))
            alone = step_seconds(load, batch if scaling == "strong" else samples, 1, machine)
            step = step_seconds(load, samples, n, machine)
            records.append({
                "kind": "modelled", "model": title, "method": method, "scaling": scaling, "ranks": n,
                "samples": samples, "queries": load.sites * load.queries, "parameters": load.numbers,
                "passes_seconds": step.passes, "draws_seconds": step.draws, "exchange_seconds": step.exchange,
                "compute_seconds": step.passes + step.draws, "exchange_share": step.exchange / sum(step),
                "bytes": load.bytes_sent(samples, n), "efficiency": efficiency(sum(alone), sum(step), n, scaling),
                "forward_flops": forward_flops, "assumed": machine._asdict(),
            })  # fmt: skip
    return records


COLUMNS = {
    "model": "{model}", "method": "{method}", "ranks": "{ranks}", "samples per rank": "{samples}",
    "queries": "{queries}", "compute s": "{compute_seconds:.4g}", "of it draws s": "{draws_seconds:.3g}",
    "exchange s": "{exchange_seconds:.3g}", "exchange share": "{exchange_share:.2%}", "efficiency": "{efficiency:.3f}",
}  # fmt: skip


def by_scaling(columns: Mapping[str, str], records: Sequence[Record]) -> str:
    """A table for each scaling."""
    kept = {scaling: [record for record in records if record["scaling"] == scaling] for scaling in SCALINGS}
    return "\n".join(f"\n{title}\n\n{table(columns, kept[scaling])}" for scaling, title in SCALINGS.items())


def report(records: Sequence[Record], options: argparse.Namespace) -> str:
    """Modelled steps by scaling, all that is assumed, and where the two exchanges are even."""
    (node, network), (node_latency, network_latency) = options.bandwidth, options.latency
    pairs, several = options.queries // 2, sorted({record["ranks"] for record in records} - {1})
    limits = (f"{even_bandwidth(pairs, n, options.draws_per_second) / 1e9:.3g} GB/s on {n} ranks" for n in several)
    return f"""MODEL, not measured: T(n) = passes + draws + exchange, ring collectives, nothing overlaps, no rank waits.
Assumed of a rank: {options.flops_per_second:.3g} FLOPs/s of forward passes, {options.draws_per_second:.3g} random \
numbers/s drawn and added; 4 bytes per number.
Assumed of links: {node:g} GB/s and {node_latency:g} us per message within a node of {options.ranks_per_node} ranks, \
{network:g} GB/s and {network_latency:g} us between nodes.
{by_scaling(COLUMNS, records)}

queries: at all sites together. Left out: noise of LikelihoodRatio, optimiser, data.
Exchanging losses is faster than exchanging gradients below {", ".join(limits)}, whatever the model."""
