"""The parameters of the Gaussian allocator, and the coordinates in which they are optimised."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class GaussianParameters:
    """The four parameters lambda of the Gaussian allocator; a common factor of the first three changes nothing.

    Attributes:
        beta0: Intercept of the mean, in queries.
        beta1: Slope of the mean in ``tanh(loss)``, in queries.
        sigma: Scale of the covariance, in queries.
        gamma: Decay of the covariance with the distance of the embeddings.
    """

    beta0: float
    beta1: float
    sigma: float
    gamma: float

    @classmethod
    def initial(cls, queries_per_sample: float) -> GaussianParameters:
        """The starting values of section 4.3, from the average number of queries ``Abar``."""
        return cls(queries_per_sample, queries_per_sample / 2, queries_per_sample / 5, 1.0)


def to_coordinates(parameters: GaussianParameters, centre: float, spread: float) -> Tensor:
    """``(3,)`` ``angle, ln(sigma), ln(gamma)`` for a batch whose feature has this mean and standard deviation."""
    # mu = beta0 + beta1 (centre + spread z) has the mean `level`, the standard deviation `tilt` and their hypotenuse as
    # its root mean square.
    level, tilt = parameters.beta0 + parameters.beta1 * centre, parameters.beta1 * spread
    sigma = parameters.sigma / math.hypot(level, tilt)
    return torch.tensor([math.atan2(tilt, level), math.log(sigma), math.log(parameters.gamma)], dtype=torch.float64)


def from_coordinates(coordinates: Tensor, centre: float, spread: float, queries: float) -> GaussianParameters:
    """Lambda in the scale in which ``mu`` has the root mean square ``queries`` over the batch."""
    angle, log_sigma, log_gamma = coordinates.tolist()
    beta1 = queries * math.sin(angle) / spread
    return GaussianParameters(
        beta0=queries * math.cos(angle) - beta1 * centre,
        beta1=beta1,
        sigma=queries * math.exp(log_sigma),
        gamma=math.exp(log_gamma),
    )
