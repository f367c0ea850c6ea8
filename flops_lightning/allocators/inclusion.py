"""Less than one query for a sample: samples are drawn, and weighted by the inverse of their probability.

A sample whose expected number of queries ``n_b`` is below one has one query with probability ``pi_b = n_b`` and none
otherwise, and its estimate is divided by ``pi_b`` (the Horvitz-Thompson estimator: Horvitz and Thompson, "A
Generalization of Sampling Without Replacement From a Finite Universe", 1952). The batch gradient stays unbiased, and
where samples are drawn independently the trace of its covariance is ::

    sum_b [(Tr_b / A_b + ||g_b||^2) / pi_b - ||g_b||^2] / B^2

with ``g_b`` the sample's exact gradient: a sample that is left out takes its signal with it. For a given ``pi_b A_b``
this is least for ``A_b = 1``, and over the samples for ``pi_b ~ sqrt(Tr_b + ||g_b||^2)``. With Gaussian noise in ``d``
dimensions ``Tr_b = (d + 1) ||g_b||^2``, so shares in proportion to ``sqrt(Tr_b)`` are the same, up to 1 / d.

Samples are drawn systematically in a random order, which fixes their number.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flops_lightning.allocators.rounding import check_budget, next_multiple, round_at_sites, water_fill
from flops_lightning.protocol import QueryBudget

LEAST_SHARE = 0.25
"""Least expected queries of a sample, as a share of the average, where the average is below ``min_queries``."""


def least_expected(budget: QueryBudget, samples: int, min_queries: float) -> list[float]:
    """Least expected queries of a sample at each site: below one, samples are drawn.

    ``min_queries`` is a fraction below 1, or raised to what the estimator needs and to a multiple. Where a budget that
    is no int cannot pay for it, it is :data:`LEAST_SHARE` of the average.

    Raises:
        SettingError: The budget is an int and cannot pay for it.
    """
    least = (
        min_queries if 0 < min_queries < 1 else next_multiple(max(int(min_queries), budget.minimum), budget.multiple)
    )
    found: list[float] = []
    for queries, total in zip(budget.queries_per_sample, budget.totals(samples), strict=True):
        if total < samples * least and isinstance(queries, int):
            check_budget(total, samples, minimum=int(least), multiple=budget.multiple)
        found.append(least if total >= samples * least else LEAST_SHARE * total / samples)
    return found


def systematic_sample(probability: Tensor, generator: torch.Generator) -> Tensor:
    """``(b,)`` bool: which samples are drawn, each with its ``(b,)`` probability, in [0, 1].

    Their number is the sum of the probabilities, rounded up or down.
    """
    order = torch.randperm(len(probability), generator=generator)
    start = torch.rand((), dtype=torch.float64, generator=generator)
    # Rounded, so that a sum of probabilities that should be a whole number is one.
    ends = (probability.double()[order].cumsum(dim=0) + start).mul(1e9).round().div(1e9).floor()
    drawn = torch.zeros(len(probability), dtype=torch.bool)
    drawn[order] = ends > torch.cat([start.floor()[None], ends[:-1]])
    return drawn


def draw_counts(expected: Tensor, generator: torch.Generator, *, unit: int) -> tuple[Tensor, Tensor]:
    """Integer counts whose expectation is given, and the probability with which a sample has any.

    ``expected`` is ``(b,)``, above 0. A sample that expects less than one ``unit`` of queries has one or none; the
    others have theirs rounded up or down to units. The sum is that of the expectations, up to one unit.

    Returns:
        ``(b,)`` int64 counts and ``(b,)`` float64 probabilities.
    """
    units = expected.double() / unit
    whole = units.floor()
    return (whole + systematic_sample(units - whole, generator)).long() * unit, units.clamp(max=1.0)


class Split(NamedTuple):
    """Counts of a batch, all ``(s, b)``."""

    counts: Tensor  # int64
    inclusion: Tensor | None  # probability of having any; None: 1 for all
    expected: Tensor  # of the counts


class InclusionDraws:
    """Draws the samples of one batch after another; every rank draws the same."""

    def __init__(self) -> None:
        self._batches = 0

    def split(self, shares: Tensor, budget: QueryBudget, least: Sequence[float]) -> "Split":
        """``(s, b)`` counts in proportion to ``(s, b)`` shares.

        ``least`` are those of :func:`least_expected`. Where no sample expects less than one query, counts are rounded
        by the largest remainder.
        """
        totals = budget.totals(shares.shape[1])
        if all(n == 0 or n >= budget.unit for n in least):
            rounded = round_at_sites(shares, totals, least, multiple=budget.multiple)
            return Split(rounded, None, rounded)
        lines = [water_fill(s, total, floor=n) for s, total, n in zip(shares, totals, least, strict=True)]
        return self.draw(torch.stack(lines), unit=budget.unit)

    def draw(self, expected: Tensor, *, unit: int) -> "Split":
        """Counts with ``(s, b)`` expectations, see :func:`draw_counts`; the draws of sites differ."""
        seed = int(np.random.SeedSequence((0x484F5254, self._batches)).generate_state(1)[0])
        generator = torch.Generator().manual_seed(seed)
        self._batches += 1
        lines = [draw_counts(line, generator, unit=unit) for line in expected]
        counts, inclusion = (torch.stack(part) for part in zip(*lines, strict=True))
        return Split(counts, inclusion if bool((inclusion < 1).any()) else None, expected)

    def state_dict(self) -> dict[str, Any]:
        """The number of batches so far; empty before the first."""
        return {"drawn_batches": self._batches} if self._batches else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._batches = int(state.get("drawn_batches", 0))
