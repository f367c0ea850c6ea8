"""A model of the seconds of a training step on several ranks.

On ``n`` ranks a step takes::

    T(n) = T_passes(n) + T_draws(n) + T_exchange(n)

Passes are counted in forward-equivalents (one forward pass of one sample), draws in numbers, the exchange collective by
collective on one ring over all ranks (Patarasuk and Yuan, 2009), at the pace of its slowest link. Nothing overlaps.
Left out: ranks that wait for a slower one, the optimiser, the data, and copies within a device. What is counted
(``ranks_load.py``) is exact; the seconds are as good as the speeds that are put in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from benchmarks.ranks_load import Collective, StepLoad

Scaling = Literal["strong", "weak"]
"""One batch split over the ranks, or a batch of one size on each."""


@dataclass(frozen=True)
class Link:
    """A link between two ranks.

    Attributes:
        bandwidth: Bytes a second in one direction.
        latency: Seconds of one message beside what its bytes take.
    """

    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Machine:
    """Speeds of a machine of nodes.

    Attributes:
        passes: Forward passes of one sample a second on one rank.
        draws: Random numbers a second on one rank, each drawn and added to what it is for.
        node: Links within a node.
        network: Links between nodes.
        ranks_per_node: Ranks of a node.
    """

    passes: float
    draws: float
    node: Link
    network: Link
    ranks_per_node: int = 8

    def slowest(self, ranks: int) -> Link:
        """The link that sets the pace of a ring over so many ranks."""
        return self.node if ranks <= self.ranks_per_node else self.network


@dataclass(frozen=True)
class StepSeconds:
    """Seconds of a step by what they are spent on.

    Attributes:
        passes: Forward passes and local VJPs.
        draws: Random directions.
        exchange: Collectives.
    """

    passes: float
    draws: float
    exchange: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.passes + self.draws + self.exchange

    @property
    def exchange_share(self) -> float:
        """Share of the exchange in the step."""
        return self.exchange / self.total


def collective_seconds(collective: Collective, ranks: int, link: Link) -> float:
    """Bytes on the link over its bandwidth, and a latency for each message."""
    return collective.bytes_on_link(ranks) / link.bandwidth + collective.steps(ranks) * link.latency


def step_seconds(load: StepLoad, samples: int, ranks: int, machine: Machine) -> StepSeconds:
    """``T(n)`` of ranks with so many samples each."""
    link = machine.slowest(ranks)
    return StepSeconds(
        load.forward_equivalents(samples) / machine.passes,
        load.drawn_numbers(samples, ranks) / machine.draws,
        math.fsum(collective_seconds(each, ranks, link) for each in load.collectives(samples, ranks)),
    )


def efficiency(alone: float, together: float, ranks: int, scaling: Scaling) -> float:
    """``T(1) / (n T(n))`` of one batch split over ``n`` ranks, ``T(1) / T(n)`` of a batch of one size on each."""
    return alone / (together * (ranks if scaling == "strong" else 1))


def even_bandwidth(directions: int, ranks: int, draws: float, *, itemsize: int = 4) -> float:
    """Bytes a second below which exchanging losses is faster than exchanging gradients, up to latencies and headers.

    Gradients take ``2 (n - 1) / n * itemsize * d / bandwidth`` seconds, drawing the ``P`` directions of the ``n - 1``
    other ranks ``(n - 1) P d / draws``; they are equal at ``2 * itemsize * draws / (n P)``, whatever ``d``.

    Args:
        directions: ``P``, those of one rank at each site.
        ranks: ``n``.
        draws: Random numbers a second, drawn and added.
        itemsize: Bytes of a number in the gradients.
    """
    return 2 * itemsize * draws / (ranks * directions)
