"""Cosine of estimates with the gradient at one component, by forward passes with noise."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from experiments.components import Alone, Component, Noise, output_site
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.queries import LossFunction
from flops_lightning.strategies import SPSA, Backprop, LikelihoodRatio, SiteSpec

Estimator = Literal["lr", "spsa", "spsa_factored"]
"""``spsa``: dense directions that the batch shares. ``spsa_factored``: each pair has one of rank one for itself."""


@dataclass(frozen=True)
class Drawn:
    """Estimates of one batch's gradient.

    Attributes:
        cosine: ``mean <g_hat, g> / (||g|| sqrt(mean ||g_hat||^2))``, the quantity that is predicted.
        error: Its standard error, by the jackknife over the draws.
        mean: Mean of the estimates' own cosines, which lies below.
    """

    cosine: float
    error: float
    mean: float

    @classmethod
    def of(cls, estimates: Tensor, exact: Tensor) -> "Drawn":
        """From ``(k, n)`` estimates, two or more, and the ``(n,)`` gradient, float64."""
        k = len(estimates)
        along, square = estimates @ exact / exact.norm(), estimates.square().sum(1)
        whole = along.mean() / square.mean().sqrt()
        without = (along.sum() - along) / (k - 1) / ((square.sum() - square) / (k - 1)).sqrt()
        error = ((k - 1) * without.var(correction=0)).sqrt()
        mean = cosine_similarity(estimates, exact[None]).mean()
        return cls(float(whole), float(error), float(mean))


def draw(
    network: StagedNetwork, loss: LossFunction, batch: tuple[Tensor, Tensor], component: Component, *,
    noise: Noise, estimator: Estimator, queries: int, draws: int, sigma: float, seed: int, chunk_rows: int,
) -> Drawn:  # fmt: skip
    """Estimate a batch's gradient at a component again and again, with ``queries`` for every sample."""
    alone = Alone.of(network, component, noise=noise, parameters=estimator != "lr")
    settings: dict[str, Any] = {"seed": seed, "chunk_rows": chunk_rows}
    width: dict[str, Any] = {"sigma": sigma, "queries_per_sample": queries}
    strategy: LikelihoodRatio | SPSA
    if estimator == "lr":
        strategy = LikelihoodRatio(sites=[output_site(alone.stage, alone.module, **width)], **settings)
    else:
        layout: Any = "shared" if estimator == "spsa" else "factored"
        strategy = SPSA(sites=[SiteSpec(stages=[alone.stage], kind="block", **width)], layout=layout, **settings)
    strategy.bind(alone.network, loss)
    clean = strategy.clean_pass(*batch)
    found = []
    for i in range(draws):  # noise is keyed by the draw
        strategy.estimate(replace(clean, draw=i))
        found.append(_taken(alone))
    exact = Backprop()
    exact.bind(alone.network, loss)
    exact.estimate(exact.clean_pass(*batch))
    return Drawn.of(torch.stack(found), _taken(alone))


def _taken(alone: Alone) -> Tensor:
    """The gradient at the rows, which is taken away."""
    gradient = alone.weight.grad
    assert gradient is not None
    for parameter in alone.network.module.parameters():
        parameter.grad = None
    return gradient[alone.rows].double().flatten()
