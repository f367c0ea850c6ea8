"""J of the Gaussian allocator as a function of its parameters, and two unbiased estimates of its gradient.

The allocation is a draw ``D ~ N(mu, Sigma)`` turned into queries by water-filling (a common factor of the draw changes
nothing), so one of the four parameters is redundant. The scale is fixed by the root mean square of ``mu`` over the
batch: with ``z`` the feature ``tanh(loss)`` standardised over the batch,

    ``mu = Abar (cos(angle) + sin(angle) z)``,    ``Sigma = (Abar sigma)^2 C(gamma)``,

and the three coordinates are ``angle, ln(sigma), ln(gamma)``. Every ratio of ``beta0`` and ``beta1``, of either sign,
is one angle. All gradients are in closed form: nothing here needs autograd.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flops_lightning.allocators.correlation import CorrelationRoot, correlation_root
from flops_lightning.allocators.objective import objective
from flops_lightning.allocators.rounding import water_fill


@dataclass(frozen=True)
class AllocationProblem:
    """One batch, as the optimisation sees it.

    Attributes:
        feature: ``(b,)`` float64, ``tanh(loss)`` with mean 0 and variance 1 over the batch (all 0 if it is constant).
        trace: ``(b,)`` float64 nonnegative traces; their scale does not matter.
        distance: ``(b, b)`` float64 distances of the embeddings, or None for independent draws.
        project: Whether the kernel of ``distance`` needs projecting onto the positive semi-definite matrices.
        total: Queries of the batch.
        floor: Least queries of a sample in J.
    """

    feature: Tensor
    trace: Tensor
    distance: Tensor | None
    project: bool
    total: float
    floor: float

    def correlation(self, coordinates: Tensor) -> CorrelationRoot:
        """Root of the correlation of the draws, ``(b, b)``."""
        if self.distance is None:
            identity = torch.eye(len(self.feature), dtype=torch.float64)
            return CorrelationRoot(identity, torch.zeros_like(identity))
        return correlation_root(self.distance, float(coordinates[2]), project=self.project)


def mean_draw(problem: AllocationProblem, angle: Tensor) -> Tensor:
    """``(..., b)`` mu in units of Abar, for ``(...)`` angles."""
    return angle.cos()[..., None] + angle.sin()[..., None] * problem.feature


def make_draws(problem: AllocationProblem, coordinates: Tensor, correlation: CorrelationRoot, normal: Tensor) -> Tensor:
    """``(k, b)`` draws in units of Abar from ``(k, b)`` standard normal numbers: ``mu + sigma R eps``."""
    return mean_draw(problem, coordinates[0]) + coordinates[1].exp() * (normal @ correlation.root.T)


def draw_objective(problem: AllocationProblem, draws: Tensor) -> Tensor:
    """``(k,)`` J of ``(k, b)`` draws, each normalised to the budget with its floor.

    Without the normalisation J would fall without bound as the draws grow, and without the floor ``E[1 / A]`` of a
    Gaussian A does not exist.
    """
    return objective(problem.trace, water_fill(draws, problem.total, floor=problem.floor))


def pathwise_gradient(
    problem: AllocationProblem, coordinates: Tensor, correlation: CorrelationRoot, normal: Tensor
) -> tuple[Tensor, Tensor]:
    """J averaged over draws and its derivative through the draws ``mu + sigma R eps`` (reparameterisation gradient).

    Args:
        problem: The batch.
        coordinates: ``(3,)`` ``angle, ln(sigma), ln(gamma)``.
        correlation: Root of the correlation at these coordinates.
        normal: ``(k, b)`` standard normal ``eps``.

    Returns:
        Mean J (a scalar) and its ``(3,)`` gradient in the coordinates, both unbiased for the expectation over eps.
    """
    value, slope = _objective_slope(problem, make_draws(problem, coordinates, correlation, normal))
    gradient = torch.stack(
        [
            (slope @ _mean_slope(problem, coordinates)).mean(),
            coordinates[1].exp() * (slope * (normal @ correlation.root.T)).sum(dim=1).mean(),
            coordinates[1].exp() * (slope * (normal @ correlation.turn.T @ correlation.root.T)).sum(dim=1).mean(),
        ]
    )
    return value.mean(), gradient


def score_gradient(
    problem: AllocationProblem, coordinates: Tensor, correlation: CorrelationRoot, normal: Tensor
) -> tuple[Tensor, Tensor]:
    """J averaged over draws and its likelihood-ratio derivative (FLOPS, Ren et al., ICLR 2025, eq. 11).

    Each draw's J is compared with the mean J of the other draws (leave-one-out baseline), which leaves the expectation
    as it is and keeps the variance from growing like ``1 / sigma^2`` as sigma falls. It still grows with the condition
    number of the correlation, hence where the samples of a batch resemble each other.

    Args:
        problem: The batch.
        coordinates: ``(3,)`` ``angle, ln(sigma), ln(gamma)``.
        correlation: Root of the correlation at these coordinates.
        normal: ``(k, b)`` standard normal numbers, ``k >= 2``.

    Returns:
        Mean J (a scalar) and its ``(3,)`` gradient in the coordinates, both unbiased for the expectation over the
        draws.
    """
    value = draw_objective(problem, make_draws(problem, coordinates, correlation, normal))
    advantage = (value - value.mean()) * len(value) / (len(value) - 1)
    # Sigma^-1 (D - mu) = R^-T eps / sigma.
    whitened = torch.linalg.solve_triangular(correlation.root.T, normal.T, upper=True).T / coordinates[1].exp()
    score = torch.stack(
        [
            whitened @ _mean_slope(problem, coordinates),
            normal.square().sum(dim=1) - normal.shape[1],
            ((normal @ correlation.turn.T) * normal).sum(dim=1) - correlation.turn.trace(),
        ],
        dim=1,
    )
    return value.mean(), (advantage[:, None] * score).mean(dim=0)


def _mean_slope(problem: AllocationProblem, coordinates: Tensor) -> Tensor:
    # d mu / d angle
    return coordinates[0].cos() * problem.feature - coordinates[0].sin()


def _objective_slope(problem: AllocationProblem, draws: Tensor) -> tuple[Tensor, Tensor]:
    # With A = c D above the floor and c = left / sum(D) over the samples above it,
    # dJ/dD_b = (sum over them of Tr/A) / (sum over them of D) - Tr_b / (A_b D_b), and 0 at the floor.
    counts = water_fill(draws, problem.total, floor=problem.floor)
    share = problem.trace / counts
    above = (counts > problem.floor) & (draws > 0)
    mass = torch.where(above, draws, 0.0).sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    common = torch.where(above, share, 0.0).sum(dim=1, keepdim=True)
    slope = common / mass - share / torch.where(above, draws, 1.0)
    return share.sum(dim=1), torch.where(above, slope, 0.0)
