"""Allocation across ranks: all ranks gather the same statistics and observations, and make the same allocation.

Allocators therefore need not exchange their state. Each rank's total is fixed to its samples' share of the budget:
ranks wait for each other at every step, so the one with the most queries sets the pace.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from flops_lightning.allocators.rounding import largest_remainder
from flops_lightning.distributed import Communicator, gather_lines
from flops_lightning.protocol import PER_SITE, Allocation, SampleStatistics, TraceObservation


@dataclass(frozen=True)
class GatheredStatistics:
    """Statistics of the ``B`` samples of all ranks, in the order of the ranks, and each rank's number of samples."""

    statistics: SampleStatistics
    sizes: tuple[int, ...]
    rank: int

    def own(self, table: Tensor) -> Tensor:
        """``(s, b)`` of this rank's samples out of ``(s, B)``."""
        return table if len(self.sizes) == 1 else table.split(list(self.sizes), dim=1)[self.rank]


def gather_statistics(communicator: Communicator, statistics: SampleStatistics) -> GatheredStatistics:
    """Statistics of the samples of all ranks; factors and costs of sites are the mean of what the ranks measured."""
    if communicator.size == 1:
        return GatheredStatistics(statistics, (len(statistics.loss),), 0)
    tensors = {name: value.detach().to(statistics.loss.device) for name, value in statistics.tensors().items()}
    sites = [name for name, value in tensors.items() if name in PER_SITE and value.ndim == 1]
    by_sample = {name: value for name, value in tensors.items() if name not in sites}
    if "embedding" in by_sample:  # of texts it is as wide as the longest of a rank
        embedding = by_sample["embedding"]
        widths = communicator.gather(torch.tensor([embedding.shape[1]], device=embedding.device))
        by_sample["embedding"] = F.pad(embedding, (0, max(map(int, widths)) - embedding.shape[1]))
    # `(b, d)` embeddings have the sample first, `(b,)` and `(s, b)` tables have it last.
    lines = {name: v if name == "embedding" else v.reshape(-1, v.shape[-1]).T for name, v in by_sample.items()}
    ranks = gather_lines(communicator, torch.cat(list(lines.values()), dim=1))
    parts = torch.cat(ranks).split([line.shape[1] for line in lines.values()], dim=1)
    found = {
        name: part if name == "embedding" else part.T.reshape(*by_sample[name].shape[:-1], -1)
        for (name, part) in zip(lines, parts, strict=True)
    }
    if sites:
        mean = communicator.sum(torch.stack([tensors[name] for name in sites])) / communicator.size
        found |= dict(zip(sites, mean, strict=True))
    return GatheredStatistics(statistics.with_tensors(found), tuple(len(rank) for rank in ranks), communicator.rank)


def gather_observation(communicator: Communicator, observation: TraceObservation) -> TraceObservation:
    """The ``(s, B)`` observation of all ranks."""
    if communicator.size == 1:
        return observation
    lines = torch.cat([observation.trace.detach(), observation.queries.to(observation.trace)]).T
    both = torch.cat(gather_lines(communicator, lines.contiguous())).T
    seen, queries = both.chunk(2)
    return replace(observation, trace=seen, queries=queries)


def with_fixed_totals(allocation: Allocation, sizes: Sequence[int], *, multiple: int) -> Allocation:
    """Rescale the counts so that each rank's total at each site is in proportion to its number of samples, ``sizes``.

    Within a rank the relative counts are preserved, between the site's least count and ``allocation.most``; a rank
    whose samples all reach the latter spends less. Where samples are drawn the counts stay: to change them would change
    the probabilities.
    """
    if len(sizes) == 1 or allocation.inclusion is not None:
        return allocation
    lines = []
    for i, line in enumerate(allocation.counts):
        least = int(line.min())
        most = None if allocation.most is None else int(allocation.most[i])
        totals = largest_remainder(torch.tensor(sizes).double(), int(line.sum()), minimum=0, multiple=multiple).tolist()
        parts = zip(line.split(list(sizes)), totals, strict=True)
        lines.append(torch.cat([_bounded(p, n, least=least, most=most, multiple=multiple) for p, n in parts]))
    return replace(allocation, counts=torch.stack(lines))


def _bounded(shares: Tensor, total: int, *, least: int, most: int | None, multiple: int) -> Tensor:
    counts = largest_remainder(shares, total, minimum=least, multiple=multiple)
    full = torch.zeros_like(counts, dtype=torch.bool)
    while most is not None and bool((counts > most).any()):
        full |= counts >= most
        counts[full] = most
        if not bool((~full).any()):
            break
        rest = total - most * int(full.sum())
        counts[~full] = largest_remainder(shares[~full], rest, minimum=least, multiple=multiple)
    return counts
