"""What a query costs in seconds: FLOPs leave out the noise, the sums and the overhead of small layers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from flops_lightning.queries import CleanPass
from flops_lightning.strategies.costs import SiteCosts
from flops_lightning.strategies.sites import Site

ROWS = 256
"""Queries that are timed at once, about."""
REPEATS = 3
Spend = Callable[[Site, NDArray[np.int64]], object]
"""Runs ``(b,)`` queries of a site as a step would."""


@torch.no_grad()
def measured_costs(
    spend: Spend, sites: Sequence[Site], clean: CleanPass, counted: SiteCosts, *, unit: int
) -> list[float]:
    """Cost of a query at each site from bottom to top, in forward-equivalents.

    Everything that a query is made of is timed: its noise, its suffix and its sums; the median of a few repetitions
    after one to warm up. The unit is that of the counted costs: the slowest query costs as much as the dearest one was
    counted. Unlike counted costs these differ from run to run. What the timing costs, once a run, is not metered.
    """
    each = max(1, ROWS // max(1, clean.batch_size) // unit) * unit
    counts = np.full(clean.batch_size, each, dtype=np.int64)
    seconds = [_seconds(spend, site, clean, counts) for site in sites]
    return [time_ / max(seconds) * max(counted.query.values()) for time_ in seconds]


def _seconds(spend: Spend, site: Site, clean: CleanPass, counts: NDArray[np.int64]) -> float:
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        spend(site, counts)
        if clean.loss.is_cuda:
            torch.cuda.synchronize(clean.loss.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
