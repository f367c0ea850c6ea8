"""The Bernoulli allocator of FLOPS (Ren et al., ICLR 2025, sections 4.1 and 4.2)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flops_lightning.allocators.base import QueryAllocator, batch_generator
from flops_lightning.allocators.bernoulli_optimisation import (
    LEAST_P,
    Optimum,
    PruningProblem,
    below_mean,
    optimise_p,
    pruned_allocation,
)
from flops_lightning.allocators.objective import equal_objective, objective
from flops_lightning.allocators.rounding import check_budget, next_multiple, round_at_sites
from flops_lightning.allocators.threads import one_thread
from flops_lightning.allocators.trace_estimator import TraceEstimator, TraceSettings
from flops_lightning.errors import SettingError
from flops_lightning.protocol import Allocation, QueryBudget, SampleStatistics, TraceObservation

DRAWS = 32
MAX_ITERATIONS = 100


class BernoulliAllocator(QueryAllocator):
    """Takes half of their queries from randomly chosen samples of low loss and gives them to the others.

    A sample whose clean loss is below the batch's mean is pruned with probability p: it gets ``Abar / 2`` queries
    instead of ``Abar`` (eq. 6). The freed queries go in equal parts to the samples that were not pruned, so that with
    ``m`` of ``B`` pruned these get ``Abar + m Abar / (2 (B - m))``. The paper's text instead normalises the relative
    counts, ``A_b / sum A`` (section 4.1): each is then multiplied with ``2 B / (2 B - m)``, which gives a part of the
    freed queries back to the pruned and keeps the ratio at 2, where here it is ``2 + m / (B - m)``.

    With ``optimise``, p minimises ``J = E sum_b Tr_b / A_b`` (eq. 9) on every batch before it is used, from that of the
    last batch or the given one, whichever is better. J is monotone in p: ``E[J | m]`` falls with ``m`` where the mean
    trace of the samples of below-mean loss is less than half the mean trace of the batch (less than
    ``min_queries / Abar`` of it, where that exceeds a half), and rises where it is more. So p runs towards one of its
    bounds, 0.99 or 0.01, as far as this changes J noticeably; what is learned is the side of that threshold. Where
    sites have different budgets, the optimisation looks at the first; the same samples are pruned at every site, and
    the counts rounded by largest remainder for each.

    Samples whose loss is not finite (with ``optimise``: or whose trace) get the minimum, take no part in the mean loss
    and in the optimisation, and leave the others to be allocated as a batch of their own. If no loss is below the mean
    or, with ``optimise``, no trace is positive, the allocation is equal and p stays as it was.

    Diagnostics: ``p``; ``pruned`` (share of the batch); ``count_min``, ``count_max``. With ``optimise`` also
    ``iterations``, ``converged`` (0 or 1) and ``not_converged_total`` (so many batches so far), and ``J_over_J_equal``
    (of the integer counts of the first site, with the traces given).
    """

    def __init__(
        self,
        *,
        p: float = 0.5,
        optimise: bool = True,
        traces: TraceSettings | None = None,
        min_queries: int = 1,
        draws: int = DRAWS,
        max_iterations: int = MAX_ITERATIONS,
        seed: int = 0,
    ) -> None:
        """Choose p, or how it is optimised.

        Args:
            p: Probability with which a sample of below-mean loss is pruned; with ``optimise`` where p starts.
            optimise: Optimise p on every batch. Otherwise it stays, and nothing but the loss is needed.
            traces: Where the traces in J come from; None: from pilots, as in the paper. Where several sites have
                traces, a sample's is the mean over them, each in units of its own mean over the batch. Only with
                ``optimise``.
            min_queries: Least queries of a sample, raised to the next multiple of the budget's ``multiple``. Where it
                exceeds ``Abar / 2``, pruned samples get this.
            draws: Draws K over which J and its gradient are averaged. Only with ``optimise``.
            max_iterations: Gradient steps on a batch after which it counts as not converged. Only with ``optimise``.
            seed: Seed of the draws, at least 0. The draws of a batch depend on it and on the number of batches before.

        Raises:
            SettingError: A value is out of its range, or has no effect without ``optimise``.
        """
        least_p, most_p = (LEAST_P, 1.0 - LEAST_P) if optimise else (0.0, 1.0)
        if not least_p <= p <= most_p:
            raise SettingError(
                "p", p, f"must lie between {least_p:g} and {most_p:g}"
                + (" where it is optimised." if optimise else "."),
                "Write for example 0.5" + (", or optimise: false." if optimise and 0 <= p <= 1 else "."),
            )  # fmt: skip
        for name, number, least in (
            ("min_queries", min_queries, 1),
            ("draws", draws, 2),
            ("max_iterations", max_iterations, 1),
            ("seed", seed, 0),
        ):
            if number < least:
                raise SettingError(name, number, f"must be at least {least}.", f"Write {least} or more.")
        for name, value, default in (
            ("traces", traces, None),
            ("draws", draws, DRAWS),
            ("max_iterations", max_iterations, MAX_ITERATIONS),
        ):
            if not optimise and value != default:
                raise SettingError(name, value, "has no effect with optimise = False.", f"Remove `{name}`.")
        self.p, self.optimise, self.min_queries = p, optimise, min_queries
        self.draws, self.max_iterations, self.seed = draws, max_iterations, seed
        self._traces = TraceEstimator(traces or TraceSettings(source="pilots"))
        self._last_p = p
        self._batches = 0
        self._not_converged = 0

    @property
    def requests(self) -> frozenset[str]:
        """What the trace estimator reads, where p is optimised."""
        return self._traces.requests if self.optimise else frozenset()

    @property
    def learns(self) -> bool:
        """Whether the traces come from a regression."""
        return self.optimise and self._traces.learns

    def observe(self, observation: TraceObservation) -> None:
        """Teach the regression."""
        self._traces.observe(observation)

    def state_dict(self) -> dict[str, Any]:
        """The last batch's p, the counters of batches and of those not converged, and the traces."""
        return {
            "traces": self._traces.state_dict(),
            "p": self._last_p,
            "batches": self._batches,
            "not_converged": self._not_converged,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; p is restored only where it is optimised."""
        self._traces.load_state_dict(state["traces"])
        if self.optimise:  # a p that was given and is out of bounds cannot be optimised from
            self._last_p = min(max(float(state["p"]), LEAST_P), 1.0 - LEAST_P)
        self._batches, self._not_converged = int(state["batches"]), int(state["not_converged"])

    @one_thread()
    def allocate(self, statistics: SampleStatistics, budget: QueryBudget) -> Allocation:
        """Optimise p on this batch (if so set) and draw the allocation.

        Args:
            statistics: ``loss``, and what the traces come from if p is optimised.
            budget: Queries per sample at each site.

        Returns:
            ``(s, b)`` counts and the diagnostics listed above.

        Raises:
            SettingError: A statistic is missing, or the budget is too small for ``min_queries``.
        """
        self.check(statistics)
        batch_size = len(statistics.loss)
        totals = [queries * batch_size for queries in budget.queries_per_sample]
        minimum = max(self.min_queries, budget.minimum)
        for total in totals:
            check_budget(total, batch_size, minimum=minimum, multiple=budget.multiple)
        usable, loss, trace = self._usable(statistics, budget)
        least = next_multiple(minimum, budget.multiple)
        left = [total - least * int((~usable).sum()) for total in totals]
        pruned, optimum = self._draw(loss[usable], None if trace is None else trace[usable], left[0], least)
        shares = torch.zeros(len(totals), batch_size, dtype=torch.float64)
        if len(pruned):
            shares[:, usable] = torch.stack([pruned_allocation(pruned, queries, floor=least) for queries in left])
        counts = round_at_sites(shares, totals, minimum=minimum, multiple=budget.multiple)
        values = {
            "p": self._last_p,
            "pruned": int(pruned.sum()) / batch_size,
            "count_min": float(counts.min()),
            "count_max": float(counts.max()),
        }
        return Allocation(counts, values if trace is None else values | self._of_optimum(trace, counts[0], optimum))

    def _usable(self, statistics: SampleStatistics, budget: QueryBudget) -> tuple[Tensor, Tensor, Tensor | None]:
        # Which samples' statistics are finite, (b,) bool, the losses, and where p is optimised the traces over their
        # maximum, with those of the others at zero.
        if not self.optimise:
            loss = SampleStatistics(loss=statistics.loss).on_cpu().loss
            return loss.isfinite(), loss, None
        statistics = replace(statistics, embedding=None).on_cpu()
        sites = len(budget.queries_per_sample)
        estimate = self._traces.estimate(statistics, sites=sites, unit=budget.multiple)
        trace = torch.where(estimate.usable, estimate.combined(), 0.0)
        return estimate.usable, statistics.loss, trace / trace.max().clamp_min(torch.finfo(torch.float64).tiny)

    def _draw(self, loss: Tensor, trace: Tensor | None, total: float, floor: float) -> tuple[Tensor, Optimum | None]:
        # Which of the usable samples are pruned. `total` and `floor` are those of the first site.
        generator = batch_generator(self.seed, self._batches)
        self._batches += 1
        below, optimum = below_mean(loss), None
        uniform = torch.rand(len(loss), dtype=torch.float64, generator=generator)
        if trace is not None:
            if not bool(below.any()) or not bool((trace > 0).any()):
                return torch.zeros_like(below), None
            optimum = optimise_p(
                PruningProblem(below, trace, total, floor),
                list(dict.fromkeys((self._last_p, self.p))),
                draws=self.draws,
                max_iterations=self.max_iterations,
                generator=generator,
            )
            self._not_converged += not optimum.converged
            self._last_p = optimum.p
        return below & (uniform < self._last_p), optimum

    def _of_optimum(self, trace: Tensor, counts: Tensor, optimum: Optimum | None) -> dict[str, float]:
        equal = equal_objective(trace, int(counts.sum()))
        return {
            "iterations": float(optimum.iterations if optimum else 0),
            "converged": float(optimum.converged if optimum else True),
            "not_converged_total": float(self._not_converged),
            "J_over_J_equal": float(objective(trace, counts) / equal) if equal > 0 else 1.0,
        }
