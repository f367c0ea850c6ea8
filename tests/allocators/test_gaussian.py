import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from flops_lightning.allocators import GaussianAllocator, GaussianParameters, gain_optimal, objective
from flops_lightning.allocators.gaussian import Gradient, from_coordinates, to_coordinates
from flops_lightning.allocators.gaussian_search import (
    JITTER,
    SIGMA_FLOOR,
    AllocationProblem,
    Covariance,
    average_objective,
    correlation_root,
    descend,
    draw_objective,
    embedding_distance,
    mean_draw,
    pathwise_gradient,
    score_gradient,
    search,
)  # fmt: skip
from flops_lightning.errors import SettingError
from flops_lightning.protocol import QueryBudget, SampleStatistics

BUDGET = QueryBudget((20,))
GRADIENTS: list[Gradient] = ["pathwise", "score", "exact"]


def batch(seed: int = 0, *, size: int = 64, intercept: float = 0.05, slope: float = 1.0) -> SampleStatistics:
    """A batch whose sqrt(Tr) is linear in tanh(loss) where that is positive: one that GA can allocate optimally."""
    generator = torch.Generator().manual_seed(seed)
    loss = (1.5 * torch.randn(size, generator=generator) - 1.0).exp()
    root = (intercept + slope * loss.tanh()).clamp_min(0.0)
    return SampleStatistics(loss=loss, embedding=torch.randn(size, 32, generator=generator), trace=root.square())


def gain(statistics: SampleStatistics, counts: Tensor) -> float:
    assert statistics.trace is not None
    return float(20**-1 * statistics.trace.double().sum() / objective(statistics.trace, counts))


def problem_of(statistics: SampleStatistics) -> AllocationProblem:
    assert statistics.trace is not None
    feature = statistics.loss.double().tanh()
    feature = (feature - feature.mean()) / feature.std(correction=0)
    return AllocationProblem(feature, statistics.trace.double(), None, False, total=20.0 * len(feature), floor=1.0)


@pytest.mark.parametrize(("intercept", "slope"), [(0.05, 1.0), (-0.2, 1.0), (1.1, -1.0)])
def test_the_three_gradients_agree_and_reach_the_optimum(intercept: float, slope: float) -> None:
    gains = {}
    for gradient in GRADIENTS:
        allocator = GaussianAllocator(gradient=gradient)
        for seed in range(4):  # the last batch is reached by a warm start, as in training
            statistics = batch(seed, intercept=intercept, slope=slope)
            allocation = allocator.allocate(statistics, BUDGET)
        gains[gradient] = gain(statistics, allocation.counts[0])
        assert allocation.diagnostics["J_over_J_equal"] == pytest.approx(1 / gains[gradient], rel=1e-6)
        assert allocation.diagnostics["converged"] == 1.0
    assert statistics.trace is not None
    assert gains["exact"] >= 0.97 * float(gain_optimal(statistics.trace))
    assert min(gains.values()) >= 0.95 * gains["exact"]


