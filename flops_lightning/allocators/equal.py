"""The same number of queries for every sample."""

import torch

from flops_lightning.allocators.base import QueryAllocator
from flops_lightning.protocol import Allocation, QueryBudget, SampleStatistics


class EqualAllocator(QueryAllocator):
    """Gives every sample the average number of queries at each site: the baseline.

    Example:
        >>> statistics = SampleStatistics(loss=torch.tensor([0.1, 2.0, 0.7]))
        >>> EqualAllocator().allocate(statistics, QueryBudget((4, 2))).counts
        tensor([[4, 4, 4],
                [2, 2, 2]])
    """

    def allocate(self, statistics: SampleStatistics, budget: QueryBudget) -> Allocation:
        """Repeat the budget for every sample; only the number of losses is read.

        Samples in turn get the one query more or less that an average between two whole numbers takes.
        """
        samples = len(statistics.loss)
        if all(isinstance(queries, int) for queries in budget.queries_per_sample):
            queries = torch.tensor(budget.queries_per_sample, dtype=torch.int64)
            return Allocation(counts=queries[:, None].repeat(1, samples))
        averages = torch.tensor(budget.totals(samples)).double() / samples
        drawn = self._inclusion.draw(averages[:, None].repeat(1, samples), unit=budget.unit)
        return Allocation(drawn.counts, inclusion=drawn.inclusion, expected=drawn.expected)
