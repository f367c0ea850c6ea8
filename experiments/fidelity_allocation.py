"""What allocators spend at one matrix, and the variance that is left, from exact traces."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.allocation import Case
from experiments.allocation_scores import HeldOut
from experiments.components import BatchGradients, Component
from experiments.predicted_cosine import RowGradients, likelihood_ratio_traces, shared_objective, spsa_traces
from flops_lightning import allocators
from flops_lightning.allocators import QueryAllocator, QueryBudget, SampleStatistics, TraceSettings
from flops_lightning.allocators.objective import objective, optimal_shares
from flops_lightning.allocators.rounding import largest_remainder

CASES = {
    case.name: case
    for case in (
        Case("equal", allocators.EqualAllocator),
        Case("gaussian", allocators.GaussianAllocator, "lowest"),
        Case("bernoulli", allocators.BernoulliAllocator, "lowest"),
        Case("optimal", partial(allocators.OptimalAllocator, traces=TraceSettings("pilots")), "lowest"),
    )
}
EXACT = "exact"
ALLOCATORS = (*CASES, EXACT)
FACTORED_RANK = 1  # the strategy's default


@dataclass(frozen=True)
class Spent:
    """What an allocator makes of a budget on one batch of ``samples``."""

    allocator: str
    budget: int
    samples: int
    objective: float  # J, sum_b Tr_b / A_b, in squared units of the rows
    equal: float  # that of equal counts
    gradient: float  # squared norm of the sum of the samples' gradients


class Allocators:
    """Allocators for each matrix, estimator and budget, which keep what they learn from batch to batch."""

    def __init__(self, names: Sequence[str], *, seed: int) -> None:
        self.names, self.seed = [name for name in ALLOCATORS if name in names and name != "equal"], seed
        self._made: dict[Any, QueryAllocator] = {}

    def spend(
        self, component: Component, batch: BatchGradients, gradients: RowGradients, estimator: str,
        budgets: Sequence[int], rng: np.random.Generator,
    ) -> Iterator[Spent]:  # fmt: skip
        """Equal counts first, then the others; those whose pilots a budget cannot pay for are left out."""
        unit, size = 1 if estimator == "lr" else 2, len(batch.loss)
        if estimator == "spsa":
            for budget in budgets:
                j = float(shared_objective(gradients, budget / 2))
                yield Spent("equal", budget, size, j, j, float(gradients.batch.rows))
            return
        traces = likelihood_ratio_traces(gradients) if unit == 1 else spsa_traces(gradients, rank=FACTORED_RANK)
        held = HeldOut(traces[None], torch.full((1, size), math.inf), torch.ones(1, dtype=torch.float64))
        for budget in budgets:
            equal = float(held.equal(budget))
            yield Spent("equal", budget, size, equal, equal, float(gradients.batch.rows))
            for name in self.names:
                if name == EXACT:
                    counts = largest_remainder(optimal_shares(traces), budget * size, minimum=unit, multiple=unit)
                    j = float(objective(traces, counts))
                elif pilots := CASES[name].pilot_queries(budget, multiple=unit, minimum=0):
                    seen = traces * torch.from_numpy(rng.chisquare(pilots // unit, size) / (pilots // unit))
                    allocator = self._allocator((component, estimator, budget, name))
                    j = _with_pilots(allocator, batch, held, seen, pilots, budget, unit)
                else:
                    continue
                yield Spent(name, budget, size, j, equal, float(gradients.batch.rows))

    def _allocator(self, key: tuple[Component, str, int, str]) -> QueryAllocator:
        if key not in self._made:
            self._made[key] = CASES[key[-1]].make()
        return self._made[key]


def _with_pilots(
    allocator: QueryAllocator, batch: BatchGradients, held: HeldOut, seen: Tensor, pilots: int, budget: int, unit: int
) -> float:
    """J of an allocator that sees the traces of pilots, which are reused."""
    spent = torch.full((1, len(seen)), float(pilots))
    statistics = SampleStatistics(loss=batch.loss, embedding=batch.embedding, trace=seen[None], trace_queries=spent)
    found = allocator.allocate(statistics, QueryBudget((budget - pilots,), multiple=unit))
    return float(held.of_counts(found.counts, spent, found.pilot_weight, budget)[0])
