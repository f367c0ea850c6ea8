"""The Bernoulli allocator of FLOPS (Ren et al., ICLR 2025, sections 4.1 and 4.2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flops_lightning.allocators.base import check_unused
from flops_lightning.allocators.gaussian_search import Optimum, minimise
from flops_lightning.allocators.objective import objective
from flops_lightning.allocators.trace_allocator import SearchAllocator, count_diagnostics
from flops_lightning.errors import SettingError
from flops_lightning.protocol import Allocation, QueryBudget, SampleStatistics

LEAST_P = 0.01  # an optimised p stays between this and one minus this: at 0 and 1 the score does not exist
LEARNING_RATE = 0.5  # step of Adam in logit(p); the whole range of p is 9.2 wide, and from 0.5 to an end are 10 steps


class BernoulliAllocator(SearchAllocator):
    """Halves the queries of randomly chosen samples with low loss, and gives them to the others.

    A sample whose clean loss is below the batch's mean is pruned with probability p: it gets ``Abar / 2`` queries
    instead of ``Abar`` (eq. 6), or ``min_queries`` if that is more. The freed queries go in equal parts to the samples
    that were not pruned: with ``m`` of ``B`` pruned these get ``Abar + m Abar / (2 (B - m))``. The paper's text instead
    normalises the relative counts, ``A_b / sum A`` (section 4.1), which returns part of the freed queries to the pruned
    samples: the ratio stays at 2 where it is ``2 + m / (B - m)`` here.

    With ``optimise``, p minimises ``J = E sum_b Tr_b / A_b`` (eq. 9) on every batch before it is used, starting from
    the last batch's p or the given one, whichever is better. J is monotone in p, so p runs towards 0.99 if the mean
    trace of the samples of below-mean loss is less than half that of the batch (or ``min_queries / Abar`` of it, if
    that is more), else towards 0.01. With several sites the first decides; all prune the same samples.

    Samples whose loss (with ``optimise``: or trace) is not finite get the minimum; the others are allocated as a batch
    of their own. If no loss is below the mean or, with ``optimise``, no trace is positive, the allocation is equal and
    p stays as it was.

    Diagnostics: ``p``; ``pruned`` (share of the batch); ``count_min``, ``count_max``. With ``optimise`` also those of
    :class:`SearchAllocator`.

    Example:
        >>> statistics = SampleStatistics(loss=torch.tensor([0.1, 0.2, 5.0]))
        >>> allocator = BernoulliAllocator(p=1.0, optimise=False)  # prunes every sample of below-mean loss
        >>> allocator.allocate(statistics, QueryBudget((8,))).counts
        tensor([[ 4,  4, 16]])
    """

    def __init__(self, *, p: float = 0.5, optimise: bool = True, **settings: Any) -> None:
        """Check the settings.

        Args:
            p: Probability that a sample with a loss below the mean is pruned; with ``optimise`` the initial value.
            optimise: Optimise p on every batch. Otherwise p is fixed, and only the loss is needed.
            **settings: See :class:`SearchAllocator`; without ``optimise`` only ``min_queries`` and ``seed``.
        """
        super().__init__(**settings)
        least_p, most_p = (LEAST_P, 1.0 - LEAST_P) if optimise else (0.0, 1.0)
        if not least_p <= p <= most_p:
            raise SettingError(
                "p", p, f"must lie between {least_p:g} and {most_p:g}" + (" to be optimised." if optimise else "."),
                "Write, for example, 0.5" + (", or optimise: false." if optimise and 0 <= p <= 1 else "."),
            )  # fmt: skip
        if not optimise:
            check_unused("traces", self.traces, None, "optimise = False")
            self._check_no_search("optimise = False")
        self.p, self.optimise = p, optimise
        self._last_p = p

    @property
    def requests(self) -> frozenset[str]:
        """The trace estimator's, if p is optimised."""
        return super().requests if self.optimise else frozenset()

    @property
    def learns(self) -> bool:
        """Whether p is optimised with traces from a regression."""
        return self.optimise and super().learns

    def state_dict(self) -> dict[str, Any]:
        """The last batch's p, and the state of the search."""
        return super().state_dict() | {"p": self._last_p}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; p only if it is optimised."""
        super().load_state_dict(state)
        if self.optimise:  # a fixed p may have been out of the bounds of the optimisation
            self._last_p = min(max(float(state["p"]), LEAST_P), 1.0 - LEAST_P)

    def _split(self, statistics: SampleStatistics, budget: QueryBudget) -> Allocation:
        """Optimise p on this batch (unless it is fixed) and draw the allocation."""
        minima, totals = self._least(statistics, budget), budget.totals(len(statistics.loss))
        trace: Tensor | None = None
        if self.optimise:
            statistics = replace(statistics, embedding=None).on_cpu()
            usable, trace = self._usable_traces(statistics, budget)
        else:
            statistics = SampleStatistics(loss=statistics.loss).on_cpu()
            usable = statistics.loss.isfinite()
        batch_size, lost = len(usable), int((~usable).sum())
        left = [total - least * lost for total, least in zip(totals, minima, strict=True)]
        of_usable = None if trace is None else trace[usable]
        pruned, optimum = self._draw(statistics.loss[usable], of_usable, left[0], minima[0])
        shares = torch.zeros(len(totals), batch_size, dtype=torch.float64)
        if len(pruned):
            lines = zip(left, minima, strict=True)
            shares[:, usable] = torch.stack([pruned_allocation(pruned, n, floor=least) for n, least in lines])
        counts, inclusion, expected = self._inclusion.split(shares, budget, minima)
        values = {"p": self._last_p, "pruned": int(pruned.sum()) / batch_size} | count_diagnostics(counts)
        if trace is not None:
            values |= self._search_diagnostics(trace, expected[0], optimum)
        return Allocation(counts, values, inclusion=inclusion, expected=expected)

    def _draw(self, loss: Tensor, trace: Tensor | None, total: float, least: float) -> tuple[Tensor, Optimum | None]:
        """Which usable samples are pruned, and the optimum of p for the first site's total, if it is optimised."""
        generator = self._generator()
        below, optimum = below_mean(loss), None
        uniform = torch.rand(len(loss), dtype=torch.float64, generator=generator)
        if trace is not None:
            if not bool(below.any()) or not bool((trace > 0).any()):
                return torch.zeros_like(below), None
            starts = list(dict.fromkeys((self._last_p, self.p)))
            optimum = optimise_p(
                PruningProblem(below, trace, total, least), starts, draws=self.draws,
                max_iterations=self.max_iterations, generator=generator,
            )  # fmt: skip
            self._not_converged += not optimum.converged
            self._last_p = float(optimum.place)
        return below & (uniform < self._last_p), optimum


