import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flops_lightning.allocators.gamma_regression import LARGEST_EXPONENT, GammaRegression, fit_gamma
from tests.allocators.draws import chi_square, normal

D = torch.float64


def problem(seed: int = 0, *, sites: int = 2, n: int = 60, slope: float = 0.8, freedom: int = 3) -> dict[str, Any]:
    """Features, gamma observations of ``exp(1 + slope x_0)``, and the settings of a fit."""
    features, dof = normal(sites, n, 3, seed=seed), torch.full((sites, n), float(freedom), dtype=D)
    mean = (1.0 + slope * features[..., 0]).exp()
    observed = mean * chi_square(dof, seed + 1) / freedom
    prior = torch.tensor([0.0, 1.0, 0.0], dtype=D)
    return {"features": features, "observed": observed, "weights": dof, "prior": prior, "ridge": 0.01}


def objective(case: dict[str, Any], site: int, coefficients: Tensor) -> Tensor:
    """The objective over W as the docstring states it, one observation after the other, unobserved ones left out."""
    x, y, w = (case[name][site] for name in ("features", "observed", "weights"))
    x, y, w = x[w > 0], y[w > 0], w[w > 0]
    centre = (w[:, None] * x).sum(dim=0) / w.sum()
    spread = ((w[:, None] * (x - centre).square()).sum(dim=0) / w.sum()).sqrt()
    spread = torch.where(spread > 1e-9, spread, 1.0)
    log_mean = coefficients[0] + ((x - centre) / spread) @ coefficients[1:]
    likelihood = (w * (y / log_mean.exp() + log_mean)).sum()
    distance = (coefficients[1:] - case["prior"] * spread).square().sum()
    return (likelihood + 0.5 * case["ridge"] * w.sum() * distance) / w.sum()


def gradient(case: dict[str, Any], fit: GammaRegression, site: int) -> Tensor:
    coefficients = torch.from_numpy(fit.coefficients[site]).requires_grad_(True)
    return torch.autograd.grad(objective(case, site, coefficients), coefficients)[0]


@pytest.mark.parametrize(("n", "slope", "freedom"), [(60, 0.8, 3), (60, 3.0, 1), (8, 1.0, 1), (300, -2.0, 20)])
def test_the_gradient_of_the_stated_convex_objective_is_zero_at_the_fit(n: int, slope: float, freedom: int) -> None:
    case = problem(n=n, slope=slope, freedom=freedom)
    for site in range(2):
        assert float(gradient(case, fit_gamma(**case), site).abs().max()) < 1e-6


@given(
    st.integers(0, 10_000), st.integers(1, 120), st.sampled_from([0.0, 1.0, -3.0, 5.0]),
    st.sampled_from([0.0, 20.0, -20.0, 100.0]), st.sampled_from([0.0, 0.5, 0.95]),
)  # fmt: skip
@settings(max_examples=100)
def test_fit_converges_from_bad_starts_and_with_outliers(
    seed: int, n: int, slope: float, outlier: float, silent: float
) -> None:
    # The prior may be far off, one observation's features far out, and part of the estimates nil or missing.
    case = problem(seed, n=n, slope=slope, freedom=1)
    case["features"][:, 0] += outlier
    case["observed"][torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) < silent] = 0.0
    case["weights"] = torch.randint(0, 6, (2, n), generator=torch.Generator().manual_seed(seed)).to(D)
    fit = fit_gamma(**case)
    predicted = fit.predict(case["features"]).log().abs()
    assert bool(predicted.isfinite().all())
    for site in range(2):
        positive = (case["weights"] > 0) & (case["observed"] > 0)
        # Where all but a few estimates are nil the minimum can lie beyond the smallest prediction.
        if bool(positive[site].any()) and float(predicted[site].max()) < LARGEST_EXPONENT:
            assert float(gradient(case, fit, site).abs().max()) < 1e-4


def test_unbiased_where_least_squares_on_the_logarithm_is_not() -> None:
    # The same trace for all, but half of the samples had 2 degrees of freedom and half 20, as the feature tells.
    n = 20_000
    freedom = torch.tensor([2.0, 20.0], dtype=D).repeat(n // 2)[None]
    observed = 5.0 * chi_square(freedom) / freedom
    features = (freedom == 20).to(D)[..., None]
    fit = fit_gamma(features, observed, freedom, prior=torch.zeros(1, dtype=D), ridge=1e-9)
    few, many = fit.predict(torch.tensor([[[0.0], [1.0]]], dtype=D))[0].log().tolist()
    # The mean of n / 2 estimates with f degrees of freedom is off by a relative sqrt(2 / f / (n / 2)).
    assert abs(few - math.log(5.0)) < 4 * math.sqrt(2 / 2 / (n / 2))
    assert abs(many - math.log(5.0)) < 4 * math.sqrt(2 / 20 / (n / 2))
    assert math.exp(float(observed[0, ::2].log().mean())) < 0.6 * 5.0  # least squares on the logarithm


def test_what_was_not_observed_has_no_influence() -> None:
    case = problem()
    without = fit_gamma(**(case | {name: case[name][:, 10:] for name in ("features", "observed", "weights")}))
    for anything in (math.nan, math.inf, -1e30, 1e30):
        spoiled = {name: case[name].clone() for name in ("features", "observed", "weights")}
        spoiled["features"][:, :10] = anything
        spoiled["observed"][:, :10] = anything
        spoiled["weights"][:, :10] = 0.0
        fit = fit_gamma(**(case | spoiled))
        torch.testing.assert_close(fit.predict(case["features"]), without.predict(case["features"]), rtol=1e-9, atol=0)


@pytest.mark.parametrize("observed", [0.0, math.nan])
def test_site_without_a_positive_observation_predicts_by_its_prior(observed: float) -> None:
    case = problem()
    case["observed"][1] = observed
    case["weights"][1] = 0.0 if math.isnan(observed) else 3.0
    predicted = fit_gamma(**case).predict(case["features"])
    by_prior = (case["features"] @ case["prior"]).exp()
    relative = predicted[1] / by_prior[1]
    torch.testing.assert_close(relative, relative[:1].expand(60), rtol=1e-9, atol=0.0)
    alone = fit_gamma(**(case | {name: case[name][:1] for name in ("features", "observed", "weights")}))
    torch.testing.assert_close(predicted[:1], alone.predict(case["features"][:1]))


def test_constant_feature_changes_nothing_until_it_changes() -> None:
    case = problem()
    plain = fit_gamma(**case).predict(case["features"])
    constant = torch.full_like(case["features"][..., :1], -13.8155)
    features = torch.cat([case["features"], constant], dim=2)
    fit = fit_gamma(**(case | {"features": features, "prior": torch.cat([case["prior"], torch.ones(1, dtype=D)])}))
    torch.testing.assert_close(fit.predict(features), plain, rtol=1e-6, atol=0.0)
    # Nothing was learned of it, so it acts by its prior slope of 1.
    moved = torch.cat([case["features"], constant + 0.7], dim=2)
    torch.testing.assert_close(fit.predict(moved), plain * math.exp(0.7), rtol=1e-6, atol=0.0)


def test_predictions_stay_finite_far_out() -> None:
    fit = fit_gamma(**problem(slope=3.0))
    predicted = fit.predict(torch.full((2, 1, 3), 1e6, dtype=D))
    assert bool((predicted.square().isfinite() & (predicted > 0)).all())
