"""Gamma regression with a log link: predicts the trace of each sample's gradient from features of the clean pass.

A variance estimated from ``n`` queries is gamma distributed. Least squares on its logarithm is biased low for small
``n``; the gamma likelihood estimates the mean without bias for any ``n``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ITERATIONS = 50  # more than needed: the objective is convex, and Newton's method takes 3, from bad starts 20
# Multiples of a Newton step that are tried: with a few outlying observations a full step is too long or too short.
LENGTHS = tuple(4.0**k for k in range(1, -8, -1))
DAMPING = 1e-9  # part of its largest entry added to the Hessian's diagonal: features may determine each other
LARGEST_EXPONENT = 80.0  # predictions stay between exp(-80) and exp(80), so that their squares do not overflow


@dataclass(frozen=True)
class GammaRegression:
    """``log E[y] = intercept + slope . (x - centre) / spread``, one fit for each site."""

    centre: Tensor  # (s, f) means of the features over the observations
    spread: Tensor  # (s, f) their standard deviations (1 for a constant one)
    coefficients: Tensor  # (s, 1 + f) intercept and slopes in standardised features

    def predict(self, features: Tensor) -> Tensor:
        """``(s, n)`` expectations of y for ``(s, n, f)`` features."""
        return _mean(_design(features, self.centre, self.spread), self.coefficients)


def fit_gamma(features: Tensor, observed: Tensor, weights: Tensor, *, prior: Tensor, ridge: float) -> GammaRegression:
    """Fit by Newton's method the gamma likelihood with a Gaussian prior on the slopes.

    Minimises ``sum_n w_n (y_n / m_n + log m_n) + ridge W / 2 |slope - prior|^2`` with ``W = sum_n w_n`` and the slopes
    in standardised features. ``features`` are ``(s, n, f)``, ``observed`` ``(s, n)`` nonnegative and ``weights``
    ``(s, n)`` their degrees of freedom, 0 for missing observations, whose features and values are ignored. ``prior`` is
    ``(f,)`` in the features' own units. A site without a positive observation keeps the prior slopes.
    """
    seen = weights > 0
    features = torch.where(seen[..., None], features, 0.0)
    observed = torch.where(seen, observed, 0.0).clamp_min(0.0)
    portion = weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-300)
    centre = torch.einsum("sn,snf->sf", portion, features)
    deviation = torch.einsum("sn,snf->sf", portion, (features - centre[:, None]).square()).sqrt()
    spread = torch.where(deviation > 1e-9, deviation, 1.0)
    design = _design(features, centre, spread)
    start = torch.cat([torch.zeros_like(centre[:, :1]), prior * spread], dim=1)
    # The intercept that fits the mean at the prior's slopes.
    ratio = (portion * observed / _mean(design, start)).sum(dim=1)
    start[:, 0] = torch.where(ratio > 0, ratio, 1.0).log()
    penalty = torch.full_like(start[0], ridge)
    penalty[0] = 0.0
    coefficients = _newton(design, portion, observed, start, penalty)
    return GammaRegression(centre, spread, torch.where((ratio > 0)[:, None], coefficients, start))


def prior_strength(
    fit: GammaRegression, features: Tensor, observed: Tensor, freedom: Tensor, *, unseen: float
) -> Tensor:
    """``(s,)`` weight nu of a prediction beside an estimate, in degrees of freedom; ``unseen`` without observations."""
    # An estimate with n degrees of freedom, Tr chi^2_n / n, has the relative variance 2 / n. The residuals' variance
    # beyond that is the prediction's own error tau^2, worth nu = 2 / tau^2 degrees of freedom.
    ratio = (observed / fit.predict(features)).clamp(max=10.0)
    total = freedom.sum(dim=1).clamp_min(1e-300)
    scatter = (freedom * (ratio - 1.0).square()).sum(dim=1) / total
    noise = (freedom * 2.0 / freedom.clamp_min(1.0)).sum(dim=1) / total
    tau = ((scatter - noise) / (1.0 + noise)).clamp(0.01, 2.0)
    return torch.where((freedom > 0).any(dim=1), 2.0 / tau, unseen)


def _newton(design: Tensor, portion: Tensor, observed: Tensor, start: Tensor, penalty: Tensor) -> Tensor:
    """``(s, 1 + f)`` minimisers of the penalised objective over W; meaningless at a site without observations."""
    mass = portion * observed
    positive = mass.sum(dim=1) > 0
    lengths = torch.tensor(LENGTHS, dtype=start.dtype)[:, None, None]
    unit = torch.eye(len(penalty), dtype=start.dtype)

    def objective(tried: Tensor) -> tuple[Tensor, Tensor]:
        """``(k, s)`` values at ``(k, s, 1 + f)``, and ``(k, s, n)`` ``1 / m``."""
        exponent = torch.einsum("snf,ksf->ksn", design, tried)
        inverse = _exp(-exponent)
        likelihood = torch.einsum("sn,ksn->ks", mass, inverse) + torch.einsum("sn,ksn->ks", portion, exponent)
        return likelihood + 0.5 * (penalty * (tried - start).square()).sum(dim=2), inverse

    coefficients = start
    (value,), (inverse,) = objective(start[None])
    for _ in range(ITERATIONS):
        relative = mass * inverse
        downhill = torch.einsum("sn,snf->sf", relative - portion, design) - penalty * (coefficients - start)
        hessian = torch.einsum("snf,sng->sfg", relative[..., None] * design, design) + penalty.diag()
        damping = DAMPING * hessian.amax(dim=(1, 2), keepdim=True).clamp_min(1.0) * unit
        step = torch.linalg.solve(hessian + damping, downhill)
        decrement = torch.where(positive, (step * downhill).sum(dim=1), 0.0)  # twice what the step should lower
        tried = (coefficients + step)[None]
        values, inverses = objective(tried)
        if bool((values[0] > value - 0.25 * decrement).any()):
            tried = coefficients + lengths * step
            values, inverses = objective(tried)
        best = (values.argmin(dim=0), torch.arange(len(start)))
        coefficients, value, inverse = tried[best], values[best], inverses[best]
        if float(decrement.max()) < 1e-7:
            break
    return coefficients


def _design(features: Tensor, centre: Tensor, spread: Tensor) -> Tensor:
    standardised = (features - centre[:, None]) / spread[:, None]
    return torch.cat([torch.ones_like(standardised[..., :1]), standardised], dim=2)


def _mean(design: Tensor, coefficients: Tensor) -> Tensor:
    return _exp(torch.einsum("snf,sf->sn", design, coefficients))


def _exp(exponent: Tensor) -> Tensor:
    return exponent.clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT).exp()