@dataclass(frozen=True)
class PruningProblem:
    """One batch, as the optimisation of p sees it."""

    below: Tensor  # (b,) bool, whether a loss is below the mean; not true of all
    trace: Tensor  # (b,) float64, nonnegative; its scale does not matter
    total: float  # queries of the batch
    floor: float  # least queries of a sample


def below_mean(loss: Tensor) -> Tensor:
    """``(b,)`` whether each of ``(b,)`` finite losses is below their mean: never all, and none if they are equal."""
    if not len(loss):
        return torch.zeros(0, dtype=torch.bool)
    # Divided first, so that the sum cannot overflow; a mean of equal losses may be rounded to above them.
    return loss < (loss / len(loss)).sum().clamp(max=loss.max())


def pruned_allocation(pruned: Tensor, total: float, *, floor: float) -> Tensor:
    """Half the average for the pruned samples, and what this frees in equal parts for the others (eq. 6).

    ``pruned`` is ``(..., b)``, in no row true of all; the sum of each allocation is ``total``, and ``floor``, at most
    the average, the least part of a sample, all in queries. Returns ``(..., b)`` float64 allocations.
    """
    low = max(total / pruned.shape[-1] / 2, floor)
    number = pruned.sum(dim=-1, keepdim=True).double()
    return torch.where(pruned, low, (total - low * number) / (pruned.shape[-1] - number))


def draw_objective(problem: PruningProblem, p: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """``(k,)`` float64 J of each draw and number of samples it prunes, from ``(k, b)`` standard uniform numbers."""
    pruned = problem.below & (uniform < p)
    counts = pruned_allocation(pruned, problem.total, floor=problem.floor)
    return objective(problem.trace, counts), pruned.sum(dim=1).double()


def score_gradient(problem: PruningProblem, p: float, uniform: Tensor) -> float:
    """Likelihood-ratio estimate of ``dJ / d logit(p)`` (eq. 11), unbiased.

    The score of a draw is ``m - n p``, with ``m`` of the ``n`` samples below the mean pruned. Each draw's J is compared
    with the mean J of the others (leave-one-out baseline), which does not change the expectation. ``uniform`` is
    ``(k, b)``, ``k >= 2``.
    """
    value, number = draw_objective(problem, p, uniform)
    advantage = (value - value.mean()) * len(value) / (len(value) - 1)
    return float((advantage * (number - int(problem.below.sum()) * p)).mean())


def optimise_p(
    problem: PruningProblem, starts: Sequence[float], *, draws: int, max_iterations: int, generator: torch.Generator
) -> Optimum:
    """Minimise J over ``logit(p)`` from the best of ``starts``; the optimum's place is p.

    J is monitored with common random numbers; the gradient needs new draws at every iteration.
    """
    shape = (draws, len(problem.below))
    common = torch.rand(shape, dtype=torch.float64, generator=generator)

    def average(p: float) -> Tensor:
        return draw_objective(problem, p, common)[0].mean()

    def evaluate(logit: Tensor) -> tuple[Tensor, Tensor]:
        p = float(logit.sigmoid())
        fresh = torch.rand(shape, dtype=torch.float64, generator=generator)
        return average(p), torch.tensor(score_gradient(problem, p, fresh), dtype=torch.float64)

    start = torch.tensor(min(starts, key=average), dtype=torch.float64).logit()
    bound = torch.tensor(1.0 - LEAST_P, dtype=torch.float64).logit()
    optimum = minimise(
        evaluate, start, learning_rate=LEARNING_RATE, low=-bound, high=bound, max_iterations=max_iterations
    )
    return replace(optimum, place=optimum.place.sigmoid())
