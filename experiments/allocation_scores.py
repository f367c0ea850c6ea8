"""How good an allocation is, by traces that it was not made from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flops_lightning.allocators.objective import effective_counts, estimated_gain_optimal, objective
from flops_lightning.protocol import TraceObservation

# Two-sided 95 % points of Student's t by degrees of freedom; beyond the table the normal one.
T95 = (math.inf, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13)


@dataclass(frozen=True)
class HeldOut:
    """Traces of one batch from many directions that no allocator saw.

    Attributes:
        trace: ``(s, b)`` nonnegative.
        freedom: ``(s, b)`` degrees of freedom behind each.
        scale: ``(s,)`` factors to squared units of the parameters.
    """

    trace: Tensor
    freedom: Tensor
    scale: Tensor

    @classmethod
    def of(cls, observation: TraceObservation, scale: Tensor) -> HeldOut:
        """From an observation; samples that lost their queries count as without variance."""
        seen = observation.on_cpu()
        freedom = (seen.queries / seen.unit - 1.0).clamp_min(0.0)
        return cls(seen.trace.nan_to_num(0.0).clamp_min(0.0), freedom, scale.detach().cpu().double())

    def equal(self, queries: int) -> Tensor:
        """``(s,)`` J of equal counts at each site, in squared units of the parameters."""
        return self.scale * self.trace.sum(dim=1) / queries

    def of_counts(self, counts: Tensor, pilots: Tensor, weight: Tensor | None, queries: int) -> Tensor:
        """``(s,)`` J of ``(s, b)`` counts, with ``(s, b)`` reused pilots beside them.

        Args:
            counts: Queries after the pilots.
            pilots: Pilots of each sample at each site.
            weight: Weights of the pilots; None: their share of ``queries``.
            queries: Queries of a sample and site, pilots included.
        """
        weight = pilots / queries if weight is None else weight
        effective = effective_counts(counts, pilots, weight)
        return self.scale * torch.stack([objective(t, a) for t, a in zip(self.trace, effective, strict=True)])

    def optimal(self, queries: int) -> Tensor:
        """``(s,)`` least J of each site, corrected for the noise in the held-out traces."""
        return self.equal(queries) / estimated_gain_optimal(self.trace, self.freedom)


def interval(gains: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of the gains of several batches and its 95 % confidence interval (Student's t)."""
    logs = [math.log(gain) for gain in gains]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return math.exp(mean), math.nan, math.nan
    point = T95[len(logs) - 1] if len(logs) <= len(T95) else 1.96
    half = point * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)
