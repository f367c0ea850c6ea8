"""The allocation of the Bernoulli allocator, its J as a function of p, and minimising it for one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from flops_lightning.allocators.gaussian_optimisation import PATIENCE, TOLERANCE
from flops_lightning.allocators.objective import objective

LEAST_P = 0.01
"""An optimised p stays between this and one minus this: at 0 and 1 the score does not exist."""
LEARNING_RATE = 0.5
"""Step of Adam in ``logit(p)``; the whole range of p is 9.2 wide, and from 0.5 to either end are 10 steps."""


@dataclass(frozen=True)
class PruningProblem:
    """One batch, as the optimisation of p sees it.

    Attributes:
        below: ``(b,)`` bool, whose loss is below the mean; not all of them.
        trace: ``(b,)`` float64 nonnegative traces; their scale does not matter.
        total: Queries of the batch.
        floor: Least queries of a sample.
    """

    below: Tensor
    trace: Tensor
    total: float
    floor: float


class Optimum(NamedTuple):
    """Where the optimisation of p ended, after how many gradient steps, and whether J had stopped changing."""

    p: float
    iterations: int
    converged: bool


def below_mean(loss: Tensor) -> Tensor:
    """``(b,)`` whether each of ``(b,)`` finite losses is below their mean: never all, and none if they are equal."""
    if not len(loss):
        return torch.zeros(0, dtype=torch.bool)
    # Divided first, so that the sum cannot overflow; a mean of equal losses may be rounded to above them.
    return loss < (loss / len(loss)).sum().clamp(max=loss.max())


def pruned_allocation(pruned: Tensor, total: float, *, floor: float) -> Tensor:
    """Half the average for the pruned samples, and what this frees in equal parts for the others.

    Args:
        pruned: ``(..., b)`` bool, in each line not all of them.
        total: Sum of each allocation, in queries.
        floor: Least part of a sample, in queries, at most the average.

    Returns:
        ``(..., b)`` float64 allocations.
    """
    low = max(total / pruned.shape[-1] / 2, floor)
    number = pruned.sum(dim=-1, keepdim=True).double()
    return torch.where(pruned, low, (total - low * number) / (pruned.shape[-1] - number))


def draw_objective(problem: PruningProblem, p: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """J of each draw, and how many samples it prunes.

    Args:
        problem: The batch.
        p: Probability with which a sample of below-mean loss is pruned.
        uniform: ``(k, b)`` standard uniform numbers.

    Returns:
        ``(k,)`` float64 J and ``(k,)`` float64 numbers of pruned samples.
    """
    pruned = problem.below & (uniform < p)
    counts = pruned_allocation(pruned, problem.total, floor=problem.floor)
    return objective(problem.trace, counts), pruned.sum(dim=1).double()


def score_gradient(problem: PruningProblem, p: float, uniform: Tensor) -> float:
    """Likelihood-ratio estimate of ``dJ / d logit(p)`` (eq. 11), unbiased.

    The score of a draw is ``m - n p``, with ``m`` of the ``n`` samples below the mean pruned. Each draw's J is compared
    with the mean J of the other draws (leave-one-out baseline), which leaves the expectation as it is.

    Args:
        problem: The batch.
        p: Probability with which a sample of below-mean loss is pruned, neither 0 nor 1.
        uniform: ``(k, b)`` standard uniform numbers, ``k >= 2``.
    """
    value, number = draw_objective(problem, p, uniform)
    advantage = (value - value.mean()) * len(value) / (len(value) - 1)
    return float((advantage * (number - int(problem.below.sum()) * p)).mean())


def optimise_p(
    problem: PruningProblem,
    starts: Sequence[float],
    *,
    draws: int,
    max_iterations: int,
    generator: torch.Generator,
) -> Optimum:
    """Adam on ``logit(p)`` until J changes by less than 1 % over 5 iterations.

    J is monitored with the same random numbers throughout (common random numbers), so that a change of J is a change of
    p. The best p met is returned, hence this J never ends above where it began. The gradient needs new draws at every
    iteration: with fixed ones its error would never average out.

    Args:
        problem: The batch.
        starts: Values of p, of which the one with the least J is begun with.
        draws: Draws K over which J and its gradient are averaged.
        max_iterations: Gradient steps after which to give up.
        generator: Source of the draws.
    """
    shape = (draws, len(problem.below))
    common = torch.rand(shape, dtype=torch.float64, generator=generator)

    def average(p: float) -> float:
        return float(draw_objective(problem, p, common)[0].mean())

    best = min(starts, key=average)
    bound = math.log(1.0 / LEAST_P - 1.0)
    coordinate = torch.tensor(best, dtype=torch.float64).logit()
    optimizer = torch.optim.Adam([coordinate], lr=LEARNING_RATE)
    p, best_value, values = best, math.inf, list[float]()
    for iteration in range(max_iterations + 1):
        values.append(average(p))
        if values[-1] < best_value:
            best, best_value = p, values[-1]
        if iteration >= PATIENCE and abs(values[-1] - values[-1 - PATIENCE]) < TOLERANCE * values[-1 - PATIENCE]:
            return Optimum(best, iteration, converged=True)
        fresh = torch.rand(shape, dtype=torch.float64, generator=generator)
        coordinate.grad = torch.tensor(score_gradient(problem, p, fresh), dtype=torch.float64)
        optimizer.step()
        coordinate.clamp_(-bound, bound)
        p = float(coordinate.sigmoid())
    return Optimum(best, max_iterations, converged=False)
