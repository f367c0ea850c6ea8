"""Sites where a query is made once for the whole batch: all samples have the same number, and nothing is split.

Their lines keep the module's own budget (:attr:`QueryBudget.shared`); an allocator sees the other lines alone.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flops_lightning.protocol import PER_SITE, Allocation, QueryBudget, SampleStatistics, TraceObservation


def split_lines(budget: QueryBudget) -> list[int]:
    """Places of the sites whose queries can differ from sample to sample."""
    return [i for i, each in enumerate(budget.shared_sites) if not each]


def budget_of(budget: QueryBudget, places: Sequence[int]) -> QueryBudget:
    """The budget of some sites."""
    own, names = budget.queries_per_sample, budget.site_names
    return replace(
        budget, queries_per_sample=tuple(own[i] for i in places), sites=tuple(names[i] for i in places), shared=()
    )


def statistics_of(statistics: SampleStatistics, places: Sequence[int]) -> SampleStatistics:
    """The statistics of some sites."""
    lines, found = list(places), dict[str, Tensor]()
    for name, value in statistics.tensors().items():
        of_sites = name in PER_SITE or (value.ndim == 2 and name != "embedding")
        found[name] = value[lines] if of_sites else value
    return statistics.with_tensors(found)


def observation_of(observation: TraceObservation, places: Sequence[int]) -> TraceObservation:
    """The observation at some sites."""
    lines = list(places)
    return replace(observation, trace=observation.trace[lines], queries=observation.queries[lines])


def with_shared_lines(
    found: Allocation | None, places: Sequence[int], statistics: SampleStatistics, budget: QueryBudget
) -> Allocation:
    """The allocation ``found`` for the sites at ``places``, with the budgets of the others; None: there are only these.

    Pilots that are reused there keep their share of the budget.
    """
    shape = (len(budget.queries_per_sample), len(statistics.loss))
    own = torch.tensor(budget.queries_per_sample, dtype=torch.float64)[:, None].expand(shape)
    counts = _filled(own.long(), places, None if found is None else found.counts)
    if found is None:
        return Allocation(counts)
    weight = found.pilot_weight
    if weight is not None:
        pilots = statistics.trace_queries
        spent = torch.zeros(shape) if pilots is None else pilots.expand(shape)
        weight = _filled((spent / (spent + own)).to(weight), places, weight)
    return replace(
        found,
        counts=counts,
        pilot_weight=weight,
        most=None if found.most is None else _filled(own[:, 0].long(), places, found.most),
        inclusion=None if found.inclusion is None else _filled(torch.ones_like(own), places, found.inclusion),
        expected=None if found.expected is None else _filled(own, places, found.expected.double()),
    )


def _filled(table: Tensor, places: Sequence[int], lines: Tensor | None) -> Tensor:
    """A copy of ``table`` with these lines at some places."""
    return table.clone() if lines is None else table.index_copy(0, torch.tensor(list(places)), lines.to(table))
