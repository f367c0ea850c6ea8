"""Objective and gradients of the Gaussian allocator, and the search for its parameters on one batch.

The default gradient is :func:`pathwise_gradient`; :func:`score_gradient` is the likelihood-ratio gradient of eq. 11
(Ren et al., ICLR 2025). Both are in closed form.

An allocation is a draw ``D ~ N(mu, Sigma)``, normalised to the budget by water-filling. The normalisation makes the
scale of the draw irrelevant, so three coordinates, ``angle, ln(sigma), ln(gamma)``, describe the four parameters. With
``z`` the feature ``tanh(loss)``, standardised over the batch,

    ``mu = Abar (cos(angle) + sin(angle) z)``,    ``Sigma = (Abar sigma)^2 C(gamma)``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flops_lightning.allocators.objective import objective
from flops_lightning.allocators.rounding import water_fill

Covariance = Literal["cosine_distance", "cosine_similarity", "diagonal"]

JITTER = 1e-4  # added to the diagonal, relative to its mean: duplicates in a batch make the matrix singular
SIGMA_FLOOR = 0.01  # relative to the root mean square of mu: the optimum is at 0, where the score does not exist
GAMMA_LIMIT = 10.0  # gamma stays between 1 / GAMMA_LIMIT and GAMMA_LIMIT
LEARNING_RATE = 0.1  # step of Adam in the coordinates: radians, and e-foldings of sigma and gamma
PATIENCE = 5  # iterations over which J is compared
TOLERANCE = 0.01  # relative change of J over PATIENCE iterations below which it has converged


class CorrelationRoot(NamedTuple):
    """``(b, b)`` lower triangular ``R`` with ``R R^T = C``, the correlation, and ``R^-1 dR / d ln(gamma)``."""

    root: Tensor
    turn: Tensor


def embedding_distance(embedding: Tensor, kind: Covariance) -> Tensor | None:
    """``(b, b)`` float64 ``d_ij`` between ``(b, d)`` finite embeddings, or None for ``"diagonal"``.

    ``"cosine_distance"`` is half the squared distance of the unit vectors: its kernel is positive semi-definite. A
    sample whose features are all zero resembles no other one.
    """
    if kind == "diagonal":
        return None
    unit = F.normalize(embedding.double(), dim=1)
    cosine = (unit @ unit.T).clamp(-1.0, 1.0)
    cosine.fill_diagonal_(1.0)
    return 1.0 - cosine if kind == "cosine_distance" else cosine


def correlation_root(distance: Tensor, log_gamma: float, *, project: bool) -> CorrelationRoot:
    """Cholesky factor of ``C_ij = exp(-d_ij / (2 gamma^2))``, made positive definite by a small jitter.

    Its derivative is ``dR = R Phi(R^-1 dC R^-T)``, Phi the lower triangle with its diagonal halved. ``project`` first
    replaces C by the nearest positive semi-definite matrix (Frobenius norm): a similarity as ``d`` needs it.
    """
    exponent = 0.5 * torch.tensor(-2.0 * log_gamma, dtype=torch.float64).exp() * distance
    matrix = (-exponent).exp()
    slope = 2.0 * exponent * matrix
    if project:
        matrix, slope = _nearest_positive(matrix, slope)
    for symmetric in (matrix, slope):
        symmetric.diagonal().add_(JITTER * symmetric.diagonal().mean())
    root = torch.linalg.cholesky(matrix)
    half = torch.linalg.solve_triangular(root, slope, upper=False)
    turn = torch.linalg.solve_triangular(root, half.T, upper=False).tril()
    turn.diagonal().mul_(0.5)
    return CorrelationRoot(root, turn)


def _nearest_positive(matrix: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """Clip the eigenvalues at zero; the derivative is the Daleckii-Krein formula, by their divided differences."""
    values, vectors = torch.linalg.eigh(matrix)
    clipped = values.clamp_min(0.0)
    gaps = values[:, None] - values[None, :]
    same = gaps.abs() < 1e-12 * values.abs().max()
    differences = (clipped[:, None] - clipped[None, :]) / torch.where(same, 1.0, gaps)
    differences = torch.where(same, (values > 0).double()[:, None], differences)
    projected_slope = vectors @ (differences * (vectors.T @ slope @ vectors)) @ vectors.T
    return (vectors * clipped) @ vectors.T, projected_slope


@dataclass(frozen=True)
class AllocationProblem:
    """One batch, as the optimisation sees it; tensors are float64."""

    feature: Tensor  # (b,) tanh(loss) with mean 0 and variance 1 over the batch
    trace: Tensor  # (b,) nonnegative; its scale does not matter
    distance: Tensor | None  # (b, b) distances of the embeddings; None: independent draws
    project: bool  # whether the kernel of the distances is not positive semi-definite
    total: float  # queries of the batch
    floor: float  # least queries of a sample in J

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

    At ``(3,)`` coordinates with the root of the correlation there, from ``(k, b)`` standard normal ``eps``. Returns the
    mean J (a scalar) and its ``(3,)`` gradient in the coordinates, both unbiased.
    """
    value, slope = _objective_slope(problem, make_draws(problem, coordinates, correlation, normal))
    mean_slope, sigma = _mean_slope(problem, coordinates), coordinates[1].exp()
    of_sigma = sigma * (slope * (normal @ correlation.root.T)).sum(dim=1).mean()
    of_gamma = sigma * (slope * (normal @ correlation.turn.T @ correlation.root.T)).sum(dim=1).mean()
    return value.mean(), torch.stack([(slope @ mean_slope).mean(), of_sigma, of_gamma])


