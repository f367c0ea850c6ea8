"""Neyman allocation with estimated traces (FLOPS, Ren et al., ICLR 2025, appendix A.3)."""

import torch
from torch import Tensor

from flops_lightning.allocators.objective import optimal_shares
from flops_lightning.allocators.rounding import water_fill
from flops_lightning.allocators.trace_allocator import TraceAllocator, count_diagnostics, over_equal
from flops_lightning.protocol import Allocation, QueryBudget, SampleStatistics


class OptimalAllocator(TraceAllocator):
    """Gives each sample queries in proportion to the square root of its trace at each site: ``A_b ~ sqrt(Tr_b)``.

    With exact traces this minimises ``J = sum_b Tr_b / A_b`` (eq. 9) and attains the bound of Theorem 2. By default a
    regression on the clean pass predicts the traces (:class:`TraceSettings`). If no trace is positive, the allocation
    is equal. ``min_queries: 0`` allows samples without queries, which biases the batch gradient towards zero.
    ``min_queries: 0.25`` allows averages down to a quarter of a query, without bias (Horvitz and Thompson, 1952).

    With reused pilots and a prediction, a sample's pilots enter its gradient with the weight ``n / (n + A)``, where
    ``A`` is the number of queries for the prediction alone. The weight does not depend on the pilots' losses, so the
    estimate stays unbiased.

    Diagnostics: ``J_over_J_equal`` (with the estimated traces, mean over the sites), ``prior_strength`` (mean over the
    sites, with a prediction), ``count_min``, ``count_max``.

    Example:
        >>> from flops_lightning.allocators import TraceSettings
        >>> statistics = SampleStatistics(loss=torch.ones(3), trace=torch.tensor([1.0, 4.0, 9.0]))
        >>> allocator = OptimalAllocator(traces=TraceSettings(source="pilots"))
        >>> allocator.allocate(statistics, QueryBudget((8,))).counts
        tensor([[ 4,  8, 12]])
    """

    least_min_queries = 0

    def _split(self, statistics: SampleStatistics, budget: QueryBudget) -> Allocation:
        """Estimate the traces and split each site's budget in proportion to their roots."""
        statistics = statistics.on_cpu()
        least, totals = self._least(statistics, budget), budget.totals(len(statistics.loss))
        estimate = self._traces.estimate(statistics, sites=len(totals), unit=budget.multiple)

        def expected(prediction: Tensor) -> Tensor:
            lines = zip(optimal_shares(prediction), totals, least, strict=True)
            return torch.stack(
                [water_fill(s, total, floor=min(n or budget.multiple, total / len(s))) for s, total, n in lines]
            )

        weight = estimate.pilot_weight(expected)
        shares = optimal_shares(estimate.trace)
        if weight is not None:
            shares = shares * (1.0 - weight)
        counts, inclusion, used = self._inclusion.split(shares, budget, least)
        self._check_drawn(inclusion, weight)
        pairs = [(t, n) for t, n in zip(estimate.trace, used, strict=True) if float(t.sum()) > 0 and float(n.sum()) > 0]
        mean = sum(over_equal(trace, count) for trace, count in pairs) / len(pairs) if pairs else 1.0
        values = {"J_over_J_equal": mean} | count_diagnostics(counts, estimate)
        return Allocation(counts, values, weight, inclusion=inclusion, expected=used)
