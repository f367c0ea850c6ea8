"""What counts were worth, told from traces that they were not made from.

The queries of a step are spent after its counts were chosen, so the traces that they show are independent of the
counts: ``J = sum_b Tr_b / A_b`` (FLOPS, Ren et al., ICLR 2025, eq. 9) of the counts used and J of equal counts are both
estimated without bias. J by the traces that the counts were chosen from is not: it is too low, the more so the noisier
these were.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flops_lightning.allocators.objective import effective_counts, estimated_gain_optimal, objective
from flops_lightning.protocol import TraceObservation

LEAST = 3
"""Fewest pairs with a rank correlation: two are always in the same or in opposite order."""


@dataclass(frozen=True)
class HeldBackRatios:
    """J of the counts used, by the traces that their own queries showed.

    Attributes:
        over_equal: ``(s,)`` J over that of equal counts; NaN at sites where no trace is seen, or none is positive.
        over_optimal: ``(s,)`` J over the least possible, NaN at the same sites.
        seen: ``(s, b)`` whether a sample's trace was seen.
    """

    over_equal: Tensor
    over_optimal: Tensor
    seen: Tensor


def held_back_ratios(
    observation: TraceObservation,
    counts: Tensor,
    *,
    pilots: Tensor | None = None,
    pilot_weight: Tensor | None = None,
    pilots_reused: bool = True,
) -> HeldBackRatios:
    """J of counts over J of equal counts and over the least J, at each site.

    All are given the same queries: pilots are paid from the budget, whether or not they enter the gradient.

    A sample with fewer than two independent queries shows no trace and is left out of both sums, as if its trace were
    zero. Equal counts stay those of the whole batch, so what the others gained from its queries counts. Its own share
    in J is missing: with counts ``~ sqrt(Tr)`` no more than its share of the queries, but much where a noisy sample was
    given one query. The least J is that of the samples seen with the queries that they had.

    Args:
        observation: ``(s, b)`` traces seen and the queries behind each, on the CPU.
        counts: ``(s, b)`` or ``(1, b)`` queries of each sample, pilots left out.
        pilots: ``(s, b)`` pilots of each sample, or None.
        pilot_weight: ``(s, b)`` weight of the pilots in each sample's gradient; None: their share of the site's
            queries. Without effect where there are none.
        pilots_reused: Whether pilots enter the gradient.

    Returns:
        The ratios. :func:`estimated_gain_optimal` corrects the least J for the noise in the traces.
    """
    seen = observation.trace.isfinite()
    trace = torch.where(seen, observation.trace, 0.0).double().clamp_min(0.0)
    counts = counts.double().expand_as(trace)
    pilots = torch.zeros_like(trace) if pilots is None else pilots.double().expand_as(trace)
    # Every sample was to have the same number of pilots; those that were lost were paid all the same.
    paid = pilots.amax(dim=1, keepdim=True)
    mean = counts.mean(dim=1, keepdim=True) + paid
    used = counts
    if pilots_reused:
        weight = paid / mean if pilot_weight is None else pilot_weight.double().expand_as(trace)
        used = torch.where(counts > 0, effective_counts(counts, pilots, weight.expand_as(trace)), pilots)
    of_counts = torch.stack([objective(t, n) for t, n in zip(trace, used, strict=True)])
    total = trace.sum(dim=1)
    number, queries = seen.sum(dim=1), torch.where(seen, counts + paid, 0.0).sum(dim=1)
    freedom = (observation.queries / observation.unit - 1.0).clamp_min(0.0)
    least = number * total / queries / estimated_gain_optimal(observation.trace, freedom)
    known = total > 0
    return HeldBackRatios(
        torch.where(known, of_counts * mean[:, 0] / total, torch.nan),
        torch.where(known, of_counts / least, torch.nan),
        seen,
    )


def average_ranks(values: Tensor) -> Tensor:
    """``(..., n)`` float64 ranks from 1 along the last dimension; equal values share the mean of their ranks."""
    ordered, values = values.double().sort(dim=-1).values, values.double().contiguous()
    below = torch.searchsorted(ordered, values, right=False)
    up_to = torch.searchsorted(ordered, values, right=True)
    return (below + up_to + 1).double() / 2.0


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation along the last dimension: Pearson's of the ranks, ties averaged.

    Args:
        a: ``(..., n)`` values.
        b: ``(..., n)`` values, broadcastable with ``a``. Pairs in which one is not finite are left out.

    Returns:
        ``(...)`` float64 in [-1, 1]; NaN where fewer than three pairs are left, or one side of them is constant.
    """
    a, b = torch.broadcast_tensors(a.double(), b.double())
    known = a.isfinite() & b.isfinite()
    number = known.sum(dim=-1, keepdim=True)
    # What is left out ranks above all else, and so moves no other rank.
    ranks = [torch.where(known, average_ranks(torch.where(known, x, torch.inf)), 0.0) for x in (a, b)]
    # The mean of ranks from 1 to n is the same with ties and without.
    x, y = (torch.where(known, rank - (number + 1) / 2.0, 0.0) for rank in ranks)
    spread = (x.square().sum(dim=-1) * y.square().sum(dim=-1)).sqrt()
    value = ((x * y).sum(dim=-1) / spread).clamp(-1.0, 1.0)
    return torch.where((number[..., 0] >= LEAST) & (spread > 0), value, torch.nan)
