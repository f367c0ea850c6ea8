"""How well the trace in activation space stands in for that in parameter space, at block and group sites."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flops_lightning.allocators.objective import equal_objective, objective
from flops_lightning.allocators.rank_correlation import rank_correlation
from flops_lightning.allocators.rounding import water_fill
from flops_lightning.queries import CleanPass
from flops_lightning.strategies import LikelihoodRatio

SAMPLES = 32
DIRECTIONS = 32
FIRST_QUERY = 2_000_000


@torch.no_grad()
def proxy_rows(strategy: LikelihoodRatio, clean: CleanPass, step: int) -> list[tuple[Any, ...]]:
    """Rank correlation of the two traces at each site, and how much of the gain in parameter space the proxy keeps.

    Both traces come from the same directions, of the first samples of the batch: each single query's gradient is built,
    which no training step does.
    """
    few = first_samples(clean, SAMPLES)
    rows: list[tuple[Any, ...]] = []
    for site in strategy.sites:
        proxy, exact = torch.empty(few.batch_size).double(), torch.empty(few.batch_size).double()
        counts = np.ones(few.batch_size, dtype=np.int64)
        by_query = []
        for query in range(DIRECTIONS):
            with strategy.network.evaluating():
                sums = strategy.site_queries.sums(site, few, counts, first_query=FIRST_QUERY + query)
            if sums is not None:
                by_query.append(sums.delta())
        for b in range(few.batch_size):
            one = first_samples(few, 1, start=b)
            vectors = [
                torch.cat([g.flatten() for g in strategy.site_queries.gradient(site, one, delta[b : b + 1]).values()])
                for delta in by_query
            ]
            exact[b] = torch.stack(vectors).double().var(dim=0).sum()
            proxy[b] = torch.stack([delta[b].flatten() for delta in by_query]).double().var(dim=0).sum()
        agreement = float(rank_correlation(proxy, exact))
        rows.append((step, site.name, "trace in activation with that in parameter space", agreement))
        rows.append((step, site.name, "gain in parameter space that the proxy keeps", kept(proxy, exact)))
    return rows


def kept(proxy: Tensor, exact: Tensor) -> float:
    """Gain of counts made from the proxy over the gain of counts made from the exact traces, both scored by these."""
    total = 20.0 * len(exact)
    j = [float(objective(exact, water_fill(trace.sqrt(), total, floor=1.0))) for trace in (proxy, exact)]
    return j[1] / j[0] if float(equal_objective(exact, total)) > 0 else 1.0


def first_samples(clean: CleanPass, number: int, *, start: int = 0) -> CleanPass:
    """The clean pass of some of its samples."""
    part = slice(start, start + number)
    return replace(
        clean,
        targets=clean.targets[part],
        activations={i: h[part] for i, h in clean.activations.items()},
        output=clean.output[part],
        loss=clean.loss[part],
        embedding=clean.embedding[part],
    )
