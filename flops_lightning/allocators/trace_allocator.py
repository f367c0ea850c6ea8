"""Bases of the allocators that use traces: what they share of settings, state and diagnostics."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from flops_lightning.allocators.base import QueryAllocator, check_unused, one_thread
from flops_lightning.allocators.gaussian_search import Optimum
from flops_lightning.allocators.inclusion import least_expected
from flops_lightning.allocators.objective import equal_objective, objective
from flops_lightning.allocators.shared_lines import (
    budget_of,
    observation_of,
    split_lines,
    statistics_of,
    with_shared_lines,
)
from flops_lightning.allocators.trace_estimator import TraceEstimate, TraceEstimator, TraceSettings, mean_over_sites
from flops_lightning.errors import SettingError, check_at_least
from flops_lightning.protocol import Allocation, QueryBudget, SampleStatistics, TraceObservation

DRAWS = 32
MAX_ITERATIONS = 100


class TraceAllocator(QueryAllocator):
    """Base of the allocators that use the traces of a :class:`TraceEstimator`."""

    default_traces: ClassVar[TraceSettings] = TraceSettings()
    least_min_queries: ClassVar[int] = 1

    def __init__(self, *, traces: TraceSettings | None = None, min_queries: float = 1) -> None:
        """Check the settings.

        Args:
            traces: Where the traces come from.
            min_queries: Minimum number of queries per sample, rounded up to a multiple of the budget's ``multiple``. A
                fraction below 1: the minimum expected number; samples that expect less than one query are drawn at
                random and weighted by their inverse probability (Horvitz and Thompson, 1952). If a budget chosen at
                every step is too small for it, it is a quarter of the average.
        """
        if not 0 < min_queries < 1:
            check_at_least("min_queries", min_queries, self.least_min_queries)
            if min_queries != int(min_queries):
                raise SettingError("min_queries", min_queries, "is between two numbers of queries.", "Write an int.")
            min_queries = int(min_queries)
        self.traces, self.min_queries = traces, min_queries
        self._places: tuple[int, ...] = ()  # of the sites that were split last, if not all
        self._traces = TraceEstimator(traces or self.default_traces)

    @property
    def requests(self) -> frozenset[str]:
        """The trace estimator's."""
        return self._traces.requests

    @property
    def learns(self) -> bool:
        """Whether the trace estimator fits a regression."""
        return self._traces.learns

    def observe(self, observation: TraceObservation) -> None:
        """Add the observation to the regression's data."""
        self._traces.observe(observation_of(observation, self._places) if self._places else observation)

    @one_thread()
    def allocate(self, statistics: SampleStatistics, budget: QueryBudget) -> Allocation:
        """Estimate the traces and split each site's budget; sites that all samples share keep theirs."""
        places = split_lines(budget)
        if len(places) == len(budget.queries_per_sample):
            self._places = ()
            return self._split(statistics, budget)
        self._places, statistics = tuple(places), statistics.on_cpu()
        part = (statistics_of(statistics, places), budget_of(budget, places)) if places else None
        return with_shared_lines(self._split(*part) if part else None, places, statistics, budget)

    def _split(self, statistics: SampleStatistics, budget: QueryBudget) -> Allocation:
        """The allocation at sites where samples can have different numbers of queries."""
        raise NotImplementedError(f"{type(self).__name__} splits no budget: {budget} for {len(statistics.loss)}.")

    def state_dict(self) -> dict[str, Any]:
        """What the trace estimator remembers, and the batches drawn."""
        return super().state_dict() | self._traces.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._traces.load_state_dict(state)

    def _least(self, statistics: SampleStatistics, budget: QueryBudget) -> list[float]:
        """Least expected queries of a sample at each site."""
        return least_expected(budget, len(statistics.loss), self.min_queries)

    def _check_drawn(self, inclusion: Tensor | None, pilot_weight: Tensor | None) -> None:
        if inclusion is not None and pilot_weight is not None:
            problem = "leaves samples without queries, and reused pilots would speak for these alone."
            remedy = (
                "Write 1 or more queries for every sample, pilots: {reuse: false}, or traces: {source: prediction}."
            )
            raise SettingError("min_queries", self.min_queries, problem, remedy)