def score_gradient(
    problem: AllocationProblem, coordinates: Tensor, correlation: CorrelationRoot, normal: Tensor
) -> tuple[Tensor, Tensor]:
    """J averaged over draws and its likelihood-ratio derivative (FLOPS, Ren et al., ICLR 2025, eq. 11).

    The mean J of the other draws is subtracted (leave-one-out baseline), which keeps the variance from growing like
    ``1 / sigma^2``. Arguments and results are those of :func:`pathwise_gradient`; ``k >= 2``.
    """
    value = draw_objective(problem, make_draws(problem, coordinates, correlation, normal))
    advantage = (value - value.mean()) * len(value) / (len(value) - 1)
    # Sigma^-1 (D - mu) = R^-T eps / sigma.
    whitened = torch.linalg.solve_triangular(correlation.root.T, normal.T, upper=True).T / coordinates[1].exp()
    of_sigma = normal.square().sum(dim=1) - normal.shape[1]
    of_gamma = ((normal @ correlation.turn.T) * normal).sum(dim=1) - correlation.turn.trace()
    score = torch.stack([whitened @ _mean_slope(problem, coordinates), of_sigma, of_gamma], dim=1)
    return value.mean(), (advantage[:, None] * score).mean(dim=0)


def _mean_slope(problem: AllocationProblem, coordinates: Tensor) -> Tensor:
    """``d mu / d angle``."""
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


@dataclass(frozen=True)
class Optimum:
    """Where an optimisation ended, after how many steps, and whether J had stopped changing."""

    place: Tensor
    iterations: int
    converged: bool


def minimise(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], start: Tensor, *, learning_rate: float, low: Tensor,
    high: Tensor, max_iterations: int,
) -> Optimum:  # fmt: skip
    """Run Adam until J changes by less than 1 % over 5 iterations, and return the best coordinates it met.

    ``evaluate`` returns J and its gradient at the coordinates, which stay between ``low`` and ``high``.
    """
    coordinates, best, best_value, values = start.clone(), start, math.inf, list[float]()
    optimizer = torch.optim.Adam([coordinates], lr=learning_rate)
    for iteration in range(max_iterations + 1):
        value, coordinates.grad = evaluate(coordinates)
        values.append(float(value))
        if values[-1] < best_value:
            best, best_value = coordinates.clone(), values[-1]
        if iteration >= PATIENCE and abs(values[-1] - values[-1 - PATIENCE]) < TOLERANCE * values[-1 - PATIENCE]:
            return Optimum(best, iteration, converged=True)
        optimizer.step()
        coordinates.clamp_(low, high)
    return Optimum(best, max_iterations, converged=False)


def descend(
    problem: AllocationProblem, starts: Sequence[Tensor], *, gradient: Literal["pathwise", "score"], draws: int,
    max_iterations: int, generator: torch.Generator,
) -> Optimum:  # fmt: skip
    """Minimise J from the best of ``starts``; one whose mean is nowhere positive, a plateau without gradient, is last.

    J is averaged over ``draws`` draws, the same at every iteration (common random numbers). The score gradient needs
    new draws at every iteration: with the same ones its error would never average out.
    """
    shape = (draws, len(problem.feature))
    common = torch.randn(shape, dtype=torch.float64, generator=generator)

    def rank(start: Tensor) -> tuple[bool, float]:
        return float(mean_draw(problem, start[0]).max()) <= 0.0, average_objective(problem, start, common)

    def evaluate(coordinates: Tensor) -> tuple[Tensor, Tensor]:
        correlation = problem.correlation(coordinates)
        if gradient == "pathwise":
            return pathwise_gradient(problem, coordinates, correlation, common)
        fresh = torch.randn(shape, dtype=torch.float64, generator=generator)
        value = draw_objective(problem, make_draws(problem, coordinates, correlation, common)).mean()
        return value, score_gradient(problem, coordinates, correlation, fresh)[1]

    low = torch.tensor([-math.inf, math.log(SIGMA_FLOOR), -math.log(GAMMA_LIMIT)], dtype=torch.float64)
    high = torch.tensor([math.inf, math.inf, math.log(GAMMA_LIMIT)], dtype=torch.float64)
    start = min(starts, key=rank)
    return minimise(evaluate, start, learning_rate=LEARNING_RATE, low=low, high=high, max_iterations=max_iterations)


def average_objective(problem: AllocationProblem, coordinates: Tensor, normal: Tensor) -> float:
    """J averaged over the draws made of ``(k, b)`` standard normal numbers."""
    draws = make_draws(problem, coordinates, problem.correlation(coordinates), normal)
    return float(draw_objective(problem, draws).mean())


def search(problem: AllocationProblem, log_gamma: float) -> Optimum:
    """Best angle of the deterministic allocation with sigma at its floor, to which J falls (Jensen), by nested grids.

    The grids resolve the angle to ``pi / 16384``; the first covers the circle, on which J may have several minima.
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
