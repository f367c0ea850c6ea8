"""Forward gradients: exact directional derivatives instead of differences of losses (Baydin et al., 2022).

For a direction ``z`` with ``E z z^T = I`` the estimate is ``(dL_b . z) z``, unbiased without any sigma (Silver et al.,
2021). The derivative comes with the forward pass by ``torch.func.jvp``, at about the price of two passes and without
stored activations; network and loss must be differentiable.
"""

import warnings
from dataclasses import replace
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.network.functional import directional_derivative
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.queries import CleanPass, LossFunction, row_losses
from flops_lightning.strategies.backprop import without_derivative
from flops_lightning.strategies.engine import Q
from flops_lightning.strategies.likelihood_ratio import LikelihoodRatio
from flops_lightning.strategies.parameter_perturbation import ParameterPerturbation
from flops_lightning.strategies.parameter_queries import Losses, ParameterQueryResult, Response
from flops_lightning.strategies.perturbation import DrawNoise, Perturbation, perturbed_losses
from flops_lightning.strategies.query_strategy import QueryStrategy
from flops_lightning.strategies.site_queries import OutputQueryResult, SiteQueries
from flops_lightning.strategies.site_specs import SiteSpec
from flops_lightning.strategies.sites import LayerTarget, Site
from flops_lightning.strategies.widths import SiteWidth
from flops_lightning.suffix_loss import refuse_derivative


class _ExactDerivatives(QueryStrategy[Q]):
    """Queries without a noise width, for losses with a derivative."""

    passes_per_query = 2.0

    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        instead = "Use a strategy that needs no derivative, such as LikelihoodRatio."
        refuse_derivative(loss, "model.strategy", type(self).__name__, instead)
        for i, spec in enumerate(self.specs):
            if spec.sigma != SiteSpec.sigma:
                what = f"model.strategy.sites[{i}].sigma = {spec.sigma:g}"
                warnings.warn(f"{what} has no effect: derivatives are exact.", stacklevel=2)
        super().bind(network, loss)
        self.sites = tuple(replace(site, sigma=0.0) for site in self.sites)

    def clean_pass(self, inputs: Any, targets: Any) -> CleanPass:
        first = self._costs is None
        clean = super().clean_pass(inputs, targets)
        if first:
            _check_derivative(self.loss, clean)
        return clean


class ForwardMode(_ExactDerivatives[OutputQueryResult], LikelihoodRatio):
    """Forward gradients with directions in the activations at the output of sites (Ren et al., 2022).

    The parameters' gradient follows as for :class:`LikelihoodRatio`. All kinds of noise are unbiased here. Orthogonal
    directions give the exact gradient if a site has as many queries as features at all its tokens, up to 32.

    Example:
        >>> from flops_lightning import ForwardMode, SiteSpec, stage_network
        >>> from flops_lightning.strategies import NoiseSpec
        >>> network = torch.nn.Sequential(torch.nn.Linear(1, 2, bias=False))
        >>> site = SiteSpec(stages=["0"], kind="linear", queries_per_sample=2)
        >>> strategy = ForwardMode(sites=[site], noise=NoiseSpec(orthogonal=True), seed=0)
        >>> strategy.bind(stage_network(network), lambda output, target: (output - target).sum(1))
        >>> strategy.estimate(strategy.clean_pass(torch.tensor([[3.0]]), torch.zeros(1, 2))).queries
        2
        >>> [round(entry, 3) for entry in network[0].weight.grad.flatten().tolist()]
        [3.0, 3.0]
    """

    fixed = frozenset({"variant", "token_sigma", "learn_sigma", "exact_head", "compile_suffixes"})

    def __init__(self, **settings: Any) -> None:
        """Keep the settings, those of :class:`LikelihoodRatio`; the ``sigma`` of sites has no effect."""
        super().__init__(
            variant="baseline", token_sigma=False, learn_sigma=0.0, exact_head=False, compile_suffixes=False, **settings
        )

    @property
    def engine(self) -> SiteQueries:
        """Runs the queries of a site, with these settings."""
        return _DerivativeQueries(**vars(super().engine))


class _DerivativeQueries(SiteQueries):
    """Weights of the noise are exact derivatives of the losses along it, in sigma at 0."""

    def weights(
        self, site: Site, clean: CleanPass, index: Tensor, draw: DrawNoise, real: Tensor, samples: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor, list[Perturbation]]:
        layers: list[LayerTarget | None] = []

        def losses(sigma: Tensor) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
            width = SiteWidth(sigma)
            of_batch = (self.network, self.loss, site, clean)
            values, perturbations = perturbed_losses(*of_batch, index, draw, width, samples)
            layers.extend(p.layer for p in perturbations)
            return values, [(p.z,) if p.x is None else (p.z, p.x) for p in perturbations]

        weights, noise = directional_derivative(losses, clean.loss.new_ones(()), has_aux=True)
        alive = torch.isfinite(weights) & torch.isfinite(clean.loss[index]) & real
        perturbations = [Perturbation(layer, *parts) for layer, parts in zip(layers, noise, strict=True)]
        return torch.where(alive, weights, 0.0), alive, perturbations


class WeightForwardMode(_ExactDerivatives[ParameterQueryResult], ParameterPerturbation):
    """Forward gradients with directions in the weights of sites, as in :class:`EvolutionStrategies`.

    Example:
        >>> from flops_lightning import SiteSpec, WeightForwardMode, stage_network
        >>> network = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
        >>> site = SiteSpec(stages=["0"], queries_per_sample=20_000)
        >>> strategy = WeightForwardMode(sites=[site], layout="factored", chunk_rows=20_000, seed=0)
        >>> strategy.bind(stage_network(network), lambda output, target: (output - target)[:, 0])
        >>> strategy.estimate(strategy.clean_pass(torch.tensor([[3.0]]), torch.tensor([[0.0]]))).queries
        20000
        >>> round(network[0].weight.grad.item())  # the derivative of 3 w
        3
    """

    fixed = frozenset({"sigma", "variant", "pairing", "compile_suffixes"})

    def __init__(self, **settings: Any) -> None:
        """Keep the settings, those of :class:`ParameterPerturbation`; the ``sigma`` of sites has no effect."""
        super().__init__(sigma=0.0, variant="baseline", pairing="split", compile_suffixes=False, **settings)

    @property
    def response(self) -> Response:
        """Derivatives along the directions."""
        return _Derivative(self.variant)


class _Derivative(Response):
    """Weight of a row's direction: the derivative of the loss along it at ``theta``, exact."""

    in_place: ClassVar[bool] = False

    def values(self, losses: Losses, sigma: float, signs: Tensor) -> Tensor:
        del sigma
        return cast("Tensor", directional_derivative(losses, signs))

    def weights(self, values: Tensor, clean: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        del sigma
        alive = torch.isfinite(values) & torch.isfinite(clean)
        return torch.where(alive, values, 0.0), alive


def _check_derivative(loss: LossFunction, clean: CleanPass) -> None:
    # Forward mode would return zero derivatives, and the run would learn nothing, silently.
    problem = ""
    with torch.enable_grad():
        try:
            known = row_losses(loss, clean.output.detach().requires_grad_(True), clean.targets).requires_grad
        except RuntimeError as error:  # it leaves torch
            known, problem = False, f" ({error})"
    if not known:
        raise without_derivative(loss, problem)
