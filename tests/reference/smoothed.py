"""The gradient that the estimators are unbiased for, by autograd, and the check that they are.

With noise of width sigma at its places a network has the smoothed loss ``(1/B) sum_b E[L_b]``; its gradient in the
parameters is the expectation of the likelihood-ratio estimate, at any sigma.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

from flops_lightning.strategies import LikelihoodRatio, Site
from tests.reference.likelihood_ratio import Place, places_of
from tests.reference.networks import Loss, autograd_gradient, gradients, squared_error, token_network

LARGEST_ERROR = 0.02
"""Largest standard error of the slope with which a test may say anything."""

LARGEST_RISK = 1e-4
"""Probability that some entry of an unbiased estimate is called biased (Bonferroni over the entries)."""


@dataclass(frozen=True)
class Sampled:
    """Mean of repeated draws ``(k, n)`` of a gradient, and the standard error of each of its entries."""

    draws: Tensor

    @property
    def mean(self) -> Tensor:
        return self.draws.mean(0)

    @property
    def error(self) -> Tensor:
        return self.draws.std(0) / len(self.draws) ** 0.5


def smoothed_gradient(
    module: nn.Module, loss: Loss, x: Tensor, y: Tensor, places: Sequence[Place], site: Site, *, copies: int, draws: int
) -> Sampled:
    """Gradient of the smoothed loss in a site's parameters: autograd through ``copies`` noisy copies of the batch."""
    generator = torch.Generator().manual_seed(12345)

    def mover(place: Place) -> Callable[..., Tensor]:
        def move(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            z = torch.zeros_like(output)
            place.active(z).normal_(generator=generator)
            return output + site.sigma * z

        return move

    parameters = list(site.parameters.values())
    found = []
    with ExitStack() as stack:
        for place in places:
            stack.callback(place.module.register_forward_hook(mover(place)).remove)
        for _ in range(draws):
            mean = loss(module(x.repeat(copies, *(1,) * (x.dim() - 1))), y.repeat(copies, *(1,) * (y.dim() - 1))).mean()
            found.append(flat(torch.autograd.grad(mean, parameters)))
    return Sampled(torch.stack(found))


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All entries in one vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def estimates(strategy: LikelihoodRatio, x: Tensor, y: Tensor, counts: Tensor, *, draws: int) -> dict[str, Sampled]:
    """Repeated estimates with fresh noise, by site."""
    found: dict[str, list[Tensor]] = {site.name: [] for site in strategy.sites}
    for _ in range(draws):
        strategy.estimate(strategy.clean_pass(x, y), counts)
        grads = gradients(strategy.network.module)
        for site in strategy.sites:
            found[site.name].append(flat([grads[name] for name in site.parameters]))
    return {name: Sampled(torch.stack(rows)) for name, rows in found.items()}


def true_gradients(
    strategy: LikelihoodRatio, x: Tensor, y: Tensor, *, copies: int = 1000, draws: int = 10
) -> dict[str, Sampled]:
    """What the estimates of each site should be on average."""
    module = strategy.network.module
    return {
        site.name: smoothed_gradient(
            module, strategy.loss, x, y, places_of(module, strategy, site), site, copies=copies, draws=draws
        )
        for site in strategy.sites
    }


def shifted_squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Squared error less an offset in the last column of the target: small losses, or `plain` would need a day."""
    return squared_error(output, target[:, :-1]) - target[:, -1]


def token_problem() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network on 3 tokens, 4 samples, and targets that leave clean losses of +-0.3."""
    net = token_network()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)
    y = 2 + torch.randn(4, 2, generator=generator, dtype=torch.float64)
    offset = squared_error(net(x), y).detach() - torch.tensor([0.3, -0.2, 0.2, -0.3])
    return net, x, torch.cat([y, offset[:, None]], dim=1)


def exact_gradients(strategy: Any, x: Tensor, y: Tensor) -> list[Sampled]:
    """By site, where sigma is so small that the smoothed loss is the loss."""
    truth = autograd_gradient(strategy.network.module, strategy.loss, x, y)
    return [Sampled(flat([truth[name] for name in site.parameters]).repeat(2, 1)) for site in strategy.sites]


def total_variance(draws: Tensor) -> tuple[float, float]:
    """Trace of the covariance of ``(k, n)`` draws of a gradient, and its standard error."""
    squares = (draws - draws.mean(0)).square().sum(1)
    return float(squares.sum() / (len(draws) - 1)), float(squares.std() / len(draws) ** 0.5)


def assert_unbiased(estimate: Sampled, truth: Sampled, *, largest_error: float = LARGEST_ERROR) -> None:
    """The regression of the estimate on the truth has slope 1, and no single entry is off.

    The slope ``<estimate, g> / <g, g>`` is taken for each draw; its standard error comes from their scatter.
    """
    g = truth.mean
    slopes = estimate.draws @ g / g.square().sum()
    doubt = (truth.draws @ g / g.square().sum()).std() / len(truth.draws) ** 0.5
    error = float((slopes.var() / len(slopes) + doubt**2).sqrt())
    slope = float(slopes.mean())
    assert error <= largest_error * max(1, abs(slope)), f"too noisy to tell: slope {slope:.3f}, error {error:.3f}"
    assert abs(slope - 1) < 4 * error, f"slope {slope:.3f} with standard error {error:.3f}"
    # Entries that are zero by symmetry (the bias of a key under softmax) have rounding errors for a standard error.
    scatter = (estimate.error.square() + truth.error.square()).sqrt() + 1e-9 * g.abs().max()
    deviation = float(((estimate.mean - g).abs() / scatter).max())
    bound = stats.t.isf(LARGEST_RISK / (2 * len(g)), df=len(estimate.draws) - 1)
    assert deviation < bound, f"an entry is off by {deviation:.1f} standard errors (at most {bound:.1f} by chance)"
