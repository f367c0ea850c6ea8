"""Spearman's rank correlation, line by line of a table, with a look past what is not known."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST = 3
"""Pairs below which there is no correlation worth the name: two are always in the same or in opposite order."""


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
