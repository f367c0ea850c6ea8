"""Allocators: how a fixed budget of queries is split over the samples of a batch."""

from flops_lightning.allocators.base import QueryAllocator
from flops_lightning.allocators.bernoulli import BernoulliAllocator
from flops_lightning.allocators.budget import BudgetRule, BudgetSettings
from flops_lightning.allocators.cost_aware import CostAwareAllocator
from flops_lightning.allocators.equal import EqualAllocator
from flops_lightning.allocators.gaussian import GaussianAllocator, GaussianParameters
from flops_lightning.allocators.objective import equal_objective, gain_optimal, objective, optimal_shares
from flops_lightning.allocators.optimal import OptimalAllocator
from flops_lightning.allocators.rounding import largest_remainder, water_fill
from flops_lightning.allocators.trace_estimator import TraceSettings
from flops_lightning.protocol import (
    Allocation,
    QueryBudget,
    SampleStatistics,
    SupportsPilotWeights,
    SupportsQueryAllocation,
    SupportsStatisticsRequests,
    SupportsTraceFeedback,
    TraceObservation,
)

__all__ = [
    "Allocation", "BernoulliAllocator", "BudgetRule", "BudgetSettings", "CostAwareAllocator", "EqualAllocator",
    "GaussianAllocator", "GaussianParameters", "OptimalAllocator", "QueryAllocator", "QueryBudget",
    "SampleStatistics", "SupportsPilotWeights", "SupportsQueryAllocation", "SupportsStatisticsRequests",
    "SupportsTraceFeedback", "TraceObservation", "TraceSettings", "equal_objective", "gain_optimal",
    "largest_remainder", "objective", "optimal_shares", "water_fill",
]  # fmt: skip
