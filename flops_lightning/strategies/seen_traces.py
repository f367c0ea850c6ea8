"""Traces gathered site by site while queries are spent."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flops_lightning.protocol import TraceObservation


@dataclass(frozen=True, eq=False)
class SeenTraces:
    """A table that fills as sites are run.

    Attributes:
        trace: ``(s, b)`` traces, NaN where nothing was seen.
        queries: ``(s, b)`` surviving queries behind each.
    """

    trace: Tensor
    queries: Tensor

    @classmethod
    def empty(cls, sites: int, like: Tensor) -> SeenTraces:
        """Nothing seen yet of the samples of ``like`` ``(b,)``."""
        return cls(like.new_full((sites, len(like)), torch.nan), like.new_zeros(sites, len(like)))

    def put(self, site: int, trace: Tensor, queries: Tensor) -> None:
        """Fill in one site."""
        self.trace[site], self.queries[site] = trace.to(self.trace), queries.to(self.queries)

    def observation(self, unit: int) -> TraceObservation:
        """What was seen."""
        return TraceObservation(self.trace, self.queries, unit)