class SearchAllocator(TraceAllocator):
    """Base of the paper's allocators, which optimise the parameters of a distribution on every batch (section 4).

    With several sites, a sample's trace is the mean over the sites, each in units of its own mean over the batch.

    Diagnostics: ``iterations``, ``converged`` (0 or 1), ``not_converged_total`` (batches so far), ``J_over_J_equal``
    (of the counts at the first site, with the traces given).
    """

    default_traces = TraceSettings(source="pilots")

    def __init__(
        self, *, draws: int = DRAWS, max_iterations: int = MAX_ITERATIONS, seed: int = 0, **settings: Any
    ) -> None:
        """Check the settings.

        Args:
            draws: Draws K over which J and its gradient are averaged.
            max_iterations: Gradient steps after which the optimisation on a batch counts as not converged.
            seed: Seed of the draws. Those of a batch depend on it and on the number of batches so far.
            **settings: ``traces`` (None: pilots, as in the paper) and ``min_queries``.
        """
        super().__init__(**settings)
        check_at_least("draws", draws, 2)
        check_at_least("max_iterations", max_iterations, 1)
        check_at_least("seed", seed, 0)
        self.draws, self.max_iterations, self.seed = draws, max_iterations, seed
        self._batches = self._not_converged = 0

    def _check_no_search(self, because: str) -> None:
        for name, default in (("draws", DRAWS), ("max_iterations", MAX_ITERATIONS)):
            check_unused(name, getattr(self, name), default, because)

    def state_dict(self) -> dict[str, Any]:
        """The traces, and the numbers of batches and of those not converged."""
        return {"traces": super().state_dict(), "batches": self._batches, "not_converged": self._not_converged}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if "traces" in state:  # checkpoints of the first versions have none
            super().load_state_dict(state["traces"])
        self._batches, self._not_converged = int(state["batches"]), int(state["not_converged"])

    def _generator(self) -> torch.Generator:
        """The random numbers of the next batch."""
        seed = int(np.random.SeedSequence((self.seed, self._batches)).generate_state(1)[0])
        self._batches += 1
        return torch.Generator().manual_seed(seed)

    def _usable_traces(self, statistics: SampleStatistics, budget: QueryBudget) -> tuple[Tensor, Tensor]:
        """``(b,)`` whether a sample's statistics are finite, and ``(b,)`` traces over their maximum, 0 if not."""
        # J does not depend on their scale, and squares and sums of the largest must not overflow.
        estimate = self._traces.estimate(statistics, sites=len(budget.queries_per_sample), unit=budget.multiple)
        usable, trace = estimate.usable, mean_over_sites(estimate.trace)
        if statistics.embedding is not None:
            usable = usable & statistics.embedding.isfinite().all(dim=1)
        trace = torch.where(usable, trace, 0.0)
        return usable, trace / trace.max().clamp_min(torch.finfo(torch.float64).tiny)

    def _search_diagnostics(self, trace: Tensor, counts: Tensor, optimum: Optimum | None) -> dict[str, float]:
        return {
            "iterations": float(optimum.iterations if optimum else 0),
            "converged": float(optimum is None or optimum.converged),
            "not_converged_total": float(self._not_converged),
            "J_over_J_equal": over_equal(trace, counts) if bool((trace > 0).any()) else 1.0,
        }


def over_equal(trace: Tensor, counts: Tensor) -> float:
    """J of ``(b,)`` counts over J of equal counts with the same sum."""
    return float(objective(trace, counts) / equal_objective(trace, float(counts.sum())))


def count_diagnostics(counts: Tensor, estimate: TraceEstimate | None = None) -> dict[str, float]:
    """Fewest and most queries of a sample and, with predicted traces, the mean weight of the prediction."""
    values = {"count_min": float(counts.min()), "count_max": float(counts.max())}
    if estimate is not None and estimate.prediction is not None:
        values["prior_strength"] = float(estimate.prior_strength.mean())
    return values
