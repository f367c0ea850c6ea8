"""What a step on several ranks consists of: forward passes, random numbers and bytes of each rank, counted exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flops_lightning.distributed import BUCKET
from flops_lightning.strategies.base import Exchange


@dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
        kind: ``sum`` (all-reduce) or ``gather`` (all-gather).
        size: Bytes that each rank hands over.
    """

    kind: Literal["sum", "gather"]
    size: int

    def steps(self, ranks: int) -> int:
        """Messages one after the other on a ring: ``2 (n - 1)`` of a sum, ``n - 1`` of a gather."""
        return (2 if self.kind == "sum" else 1) * (ranks - 1)

    def bytes_on_link(self, ranks: int) -> float:
        """Bytes over every link of a ring: ``2 (n - 1) / n * size`` of a sum, ``(n - 1) * size`` of a gather."""
        return self.steps(ranks) * (self.size / ranks if self.kind == "sum" else self.size)


@dataclass(frozen=True)
class SiteLoad:
    """What a site adds to a step.

    Attributes:
        numbers: Numbers in its parameters.
        tensors: Its parameters.
        queries: Queries of a sample.
        query: Forward-equivalents of one query.
        gradient: Forward-equivalents of its local VJP, once a sample.
    """

    numbers: int
    tensors: int
    queries: int
    query: float
    gradient: float


@dataclass(frozen=True)
class StepLoad:
    """What a step of a strategy on a network consists of, whatever the ranks.

    Attributes:
        sites: Its sites.
        drawn: Directions are dense in the parameters and in antithetic pairs, shared by the samples of a rank, drawn
            for the queries and once more for the gradient. False: noise in activations, part of a pass.
        exchange: What ranks tell each other.
        gathered: Numbers of a sample that an allocator gathers from all ranks, in each of its gathers.
        chunk_rows: Samples of a forward pass at most.
        itemsize: Bytes of a number in the parameters and activations.
    """

    sites: tuple[SiteLoad, ...]
    drawn: bool
    exchange: Exchange = "gradients"
    gathered: tuple[int, ...] = ()
    chunk_rows: int = 256
    itemsize: int = 4

    @property
    def numbers(self) -> int:
        """Numbers in all parameters."""
        return sum(site.numbers for site in self.sites)

    def forward_equivalents(self, samples: int) -> float:
        """Of a rank with so many samples: ``b (1 + sum_s A_s query_s + gradient_s)``, the 1 for the clean pass."""
        return samples * (1 + sum(site.queries * site.query + site.gradient for site in self.sites))

    def drawn_numbers(self, samples: int, ranks: int) -> int:
        """Random numbers that a rank draws: ``sum_s A_s / 2 * d_s * (ceil(b / chunk_rows) + k)``.

        Each of the ``A_s / 2`` directions is drawn for every chunk of samples, both signs at once, and ``k`` times for
        the gradient: once where gradients are exchanged, ``n`` times where losses are, since a rank draws the
        directions of all ranks. Splitting a batch over more ranks does not make that less.
        """
        if not self.drawn:
            return 0
        chunks, again = -(-samples // self.chunk_rows), ranks if self.exchange == "losses" else 1
        return sum(site.queries // 2 * site.numbers for site in self.sites) * (chunks + again)

    def collectives(self, samples: int, ranks: int) -> tuple[Collective, ...]:
        """What a rank with so many samples calls in a step; nothing where it is alone.

        An allocator: 8 bytes (how many samples) and ``itemsize * b`` for each number of a sample, in each gather.
        Gradients: a header of ``8 (1 + tensors)`` bytes (weight of the rank, which parameters have a gradient), then
        ``itemsize * d`` bytes in buckets, counted as if all but the last were full. Losses: at each site 8 bytes (how
        many directions) and ``24 A_s / 2`` (index, scalar and samples of each direction, in float64), then 4 bytes a
        site (whether any rank has queries).
        """
        if ranks == 1:
            return ()
        lines = [self.itemsize * samples * numbers for numbers in self.gathered]
        if self.exchange == "losses":
            lines += [24 * (site.queries // 2) for site in self.sites]
        gathers = [Collective("gather", size) for line in lines for size in (8, line)]
        if self.exchange == "losses":
            return (*gathers, Collective("sum", 4 * len(self.sites)))
        buckets = [min(BUCKET, self.numbers - start) for start in range(0, self.numbers, BUCKET)]
        header = Collective("sum", 8 * (1 + sum(site.tensors for site in self.sites)))
        return (*gathers, header, *(Collective("sum", self.itemsize * size) for size in buckets))

    def bytes_sent(self, samples: int, ranks: int) -> int:
        """Bytes that a rank hands to collectives in a step (:attr:`Communicator.sent`)."""
        return sum(each.size for each in self.collectives(samples, ranks))
