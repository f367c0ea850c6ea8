"""What was seen of a few steps, and how it is read off the strategy's meter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flops_lightning.meter import QueryMeter, SiteCount
from flops_lightning.plan.cost import Cost
from flops_lightning.plan.length import Epoch
from flops_lightning.strategies import ForwardGradientStrategy
from flops_lightning.strategies.costs import site_costs
from flops_lightning.strategies.query_strategy import QueryStrategy


@dataclass(frozen=True)
class SiteShare:
    """What one site costs.

    Attributes:
        name: Of the site, or of what else the meter counts, such as ``clean``.
        queries: Queries of a sample and step.
        query_cost: Forward-equivalents of a query; None without queries.
        forward_equivalents: Of a sample and step: the queries, and what the gradient costs after them.
    """

    name: str
    queries: float
    query_cost: float | None
    forward_equivalents: float


@dataclass(frozen=True)
class Measured:
    """What was seen of a few steps.

    Attributes:
        cost: Of a step.
        sites: The same by site.
        epoch: One epoch of one process.
        start_seconds: Time before the first step.
        epoch_seconds: Time between two epochs; 0 where the measurement did not get that far.
        validation_batches: Batches of a validation; None if unknown.
        validation_seconds: Time of one of them.
        peak_memory: MiB that a step holds at its peak; None where the system does not tell.
        device: On which it ran.
        steps: How many were timed.
        seconds: Time of all of them.
    """

    cost: Cost
    sites: tuple[SiteShare, ...]
    epoch: Epoch
    start_seconds: float
    epoch_seconds: float
    validation_batches: int | None
    validation_seconds: float
    peak_memory: float | None
    device: torch.device
    steps: int
    seconds: float


def share(name: str, before: QueryMeter, after: QueryMeter, samples: int, query_cost: float | None) -> SiteShare:
    """What a site spent between two readings of the meter, by sample.

    Args:
        name: The site.
        before: The earlier reading.
        after: The later one.
        samples: Trained on in between.
        query_cost: Forward-equivalents of a query where they are counted; None: all that was spent is its queries'.
    """
    old, new = before.sites.get(name, SiteCount()), after.sites.get(name, SiteCount())
    queries, spent = new.queries - old.queries, new.forward_equivalents - old.forward_equivalents
    each = (spent / queries if query_cost is None else query_cost) if queries else None
    return SiteShare(name, queries / samples, each, spent / samples)


def query_costs(strategy: ForwardGradientStrategy, inputs: Tensor) -> dict[str, float]:
    """Forward-equivalents of a query by site, for strategies that count them apart from those of the gradient."""
    if not isinstance(strategy, QueryStrategy):
        return {}
    counted = site_costs(strategy.network, strategy.sites, inputs)
    return {name: cost * strategy.passes_per_query for name, cost in counted.query.items()}
