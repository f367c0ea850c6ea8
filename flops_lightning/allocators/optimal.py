"""The optimal (Neyman) allocation, from traces as well as they can be known (FLOPS, Ren et al., ICLR 2025, A.3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flops_lightning.allocators.base import QueryAllocator
from flops_lightning.allocators.objective import equal_objective, objective
from flops_lightning.allocators.rounding import round_at_sites, water_fill
from flops_lightning.allocators.threads import one_thread
from flops_lightning.allocators.trace_estimator import TraceEstimate, TraceEstimator, TraceSettings
from flops_lightning.errors import SettingError
from flops_lightning.protocol import Allocation, QueryBudget, SampleStatistics, TraceObservation


class OptimalAllocator(QueryAllocator):
    """Gives each sample queries in proportion to the root of its trace, ``A_b ~ sqrt(Tr_b)``, at each site.

    With exact traces this minimises ``J = sum_b Tr_b / A_b`` (eq. 9) and reaches the right-hand side of Theorem 2; what
    is lost is lost by the traces being estimates. These come from :class:`TraceEstimator`: by default a regression on
    numbers of the clean pass that is learned from every step's own queries, so that no pilots are needed.

    Where pilots are reused and a prediction is there, each sample's pilots enter its gradient with the weight
    ``n / (n + A)``, ``A`` being the queries that the prediction alone would give it. This is fixed before the pilots
    are seen, as it must be for the estimate to stay unbiased, and wastes less than one weight for all.

    Samples whose statistics are not finite get the minimum; if no trace is positive the allocation is equal.

    Diagnostics: ``J_over_J_equal`` (with the estimated traces, mean over the sites), ``prior_strength`` (mean over the
    sites, where a prediction is made), ``count_min``, ``count_max``.
    """

    def __init__(self, *, traces: TraceSettings | None = None, min_queries: int = 1) -> None:
        """Choose where the traces come from.

        Args:
            traces: See :class:`TraceSettings`.
            min_queries: Least queries of a sample, raised to the next multiple of the budget's ``multiple``; 0 lets
                samples go without, which biases the batch gradient towards nothing where their trace is rounded away.

        Raises:
            SettingError: a value is out of its range or has no effect.
        """
        if min_queries < 0:
            raise SettingError("min_queries", min_queries, "is negative.", "Write 1, or 0 to let samples go without.")
        self.min_queries = min_queries
        self._traces = TraceEstimator(traces)

    @property
    def requests(self) -> frozenset[str]:
        """What the trace estimator reads."""
        return self._traces.requests

    @property
    def learns(self) -> bool:
        """Whether a regression is learned."""
        return self._traces.learns

    def observe(self, observation: TraceObservation) -> None:
        """Teach the regression."""
        self._traces.observe(observation)

    @one_thread()
    def allocate(self, statistics: SampleStatistics, budget: QueryBudget) -> Allocation:
        """Estimate the traces and give each site's budget out in proportion to their roots.

        Raises:
            SettingError: a statistic is missing, or the budget is too small for ``min_queries``.
        """
        statistics = statistics.on_cpu()
        batch_size, minimum = len(statistics.loss), max(self.min_queries, budget.minimum)
        totals = [queries * batch_size for queries in budget.queries_per_sample]
        estimate = self._traces.estimate(statistics, sites=len(totals), unit=budget.multiple)
        weight = pilot_weight(estimate, totals, floor=max(minimum, budget.multiple))
        shares = estimate.trace.sqrt() if weight is None else estimate.trace.sqrt() * (1.0 - weight)
        counts = round_at_sites(shares, totals, minimum=minimum, multiple=budget.multiple)
        return Allocation(counts, diagnostics(estimate, counts), weight)

    def state_dict(self) -> dict[str, Any]:
        """What the trace estimator remembers."""
        return self._traces.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._traces.load_state_dict(state)


def pilot_weight(estimate: TraceEstimate, totals: list[int], *, floor: int) -> Tensor | None:
    """``(s, b)`` weight of each sample's pilots, ``n / (n + A)``, with A as the prediction alone allocates.

    None without a prediction or without reused pilots: the share of the pilots in the budget is then the weight.
    """
    if estimate.prediction is None or not estimate.weighs_pilots:
        return None
    shares = estimate.prediction.sqrt()
    expected = torch.stack(
        [water_fill(s, t, floor=min(floor, t / s.numel())) for s, t in zip(shares, totals, strict=True)]
    )
    return estimate.pilots / (estimate.pilots + expected)


def diagnostics(estimate: TraceEstimate, counts: Tensor) -> dict[str, float]:
    """Numbers worth logging of ``(s, b)`` counts made from estimated traces."""
    ratios = [
        float(objective(trace, count) / equal_objective(trace, int(count.sum())))
        for trace, count in zip(estimate.trace, counts, strict=True)
        if float(trace.sum()) > 0 and int(count.sum()) > 0
    ]
    return {"J_over_J_equal": sum(ratios) / len(ratios) if ratios else 1.0} | count_diagnostics(estimate, counts)


def count_diagnostics(estimate: TraceEstimate, counts: Tensor) -> dict[str, float]:
    """Those of them that hold whatever the sums of the counts."""
    values = {"count_min": float(counts.min()), "count_max": float(counts.max())}
    if estimate.prediction is not None:
        values["prior_strength"] = float(estimate.prior_strength.mean())
    return values
