"""Gamma regression with a log link: predicts the trace of each sample's gradient from features of the clean pass.

A variance estimated from ``n`` queries is gamma distributed. Least squares on its logarithm is biased low for small
``n``; the gamma likelihood estimates the mean without bias for any ``n``.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ITERATIONS = 50  # more than needed: the objective is convex, and Newton's method takes 3, from bad starts 20
# Multiples of a Newton step that are tried: with a few outlying observations a full step is too long or too short.
LENGTHS = 4.0 ** np.arange(1, -8, -1)[:, None]
DAMPING = 1e-9  # part of its largest entry added to the Hessian's diagonal: features may determine each other
LARGEST_EXPONENT = 80.0  # predictions stay between exp(-80) and exp(80), so that their squares do not overflow

Array = NDArray[np.float64]


@dataclass(frozen=True)
class GammaRegression:
    """``log E[y] = intercept + slope . (x - centre) / spread``, one fit for each site."""

    centre: Array  # (s, f) means of the features over the observations
    spread: Array  # (s, f) their standard deviations (1 for a constant one)
    coefficients: Array  # (s, 1 + f) intercept and slopes in standardised features

    def predict(self, features: Tensor) -> Tensor:
        """``(s, n)`` expectations of y for ``(s, n, f)`` features."""
        design = _design(_lines(features), self.centre, self.spread)
        return torch.from_numpy(_mean(design, self.coefficients))


def fit_gamma(features: Tensor, observed: Tensor, weights: Tensor, *, prior: Tensor, ridge: float) -> GammaRegression:
    """Fit by Newton's method the gamma likelihood with a Gaussian prior on the slopes.

    Minimises ``sum_n w_n (y_n / m_n + log m_n) + ridge W / 2 |slope - prior|^2`` with ``W = sum_n w_n`` and the slopes
    in standardised features. ``features`` are ``(s, n, f)``, ``observed`` ``(s, n)`` nonnegative and ``weights``
    ``(s, n)`` their degrees of freedom, 0 for missing observations, whose features and values are ignored. ``prior`` is
    ``(f,)`` in the features' own units. A site without a positive observation keeps the prior slopes.
    """
    # In numpy: on the few hundred numbers of a small batch, an operation of torch takes five times as long to begin.
    x, y, w = _lines(features), observed.double().numpy(), weights.double().numpy()
    seen = w > 0
    x, y = np.where(seen[:, None], x, 0.0), np.where(seen, y, 0.0).clip(min=0.0)
    portion = w / w.sum(axis=1, keepdims=True).clip(min=1e-300)
    centre = _sums(x, portion)
    deviation = np.sqrt(_sums(np.square(x - centre[..., None]), portion))
    spread = np.where(deviation > 1e-9, deviation, 1.0)
    design = _design(x, centre, spread)
    start = np.concatenate([np.zeros_like(centre[:, :1]), prior.numpy() * spread], axis=1)
    # The intercept that fits the mean at the prior's slopes.
    ratio = (portion * y / _mean(design, start)).sum(axis=1)
    start[:, 0] = np.log(np.where(ratio > 0, ratio, 1.0))
    penalty = np.full_like(start[0], ridge)
    penalty[0] = 0.0
    coefficients = _newton(design, portion, y, start, penalty)
    return GammaRegression(centre, spread, np.where((ratio > 0)[:, None], coefficients, start))


def prior_strength(
    fit: GammaRegression, features: Tensor, observed: Tensor, freedom: Tensor, *, unseen: float
) -> Tensor:
    """``(s,)`` weight nu of a prediction beside an estimate, in degrees of freedom; ``unseen`` without observations."""
    # An estimate with n degrees of freedom, Tr chi^2_n / n, has the relative variance 2 / n. The residuals' variance
    # beyond that is the prediction's own error tau^2, worth nu = 2 / tau^2 degrees of freedom.
    y, n = observed.double().numpy(), freedom.double().numpy()
    ratio = (y / fit.predict(features).numpy()).clip(max=10.0)
    total = n.sum(axis=1).clip(min=1e-300)
    scatter = (n * np.square(ratio - 1.0)).sum(axis=1) / total
    noise = (n * 2.0 / n.clip(min=1.0)).sum(axis=1) / total
    tau = ((scatter - noise) / (1.0 + noise)).clip(0.01, 2.0)
    return torch.from_numpy(np.where((n > 0).any(axis=1), 2.0 / tau, unseen))


def _newton(design: Array, portion: Array, observed: Array, start: Array, penalty: Array) -> Array:
    """``(s, 1 + f)`` minimisers of the penalised objective over W; meaningless at a site without observations."""
    mass = portion * observed
    positive = mass.sum(axis=1) > 0

    def objective(tried: Array) -> tuple[Array, Array]:
        """``(s, k)`` values at ``(s, k, 1 + f)``, and ``(s, k, n)`` ``1 / m``."""
        exponent = tried @ design
        inverse = _exp(-exponent)
        distance = np.square(tried - start[:, None]) @ penalty
        return _sums(inverse, mass) + _sums(exponent, portion) + 0.5 * distance, inverse

    coefficients = start
    value, inverse = (each[:, 0] for each in objective(start[:, None]))
    for _ in range(ITERATIONS):
        relative = mass * inverse
        downhill = _sums(design, relative - portion) - penalty * (coefficients - start)
        hessian = (relative[:, None] * design) @ design.transpose(0, 2, 1) + np.diag(penalty)
        damping = DAMPING * hessian.max(axis=(1, 2), keepdims=True).clip(min=1.0) * np.eye(len(penalty))
        step = np.linalg.solve(hessian + damping, downhill[..., None])[..., 0]
        decrement = np.where(positive, (step * downhill).sum(axis=1), 0.0)  # twice what the step should lower
        tried = (coefficients + step)[:, None]
        values, inverses = objective(tried)
        if (values[:, 0] > value - 0.25 * decrement).any():
            tried = coefficients[:, None] + LENGTHS * step[:, None]
            values, inverses = objective(tried)
        best = (np.arange(len(start)), values.argmin(axis=1))
        coefficients, value, inverse = tried[best], values[best], inverses[best]
        if decrement.max() < 1e-7:
            break
    return coefficients


def _lines(features: Tensor) -> Array:
    """``(s, f, n)``, a line for each feature."""
    return features.double().numpy().transpose(0, 2, 1)


def _sums(lines: Array, weights: Array) -> Array:
    """``(s, k)`` weighted sums of ``(s, k, n)`` lines with ``(s, n)`` weights."""
    return np.asarray((lines @ weights[..., None])[..., 0])


def _design(lines: Array, centre: Array, spread: Array) -> Array:
    """``(s, 1 + f, n)``, a line for each coefficient."""
    standardised = (lines - centre[..., None]) / spread[..., None]
    return np.concatenate([np.ones_like(standardised[:, :1]), standardised], axis=1)


def _mean(design: Array, coefficients: Array) -> Array:
    return _exp((coefficients[:, None] @ design)[:, 0])


def _exp(exponent: Array) -> Array:
    return np.exp(exponent.clip(-LARGEST_EXPONENT, LARGEST_EXPONENT))
