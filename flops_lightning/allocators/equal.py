"""The same number of queries for every sample."""

from __future__ import annotations

import torch

from flops_lightning.allocators.base import QueryAllocator
from flops_lightning.protocol import Allocation, QueryBudget, SampleStatistics


class EqualAllocator(QueryAllocator):
    """Gives every sample ``queries_per_sample`` queries: what every method did before allocation, and the baseline."""

    def allocate(self, statistics: SampleStatistics, budget: QueryBudget) -> Allocation:
        """Repeat the budget's average for every sample.

        Args:
            statistics: Only the number of samples is looked at.
            budget: The average number of queries of a sample at each site.

        Returns:
            ``(s, b)`` equal counts, without diagnostics.
        """
        queries = torch.tensor(budget.queries_per_sample, dtype=torch.int64)
        return Allocation(counts=queries[:, None].repeat(1, len(statistics.loss)))
