"""Evaluation of an allocation on traces that are independent of it.

The queries of a step are spent after its counts are chosen, so the traces they show give unbiased estimates of
``J = sum_b Tr_b / A_b`` (FLOPS, Ren et al., ICLR 2025, eq. 9). Evaluating J on the traces that the counts were chosen
from underestimates it, more so the noisier they are.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flops_lightning.allocators.objective import effective_counts, estimated_gain_optimal, objective
from flops_lightning.protocol import TraceObservation

LEAST = 3  # pairs for a rank correlation: two are always in the same or in opposite order


class HeldBackRatios(NamedTuple):
    """``(s,)`` J of the counts divided by J of equal counts, and by the least J; NaN without a positive trace."""

    over_equal: Tensor
    over_optimal: Tensor


def held_back_ratios(
    observation: TraceObservation, counts: Tensor, *, pilots: Tensor | None = None, pilot_weight: Tensor | None = None,
    pilots_reused: bool = True,
) -> HeldBackRatios:  # fmt: skip
    """J of the counts relative to equal counts and to the optimum, at each site, for the same number of queries.

    Samples without queries show no trace and are excluded from the sums; equal counts are those
    of the whole batch. The optimum is that of the remaining samples with the queries they had, corrected for the noise
    in the traces (:func:`estimated_gain_optimal`).

    ``counts`` are ``(s, b)`` or ``(1, b)`` and exclude the ``(s, b)`` pilots, which count towards the budget whether or
    not they enter the gradient. Their ``(s, b)`` weight in it defaults to their share of the site's queries.
    """
    seen = observation.trace.isfinite()
    trace = torch.where(seen, observation.trace, 0.0).double().clamp_min(0.0)
    counts = counts.double().expand_as(trace)
    pilots = torch.zeros_like(trace) if pilots is None else pilots.double().expand_as(trace)
    # Every sample was given the same number of pilots; lost ones count towards the budget.
    paid = pilots.amax(dim=1, keepdim=True)
    mean = counts.mean(dim=1, keepdim=True) + paid
    used = counts
    if pilots_reused:
        weight = paid / mean if pilot_weight is None else pilot_weight.double().expand_as(trace)
        used = torch.where(counts > 0, effective_counts(counts, pilots, weight.expand_as(trace)), pilots)
    of_counts = torch.stack([objective(t, n) for t, n in zip(trace, used, strict=True)])
    total = trace.sum(dim=1)
    number, queries = seen.sum(dim=1), torch.where(seen, counts + paid, 0.0).sum(dim=1)
    least = number * total / queries / estimated_gain_optimal(observation.trace, observation.freedom)
    ratios = (of_counts * mean[:, 0] / total, of_counts / least)
    return HeldBackRatios(*(torch.where(total > 0, ratio, torch.nan) for ratio in ratios))


def average_ranks(values: Tensor) -> Tensor:
    """``(..., n)`` float64 ranks from 1 along the last dimension; equal values share the mean of their ranks."""
    ordered, values = values.double().sort(dim=-1).values, values.double().contiguous()
    below, up_to = (torch.searchsorted(ordered, values, right=right) for right in (False, True))
    return (below + up_to + 1).double() / 2.0


def rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Spearman's rank correlation along the last dimension: Pearson's of the ranks, ties averaged.

    ``a`` and ``b`` are ``(..., n)`` and broadcastable; pairs with a non-finite entry are excluded. Returns ``(...)``
    float64 in [-1, 1]; NaN for fewer than three pairs, or if ``a`` or ``b`` is constant.
    """
    a, b = torch.broadcast_tensors(a.double(), b.double())
    known = a.isfinite() & b.isfinite()
    number = known.sum(dim=-1, keepdim=True)
    # Excluded entries rank last, so the other ranks are unaffected.
    ranks = [torch.where(known, average_ranks(torch.where(known, x, torch.inf)), 0.0) for x in (a, b)]
    # The mean of ranks from 1 to n is the same with ties and without.
    x, y = (torch.where(known, rank - (number + 1) / 2.0, 0.0) for rank in ranks)
    spread = (x.square().sum(dim=-1) * y.square().sum(dim=-1)).sqrt()
    value = ((x * y).sum(dim=-1) / spread).clamp(-1.0, 1.0)
    return torch.where((number[..., 0] >= LEAST) & (spread > 0), value, torch.nan)
