"""How good an allocation is, by traces that it was not made from."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flops_lightning.allocators.held_back import rank_correlation
from flops_lightning.allocators.objective import effective_counts, equal_objective, estimated_gain_optimal, objective
from flops_lightning.allocators.rounding import water_fill
from flops_lightning.protocol import TraceObservation
from flops_lightning.queries import CleanPass
from flops_lightning.strategies import LikelihoodRatio

PROXY_SAMPLES, PROXY_DIRECTIONS, PROXY_FIRST_QUERY = 32, 32, 2_000_000


@dataclass(frozen=True)
class HeldOut:
    """Traces of one batch from many directions that no allocator saw."""

    trace: Tensor  # (s, b) nonnegative
    freedom: Tensor  # (s, b) degrees of freedom behind each
    scale: Tensor  # (s,) factors to squared units of the parameters

    @classmethod
    def of(cls, observation: TraceObservation, scale: Tensor) -> "HeldOut":
        """From an observation; samples that lost their queries count as without variance."""
        seen = observation.on_cpu()
        freedom = (seen.queries / seen.unit - 1.0).clamp_min(0.0)
        return cls(seen.trace.nan_to_num(0.0).clamp_min(0.0), freedom, scale.detach().cpu().double())

    def equal(self, queries: int) -> Tensor:
        """``(s,)`` J of equal counts at each site, in squared units of the parameters."""
        return self.scale * self.trace.sum(dim=1) / queries

    def of_counts(self, counts: Tensor, pilots: Tensor, weight: Tensor | None, queries: int) -> Tensor:
        """``(s,)`` J of ``(s, b)`` counts after reused pilots, of ``queries`` of a sample and site in all.

        The ``(s, b)`` pilots have ``weight``; None: their share of ``queries``.
        """
        effective = effective_counts(counts, pilots, pilots / queries if weight is None else weight)
        return self.scale * torch.stack([objective(t, a) for t, a in zip(self.trace, effective, strict=True)])

    def optimal(self, queries: int) -> Tensor:
        """``(s,)`` least J of each site, corrected for the noise in the held-out traces."""
        return self.equal(queries) / estimated_gain_optimal(self.trace, self.freedom)


@torch.no_grad()
def proxy_rows(strategy: LikelihoodRatio, clean: CleanPass, step: int) -> list[tuple[Any, ...]]:
    """Rank correlation of the two traces at each site, and how much of the gain in parameter space the proxy keeps.

    Both come from the same directions of the batch's first samples; each single query's gradient is built.
    """
    few = _samples(clean, slice(0, PROXY_SAMPLES))
    rows: list[tuple[Any, ...]] = []
    for site in strategy.sites:
        proxy, exact = torch.empty(few.batch_size).double(), torch.empty(few.batch_size).double()
        counts = np.ones(few.batch_size, dtype=np.int64)
        by_query = []
        for query in range(PROXY_DIRECTIONS):
            with strategy.network.evaluating():
                sums = strategy.engine.sums(site, few, counts, first_query=PROXY_FIRST_QUERY + query)
            if sums is not None:
                by_query.append(sums.delta())
        for b in range(few.batch_size):
            one = _samples(few, slice(b, b + 1))
            gradients = [strategy.engine.gradient(site, one, delta[b : b + 1]).values() for delta in by_query]
            vectors = [torch.cat([g.flatten() for g in each]) for each in gradients]
            exact[b] = torch.stack(vectors).double().var(dim=0).sum()
            proxy[b] = torch.stack([delta[b].flatten() for delta in by_query]).double().var(dim=0).sum()
        agreement = float(rank_correlation(proxy, exact))
        rows.append((step, site.name, "trace in activation with that in parameter space", agreement))
        rows.append((step, site.name, "gain in parameter space that the proxy keeps", gain_kept(proxy, exact)))
    return rows


def gain_kept(proxy: Tensor, exact: Tensor) -> float:
    """Gain of counts made from the proxy over the gain of counts made from the exact traces, both scored by these."""
    total = 20.0 * len(exact)
    j = [float(objective(exact, water_fill(trace.sqrt(), total, floor=1.0))) for trace in (proxy, exact)]
    return j[1] / j[0] if float(equal_objective(exact, total)) > 0 else 1.0


def _samples(clean: CleanPass, part: slice) -> CleanPass:
    tensors = {name: getattr(clean, name)[part] for name in ("targets", "output", "loss", "embedding")}
    return replace(clean, activations={i: h[part] for i, h in clean.activations.items()}, **tensors)
