"""The correlation of the Gaussian allocator's draws between samples, its square root, and how both move with gamma."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Covariance = Literal["cosine_distance", "cosine_similarity", "diagonal"]

JITTER = 1e-4
"""Added to the diagonal, relative to its mean: duplicates in a batch make the matrix singular."""


class CorrelationRoot(NamedTuple):
    """Square root of the correlation ``C`` and its derivative.

    Attributes:
        root: ``(b, b)`` lower triangular ``R`` with ``R R^T = C``.
        turn: ``(b, b)`` lower triangular ``R^-1 dR / d ln(gamma)``.
    """

    root: Tensor
    turn: Tensor


def embedding_distance(embedding: Tensor, kind: Covariance) -> Tensor | None:
    """``d_ij`` between the samples of a batch.

    Args:
        embedding: ``(b, d)`` finite features. A sample without direction (all features zero) resembles no other one.
        kind: ``"cosine_distance"``: ``1 - cos``, half the squared distance of the unit vectors, with which the kernel
            is positive semi-definite. ``"cosine_similarity"``: ``cos``, as the paper prints it, with which similar
            samples get *less* covariance. ``"diagonal"``: no distance.

    Returns:
        ``(b, b)`` float64, or None for ``"diagonal"``.
    """
    if kind == "diagonal":
        return None
    unit = F.normalize(embedding.double(), dim=1)
    cosine = (unit @ unit.T).clamp(-1.0, 1.0)
    cosine.fill_diagonal_(1.0)
    return 1.0 - cosine if kind == "cosine_distance" else cosine


def correlation_root(distance: Tensor, log_gamma: float, *, project: bool) -> CorrelationRoot:
    """Cholesky factor of ``C_ij = exp(-d_ij / (2 gamma^2))``, made positive definite by a small jitter.

    Args:
        distance: ``(b, b)`` symmetric ``d_ij``.
        log_gamma: ``ln(gamma)``.
        project: First replace C by the nearest positive semi-definite matrix (Frobenius norm). Needed where ``d`` is a
            similarity: negative eigenvalues can then be as large as the positive ones, and no small jitter mends that.

    Returns:
        The root and its derivative in ``ln(gamma)`` (the forward derivative of the Cholesky factorisation:
        ``dR = R Phi(R^-1 dC R^-T)``, Phi the lower triangle with its diagonal halved).
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
    whole = torch.linalg.solve_triangular(root, half.T, upper=False)
    turn = whole.tril()
    turn.diagonal().mul_(0.5)
    return CorrelationRoot(root, turn)


def _nearest_positive(matrix: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    # Eigenvalues clipped at zero. The derivative is the Daleckii-Krein formula: divided differences of the clipped
    # eigenvalues, which stay finite where eigenvalues coincide.
    values, vectors = torch.linalg.eigh(matrix)
    clipped = values.clamp_min(0.0)
    gaps = values[:, None] - values[None, :]
    same = gaps.abs() < 1e-12 * values.abs().max()
    differences = (clipped[:, None] - clipped[None, :]) / torch.where(same, 1.0, gaps)
    differences = torch.where(same, (values > 0).double()[:, None], differences)
    projected_slope = vectors @ (differences * (vectors.T @ slope @ vectors)) @ vectors.T
    return (vectors * clipped) @ vectors.T, projected_slope
