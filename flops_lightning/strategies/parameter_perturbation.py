"""What evolution strategies, SPSA and forward gradients in the weights have in common: noise in the parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor

from flops_lightning.errors import SettingError, check_choice
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.noise.keys import NoiseKey
from flops_lightning.queries import CleanPass, LossFunction
from flops_lightning.strategies.base import Exchange
from flops_lightning.strategies.chunk_rows import RowsSetting
from flops_lightning.strategies.delta import Variant
from flops_lightning.strategies.factored_directions import FactoredDirections, SiteParts, site_parts
from flops_lightning.strategies.parameter_queries import DirectionLayout, ParameterQueries, QueriedParameters
from flops_lightning.strategies.pilots import PilotSpec
from flops_lightning.strategies.query_strategy import QueryStrategy, UpdateOrder
from flops_lightning.strategies.replaced_parameters import ReplacedParameters
from flops_lightning.strategies.shared_directions import SharedDirections
from flops_lightning.strategies.site_specs import SiteSpec, default_specs
from flops_lightning.strategies.sites import Site, resolve_sites

Layout = Literal["shared", "factored"]


class ParameterPerturbation(QueryStrategy[QueriedParameters]):
    """Gradient estimates from forward passes with noise in the parameters of sites.

    A query at a site runs the site itself and everything above it: what lies below is reused from the clean pass.
    """

    forward_mode = False

    def __init__(
        self,
        *,
        sites: Sequence[SiteSpec] = (),
        sigma: float = 0.0,
        variant: Variant = "baseline",
        layout: Layout = "shared",
        rank: int = 1,
        activation_guided: bool = False,
        span: int = 0,
        update: UpdateOrder = "simultaneous",
        pilots: PilotSpec | None = None,
        exchange: Exchange = "gradients",
        chunk_rows: RowsSetting = 256,
        compile_suffixes: bool = False,
        seed: int | None = None,
    ) -> None:
        """Keep the settings; see the subclasses.

        Raises:
            SettingError: an unknown layout, or a setting that the layout does not use.
        """
        super().__init__(
            sites=sites, variant=variant, update=update, pilots=pilots, chunk_rows=chunk_rows,
            compile_suffixes=compile_suffixes, seed=seed,
        )  # fmt: skip
        if not (sigma >= 0 and math.isfinite(sigma)):
            raise SettingError("strategy.sigma", sigma, "is no width.", "Write for example 1.0e-3, or 0.")
        self.sigma = sigma
        check_choice("strategy.layout", layout, get_args(Layout))
        for name, value, unused, needs in (
            ("rank", rank, 1, layout == "factored"),
            ("activation_guided", activation_guided, False, layout == "factored"),
            ("span", span, 0, activation_guided),
            ("exchange", exchange, "gradients", layout == "shared"),
        ):
            if value != unused and not needs:
                remedy = {"span": "activation_guided: true", "exchange": "layout: shared"}.get(name, "layout: factored")
                raise SettingError(f"strategy.{name}", value, "has no effect here.", f"Remove it, or write {remedy}.")
        if rank < 1:
            raise SettingError("strategy.rank", rank, "is no rank.", "Write 1 or more.")
        if span < 0:
            raise SettingError("strategy.span", span, "is negative.", "Write 0 for the whole span.")
        check_choice("strategy.exchange", exchange, get_args(Exchange))
        self.exchange = exchange
        self.layout: Layout = layout
        self.rank_of_directions = rank
        self.activation_guided = activation_guided
        self.span = span
        self._replaced: ReplacedParameters | None = None
        self._parts: dict[str, SiteParts] = {}

    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        """Resolve sites and, in the factored layout, their layers.

        Raises:
            SettingError: see :func:`resolve_sites`, :func:`check_pilots` and :func:`site_parts`; or a guided
                convolution of several groups.
        """
        super().bind(network, loss)
        self._replaced = ReplacedParameters(network)
        if self.layout == "factored":
            self._parts = {site.name: site_parts(network, site) for site in self.sites}
            self._check_guided()

    def _check_guided(self) -> None:
        for layer in (layer for parts in self._parts.values() for layer in parts.layers if self.activation_guided):
            if layer.has_matrix and getattr(layer.module, "groups", 1) > 1:
                raise SettingError(
                    "strategy.activation_guided", True, f"{layer.name} is a convolution of several groups, each with "
                    "inputs of its own.", f"Freeze {layer.name!r}, or write activation_guided: false.",
                )  # fmt: skip

    def resolve_sites(self, network: StagedNetwork) -> tuple[Site, ...]:
        """Blocks and groups of stages, whose parameters are perturbed."""
        specs = self.specs or tuple(default_specs(network))
        specs = tuple(replace(spec, sigma=self.sigma) for spec in specs) if self.sigma else specs
        return resolve_sites(network, specs, in_parameters=True)

    def clean_pass(self, inputs: Tensor, targets: Tensor) -> CleanPass:
        """See :meth:`QueryStrategy.clean_pass`; activation-guided directions cost one more pass through their site."""
        first = self._costs is None
        clean = super().clean_pass(inputs, targets)
        if first and self.activation_guided:
            costs = self._known_costs
            inside = {s.name: costs.from_stage[s.first] - costs.from_stage[s.last + 1] for s in self.sites}
            self._costs = replace(costs, gradient=inside)
        return clean

    @property
    def engine(self) -> ParameterQueries:
        """What runs the queries of a site, with these settings."""
        return ParameterQueries(self._direction_layout, self.variant, self.chunk_rows, self.forward_mode)

    @property
    def _direction_layout(self) -> DirectionLayout:
        key = NoiseKey(self.seed, 0, "", self.rank)
        if self._replaced is None:
            raise RuntimeError("bind(network, loss) must come first.")
        if self.layout == "factored":
            return FactoredDirections(
                self.network, self._replaced, self._parts, self.loss, key, self.unit, self.rank_of_directions,
                self.activation_guided, self.span, self.chunk_rows, self.forward_mode,
            )  # fmt: skip
        return SharedDirections(
            self.network, self._replaced, self.loss, key, self.unit, self.chunk_rows, self.forward_mode,
            self.communicator if self.exchange == "losses" else None,
        )  # fmt: skip

    def site_scales(self, clean: CleanPass, metric: Mapping[str, Tensor] | None) -> list[float]:
        """Traces are those of the parameters' gradient: 1, or the mean weight, since directions are isotropic."""
        del clean
        if not metric:
            return [1.0] * len(self.sites)
        weights = [torch.cat([metric[name].flatten() for name in site.parameters]) for site in self.sites]
        return [float(each.mean()) for each in weights]