@pytest.mark.parametrize("gradient", ["pathwise", "score"])
@pytest.mark.parametrize("max_iterations", [1, 100])
def test_objective_never_ends_above_its_start(gradient: Any, max_iterations: int) -> None:
    for seed in range(5):
        problem = problem_of(batch(seed, intercept=-0.1))
        starts = [torch.tensor([angle, math.log(0.2), 0.0], dtype=torch.float64) for angle in (0.5, -1.0)]
        generator = torch.Generator().manual_seed(seed)
        optimum = descend(
            problem, starts, gradient=gradient, draws=16, max_iterations=max_iterations, generator=generator
        )
        common = torch.randn(16, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        before = min(average_objective(problem, start, common) for start in starts)
        after = average_objective(problem, optimum.place, common)
        assert after < before
        assert optimum.converged == (max_iterations > 1)


@pytest.mark.parametrize(("intercept", "slope"), [(0.3, 1.0), (-0.4, 1.0), (1.0, -1.0), (-0.95, 1.0)])
def test_exact_search_equals_a_fine_scan_of_the_circle(intercept: float, slope: float) -> None:
    problem = problem_of(batch(3, intercept=intercept, slope=slope))
    angles = torch.linspace(-math.pi, math.pi, 40_001, dtype=torch.float64)
    least = draw_objective(problem, mean_draw(problem, angles)).min()
    found = draw_objective(problem, mean_draw(problem, search(problem, 0.0).place[:1]))[0]
    assert float(found) == pytest.approx(float(least), rel=1e-4)


def test_sigma_runs_to_its_floor() -> None:
    allocator = GaussianAllocator()
    for seed in range(12):
        diagnostics = allocator.allocate(batch(seed), BUDGET).diagnostics
    # By Jensen's inequality J is least without randomness. Sigma starts at a fifth of the average.
    # Below a twentieth it adds less than 1 % to J, which no longer counts as a change.
    assert 20 * SIGMA_FLOOR <= diagnostics["sigma"] < 20 * 0.05


@pytest.mark.parametrize("gradient", ["pathwise", "score"])
def test_a_start_without_gradient_is_left(gradient: Any) -> None:
    # A mean that is nowhere positive allocates equally; from the paper's start, J first is above that here.
    allocator = GaussianAllocator(gradient=gradient)
    allocator.load_state_dict({"parameters": [-20.0, 1.0, 0.2, 1.0], "batches": 0, "not_converged": 0})
    for seed in range(3):
        statistics = batch(seed, intercept=1.1, slope=-1.0)
        counts = allocator.allocate(statistics, BUDGET).counts[0]
    assert statistics.trace is not None
    assert gain(statistics, counts) > 0.95 * float(gain_optimal(statistics.trace))


def test_parameters_describe_the_same_mean_in_both_forms() -> None:
    start = GaussianParameters.initial(20)
    feature = batch().loss.double().tanh()
    centre, spread = float(feature.mean()), float(feature.std(correction=0))
    again = from_coordinates(to_coordinates(start, centre, spread), centre, spread, 20)
    mean = again.beta0 + again.beta1 * feature
    torch.testing.assert_close(mean / again.beta0, (start.beta0 + start.beta1 * feature) / start.beta0)
    assert float(mean.square().mean().sqrt()) == pytest.approx(20.0)
    assert again.sigma / again.beta0 == pytest.approx(start.sigma / start.beta0)
    assert again.gamma == pytest.approx(1.0)


def test_all_sites_round_the_same_draw_to_their_own_budget() -> None:
    counts = GaussianAllocator(gradient="exact").allocate(batch(), QueryBudget((20, 200, 6), multiple=2)).counts
    assert counts.shape == (3, 64)
    assert counts.sum(dim=1).tolist() == [64 * 20, 64 * 200, 64 * 6]
    assert bool((counts % 2 == 0).all())
    assert int(counts.min()) == 2
    # Each row is a monotone function of the same draw, which the largest budget resolves best.
    assert bool((counts[:, counts[1].argsort(stable=True)].diff(dim=1) >= 0).all())
    assert len(counts[1].unique()) > len(counts[0].unique()) > len(counts[2].unique()) > 1


def test_without_a_floor_a_sample_may_get_nothing() -> None:
    # sqrt(Tr) is zero for easy samples, and the line through the others is negative there.
    statistics = batch(0, intercept=-0.5)
    counts = GaussianAllocator(gradient="exact", min_queries=0).allocate(statistics, BUDGET).counts
    assert int(counts.min()) == 0
    assert int(counts.sum()) == 20 * 64
    assert int(GaussianAllocator(gradient="exact").allocate(statistics, BUDGET).counts.min()) == 1


def test_threads_are_given_back() -> None:
    torch.set_num_threads(2)
    GaussianAllocator(gradient="exact").allocate(batch(size=4), BUDGET)
    assert torch.get_num_threads() == 2


def test_missing_statistics_are_named_with_the_remedy() -> None:
    loss = torch.rand(4)
    with pytest.raises(SettingError, match=r"`trace`.*strategy.pilots"):
        GaussianAllocator().allocate(SampleStatistics(loss=loss, embedding=torch.rand(4, 2)), BUDGET)
    bare = SampleStatistics(loss=loss, trace=torch.rand(4))
    with pytest.raises(SettingError, match="covariance = 'diagonal'"):
        GaussianAllocator().check(bare)
    GaussianAllocator(covariance="diagonal").check(bare)
    for setting in ("gradient", "covariance"):
        with pytest.raises(SettingError, match=f"{setting} = 'newton': is not one of the choices"):
            GaussianAllocator(**{setting: "newton"})  # type: ignore[arg-type]


@pytest.mark.parametrize("losses", [torch.full((16,), 0.7), torch.linspace(20.0, 30.0, 16)], ids=["equal", "saturated"])
def test_losses_that_do_not_differ_give_equal_counts_and_are_not_remembered(losses: torch.Tensor) -> None:
    allocator = GaussianAllocator()
    statistics = SampleStatistics(loss=losses, embedding=torch.eye(16), trace=torch.linspace(0.1, 3.0, 16))
    allocation = allocator.allocate(statistics, QueryBudget((20,)))
    assert allocation.counts.unique().tolist() == [20]
    assert allocator.state_dict()["parameters"] is None


# Gradients, in closed form, against autograd on the plain formulas

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
