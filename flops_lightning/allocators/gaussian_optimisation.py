"""Minimising J over the coordinates of the Gaussian allocator, for one batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flops_lightning.allocators.gaussian_objective import (
    AllocationProblem,
    draw_objective,
    make_draws,
    mean_draw,
    pathwise_gradient,
    score_gradient,
)

SIGMA_FLOOR = 0.01
"""Least sigma, relative to the root mean square of mu: the optimum is at 0, where the score does not exist."""
GAMMA_LIMIT = 10.0
"""Gamma stays between ``1 / GAMMA_LIMIT`` and ``GAMMA_LIMIT``."""
LEARNING_RATE = 0.1
"""Step of Adam in the coordinates: radians, and e-foldings of sigma and gamma."""
PATIENCE = 5
"""Iterations over which J is compared."""
TOLERANCE = 0.01
"""Relative change of J over ``PATIENCE`` iterations below which it has converged."""


@dataclass(frozen=True)
class Optimum:
    """Where the optimisation ended.

    Attributes:
        coordinates: ``(3,)`` float64 ``angle, ln(sigma), ln(gamma)``.
        iterations: Gradient steps taken.
        converged: Whether J had stopped changing.
    """

    coordinates: Tensor
    iterations: int
    converged: bool


def descend(
    problem: AllocationProblem,
    starts: Sequence[Tensor],
    *,
    gradient: Literal["pathwise", "score"],
    draws: int,
    max_iterations: int,
    generator: torch.Generator,
) -> Optimum:
    """Adam on the coordinates until J changes by less than 1 % over 5 iterations.

    J is monitored with the same random numbers throughout (common random numbers), so that a change of J is a change of
    the coordinates. The best coordinates met are returned, hence this J never ends above where it began. The score
    gradient itself needs new draws at every iteration: with fixed ones its error would never average out.

    Args:
        problem: The batch.
        starts: ``(3,)`` coordinates, of which the one with the least J is begun with. One whose mean is nowhere
            positive comes last: its allocation is the equal one, on a plateau without gradient.
        gradient: Which estimate of the gradient to follow.
        draws: Draws K over which J and its gradient are averaged.
        max_iterations: Gradient steps after which to give up.
        generator: Source of the draws.
    """
    shape = (draws, len(problem.feature))
    common = torch.randn(shape, dtype=torch.float64, generator=generator)

    def rank(start: Tensor) -> tuple[bool, float]:
        return float(mean_draw(problem, start[0]).max()) <= 0.0, average_objective(problem, start, common)

    best = min(starts, key=rank)
    coordinates, best_value, values = best.clone(), math.inf, list[float]()
    optimizer = torch.optim.Adam([coordinates], lr=LEARNING_RATE)
    for iteration in range(max_iterations + 1):
        correlation = problem.correlation(coordinates)
        if gradient == "pathwise":
            value, coordinates.grad = pathwise_gradient(problem, coordinates, correlation, common)
        else:
            fresh = torch.randn(shape, dtype=torch.float64, generator=generator)
            value = draw_objective(problem, make_draws(problem, coordinates, correlation, common)).mean()
            coordinates.grad = score_gradient(problem, coordinates, correlation, fresh)[1]
        values.append(float(value))
        if values[-1] < best_value:
            best, best_value = coordinates.clone(), values[-1]
        if iteration >= PATIENCE and abs(values[-1] - values[-1 - PATIENCE]) < TOLERANCE * values[-1 - PATIENCE]:
            return Optimum(best, iteration, converged=True)
        optimizer.step()
        coordinates[1].clamp_(min=math.log(SIGMA_FLOOR))
        coordinates[2].clamp_(-math.log(GAMMA_LIMIT), math.log(GAMMA_LIMIT))
    return Optimum(best, max_iterations, converged=False)


def average_objective(problem: AllocationProblem, coordinates: Tensor, normal: Tensor) -> float:
    """J averaged over the draws made of ``(k, b)`` standard normal numbers."""
    draws = make_draws(problem, coordinates, problem.correlation(coordinates), normal)
    return float(draw_objective(problem, draws).mean())


def search(problem: AllocationProblem, log_gamma: float) -> Optimum:
    """Best angle of the deterministic allocation, by nested grids, with sigma at its floor.

    By Jensen's inequality J is least without randomness, so this is where the gradients run to. The grids resolve the
    angle to ``pi / 16384``; the first of them covers the circle, for J may have several minima on it.

    Args:
        problem: The batch.
        log_gamma: ``ln(gamma)``, which J does not depend on here and which stays.
    """
    centre, width = 0.0, math.pi
    for points in (129, 33, 33):
        angles = centre + width * torch.linspace(-1.0, 1.0, points, dtype=torch.float64)
        values = draw_objective(problem, mean_draw(problem, angles))
        best = int(values.argmin())
        # Ties (equal losses or traces) go to the centre, which at first is the equal allocation.
        if values[best] < values[points // 2] * (1.0 - 1e-12):
            centre = float(angles[best])
        width *= 2.0 / (points - 1)
    return Optimum(torch.tensor([centre, math.log(SIGMA_FLOOR), log_gamma], dtype=torch.float64), 0, converged=True)
