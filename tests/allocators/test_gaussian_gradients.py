"""The closed-form gradients of J against autograd on the plain formulas, and against each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from flops_lightning.allocators.gaussian_search import (
    JITTER,
    AllocationProblem,
    Covariance,
    correlation_root,
    draw_objective,
    embedding_distance,
    pathwise_gradient,
    score_gradient,
)

BATCH = 10


def make_problem(covariance: Covariance, *, floor: float = 1.0) -> AllocationProblem:
    generator = torch.Generator().manual_seed(5)
    feature = torch.randn(BATCH, dtype=torch.float64, generator=generator)
    feature = (feature - feature.mean()) / feature.std(correction=0)
    distance = embedding_distance(torch.randn(BATCH, 4, generator=generator), covariance)
    trace = torch.randn(BATCH, dtype=torch.float64, generator=generator).exp()
    return AllocationProblem(feature, trace, distance, covariance == "cosine_similarity", 8.0 * BATCH, floor)


def nearest_positive(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp_min(0.0)) @ vectors.T


def plain_correlation(problem: AllocationProblem, log_gamma: Tensor) -> Tensor:
    if problem.distance is None:
        return torch.eye(BATCH, dtype=torch.float64)
    matrix = (-problem.distance / (2 * log_gamma.exp() ** 2)).exp()
    if problem.project:
        matrix = nearest_positive(matrix)
    return matrix + JITTER * matrix.diagonal().mean() * torch.eye(BATCH, dtype=torch.float64)


def plain_objective(problem: AllocationProblem, draw: Tensor) -> Tensor:
    """J of one draw: samples below the floor are put there one after the other."""
    low = draw <= 0
    while True:
        left = problem.total - problem.floor * low.sum()
        counts = torch.where(low, problem.floor, left * draw / draw[~low].sum())
        if not bool((counts < problem.floor).any()):
            return (problem.trace / counts).sum()
        low = low | (counts < problem.floor)


def plain_density(problem: AllocationProblem, coordinates: Tensor) -> MultivariateNormal:
    angle, sigma = coordinates[0], coordinates[1].exp()
    root = torch.linalg.cholesky(plain_correlation(problem, coordinates[2]))
    return MultivariateNormal(angle.cos() + angle.sin() * problem.feature, scale_tril=sigma * root)


@pytest.mark.parametrize("covariance", ["cosine_distance", "cosine_similarity", "diagonal"])
@pytest.mark.parametrize("sigma", [0.05, 0.6])
def test_pathwise_gradient_equals_autograd(covariance: Covariance, sigma: float) -> None:
    problem = make_problem(covariance)
    coordinates = torch.tensor([0.4, math.log(sigma), -0.2], dtype=torch.float64, requires_grad=True)
    normal = torch.randn(6, BATCH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    density = plain_density(problem, coordinates)
    draws = density.loc + normal @ density.scale_tril.T
    value = torch.stack([plain_objective(problem, draw) for draw in draws]).mean()
    (expected,) = torch.autograd.grad(value, coordinates)

    start = coordinates.detach()
    got_value, got = pathwise_gradient(problem, start, problem.correlation(start), normal)
    assert bool((draws < 0).any()) == (sigma == 0.6)  # the second case has samples at the floor
    torch.testing.assert_close(got_value, value.detach(), rtol=1e-10, atol=0.0)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("covariance", ["cosine_distance", "cosine_similarity", "diagonal"])
def test_score_gradient_equals_equation_11_with_leave_one_out_baseline(covariance: Covariance) -> None:
    problem = make_problem(covariance)
    coordinates = torch.tensor([0.4, math.log(0.3), -0.2], dtype=torch.float64, requires_grad=True)
    normal = torch.randn(5, BATCH, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    density = plain_density(problem, coordinates)
    draws = (density.loc + normal @ density.scale_tril.T).detach()
    values = torch.stack([plain_objective(problem, draw) for draw in draws])
    others = torch.stack([torch.cat([values[:k], values[k + 1 :]]).mean() for k in range(5)])
    (expected,) = torch.autograd.grad(((values - others) * density.log_prob(draws)).mean(), coordinates)

    start = coordinates.detach()
    value, got = score_gradient(problem, start, problem.correlation(start), normal)
    torch.testing.assert_close(value, values.mean(), rtol=1e-10, atol=0.0)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-8)


def test_objective_does_not_depend_on_the_scale_of_the_draws() -> None:
    problem = make_problem("diagonal")
    draws = torch.randn(20, BATCH, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) + 1.0
    torch.testing.assert_close(draw_objective(problem, 1e3 * draws), draw_objective(problem, draws))


def test_duplicates_leave_the_correlation_positive_definite() -> None:
    embedding = torch.randn(3, 8, generator=torch.Generator().manual_seed(6))[[0, 0, 0, 1, 1, 2]]
    for gamma in (0.1, 1.0, 10.0):
        distance = embedding_distance(embedding, "cosine_distance")
        assert distance is not None
        root = correlation_root(distance, math.log(gamma), project=False).root
        expected = (-distance / (2 * gamma**2)).exp() + JITTER * torch.eye(6, dtype=torch.float64)
        torch.testing.assert_close(root @ root.T, expected)
        assert float(torch.linalg.eigvalsh(root @ root.T).min()) > 0.99 * JITTER


def test_cosine_similarity_is_replaced_by_the_nearest_positive_matrix() -> None:
    embedding = torch.cat([torch.ones(4, 3), -torch.ones(4, 3)]) + 0.1 * torch.randn(
        8, 3, generator=torch.Generator().manual_seed(7)
    )
    similarity = embedding_distance(embedding, "cosine_similarity")
    assert similarity is not None
    kernel = (-similarity / 2).exp()
    # As printed in the paper: opposite samples covary more than equal ones, and eigenvalues are far below zero.
    assert float(torch.linalg.eigvalsh(kernel).min()) < -1.0
    nearest = nearest_positive(kernel)
    root = correlation_root(similarity, 0.0, project=True).root
    jitter = JITTER * nearest.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(root @ root.T, nearest + jitter)


def test_samples_without_direction_resemble_no_other() -> None:
    embedding = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0]])
    distance = embedding_distance(embedding, "cosine_distance")
    assert distance is not None
    torch.testing.assert_close(distance, 1.0 - torch.eye(3, dtype=torch.float64))
