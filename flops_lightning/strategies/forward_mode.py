"""Forward gradients: exact directional derivatives instead of differences of losses (Baydin et al., 2022).

For a direction ``z`` with ``E z z^T = I`` the estimate is ``(dL_b . z) z``, unbiased without any sigma (Silver et al.,
2021). The derivative comes with the forward pass by ``torch.func.jvp``, at about the price of two passes and without
stored activations; network and loss must be differentiable. ``ForwardMode`` perturbs activities (Ren et al., 2022): the
parameters' gradient follows as for :class:`LikelihoodRatio`. ``WeightForwardMode`` perturbs weights, as
:class:`EvolutionStrategies` does.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.noise.kinds import NoiseSpec
from flops_lightning.queries import CleanPass, LossFunction, row_losses
from flops_lightning.strategies.base import Exchange
from flops_lightning.strategies.chunk_rows import RowsSetting
from flops_lightning.strategies.likelihood_ratio import LikelihoodRatio
from flops_lightning.strategies.parameter_perturbation import Layout, ParameterPerturbation
from flops_lightning.strategies.pilots import PilotSpec
from flops_lightning.strategies.query_strategy import UpdateOrder
from flops_lightning.strategies.site_queries import SiteQueries
from flops_lightning.strategies.site_specs import SiteSpec
from flops_lightning.strategies.sites import Site

PASSES = 2.0
"""Forward passes that a pass with a tangent costs, about."""


class ForwardMode(LikelihoodRatio):
    """Forward gradients with directions in the activity at the output of sites."""

    passes_per_query = PASSES

    def __init__(
        self,
        *,
        sites: Sequence[SiteSpec] = (),
        update: UpdateOrder = "simultaneous",
        pilots: PilotSpec | None = None,
        noise: NoiseSpec | None = None,
        chunk_rows: RowsSetting = 256,
        seed: int | None = None,
    ) -> None:
        """Keep the settings; they meet the network in :meth:`bind`.

        Args:
            sites: Where directions enter, as for ``LikelihoodRatio``; ``sigma`` has no effect.
            update: See :class:`QueryStrategy`.
            pilots: Queries spent before the allocation.
            noise: Kind of directions; None: dense and Gaussian. All kinds are unbiased here. Orthogonal ones give the
                exact gradient with as many queries as a site has features at all its tokens, up to 32.
            chunk_rows: Upper bound of the rows in one forward pass; never changes the estimate.
                ``auto``: as many as suit the device, chosen at the first batch.
            seed: Seed of all directions; None: the seed of ``seed_everything``.

        Raises:
            SettingError: an unknown update or kind of noise, orthogonal noise with pilots, or fewer than two rows in a
                chunk.
        """
        super().__init__(sites=sites, update=update, pilots=pilots, noise=noise, chunk_rows=chunk_rows, seed=seed)
        _warn_of_sigma(self.specs)

    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        """Resolve sites; their directions have no width."""
        super().bind(network, loss)
        self._sites = _without_width(self._sites)

    def clean_pass(self, inputs: Tensor, targets: Tensor) -> CleanPass:
        """Run the batch unperturbed.

        Raises:
            SettingError: at the first batch: the loss has no derivative.
        """
        first = self._costs is None
        clean = super().clean_pass(inputs, targets)
        if first:
            _check_derivative(self.loss, clean)
        return clean

    @property
    def site_queries(self) -> SiteQueries:
        """What runs the queries of a site, with these settings."""
        return replace(super().site_queries, forward_mode=True)


class WeightForwardMode(ParameterPerturbation):
    """Forward gradients with directions in the weights of sites."""

    passes_per_query = PASSES
    forward_mode = True

    def __init__(
        self,
        *,
        sites: Sequence[SiteSpec] = (),
        layout: Layout = "shared",
        rank: int = 1,
        activation_guided: bool = False,
        span: int = 0,
        update: UpdateOrder = "simultaneous",
        pilots: PilotSpec | None = None,
        exchange: Exchange = "gradients",
        chunk_rows: RowsSetting = 256,
        seed: int | None = None,
    ) -> None:
        """Keep the settings; they meet the network in :meth:`bind`.

        Args:
            sites: Stages whose parameters get directions together, as for ``EvolutionStrategies``; ``sigma`` has no
                effect.
            layout: ``shared`` or ``factored``, see ``EvolutionStrategies``.
            rank: Rank of the factored directions.
            activation_guided: Draw the input factors in the span of the layer's own inputs (``factored`` only).
            span: So many leading directions of that span (biased); 0: all of it.
            update: See :class:`QueryStrategy`.
            pilots: Queries spent before the allocation.
            exchange: What several processes tell each other: ``gradients``, or ``losses`` (``shared`` only): a scalar
                a direction, and every process draws the directions of all. Bytes do not depend on the parameters.
            chunk_rows: Upper bound of the rows in one forward pass; never changes the estimate.
                ``auto``: as many as suit the device, chosen at the first batch.
            seed: Seed of all directions; None: the seed of ``seed_everything``.

        Raises:
            SettingError: an unknown word, or a setting without effect.
        """
        super().__init__(
            sites=sites, layout=layout, rank=rank, activation_guided=activation_guided, span=span, update=update,
            pilots=pilots, exchange=exchange, chunk_rows=chunk_rows, seed=seed,
        )  # fmt: skip
        _warn_of_sigma(self.specs)

    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        """Resolve sites; their directions have no width."""
        super().bind(network, loss)
        self._sites = _without_width(self._sites)

    def clean_pass(self, inputs: Tensor, targets: Tensor) -> CleanPass:
        """Run the batch unperturbed.

        Raises:
            SettingError: at the first batch: the loss has no derivative.
        """
        first = self._costs is None
        clean = super().clean_pass(inputs, targets)
        if first:
            _check_derivative(self.loss, clean)
        return clean


def _check_derivative(loss: LossFunction, clean: CleanPass) -> None:
    # Forward mode would find slopes of zero, and a run would learn nothing without a word.
    problem = ""
    with torch.enable_grad():
        try:
            known = row_losses(loss, clean.output.detach().requires_grad_(True), clean.targets).requires_grad
        except RuntimeError as error:  # it leaves torch
            known, problem = False, f" ({error})"
    if not known:
        raise SettingError(
            "loss", getattr(loss, "__name__", type(loss).__name__), f"has no derivative{problem}.",
            "Use a strategy that needs none, such as LikelihoodRatio, or a loss such as cross-entropy.",
        )  # fmt: skip


def _without_width(sites: Sequence[Site]) -> tuple[Site, ...]:
    return tuple(replace(site, sigma=0.0) for site in sites)


def _warn_of_sigma(specs: Sequence[SiteSpec]) -> None:
    for i, spec in enumerate(specs):
        if spec.sigma != SiteSpec.sigma:
            warnings.warn(
                f"strategy.sites[{i}].sigma = {spec.sigma:g} has no effect: derivatives are exact.", stacklevel=3
            )
