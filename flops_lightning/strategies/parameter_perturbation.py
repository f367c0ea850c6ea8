"""Noise in the parameters, no autograd anywhere: :class:`EvolutionStrategies` (FLOPS, eq. 2), :class:`SPSA` (eq. 3)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.errors import SettingError, check_at_least, check_choice
from flops_lightning.network.functional import FunctionalStages
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.noise.keys import NoiseKey
from flops_lightning.queries import CleanPass, LossFunction
from flops_lightning.strategies.base import Exchange, Normalize
from flops_lightning.strategies.crossed import Pairing, check_crossed, crossed_results
from flops_lightning.strategies.delta import Variant
from flops_lightning.strategies.factored_directions import FactoredDirections
from flops_lightning.strategies.flipout_directions import FlipoutDirections
from flops_lightning.strategies.parameter_queries import ParameterQueries, ParameterQueryResult, Response, normalized
from flops_lightning.strategies.query_strategy import QueryStrategy
from flops_lightning.strategies.row_layers import SiteParts, row_remedy, site_parts
from flops_lightning.strategies.shared_directions import SharedDirections
from flops_lightning.strategies.site_directions import BY_ROW, Layout, with_directions
from flops_lightning.strategies.site_specs import default_specs
from flops_lightning.strategies.sites import Site, resolve_sites
from flops_lightning.strategies.subspace_directions import Bases, SubspaceDirections


class ParameterPerturbation(QueryStrategy[ParameterQueryResult]):
    """Gradient estimates from forward passes with noise in the parameters of sites.

    A query at a site runs the site itself and everything above it; what lies below is reused from the clean pass.
    """

    def __init__(
        self,
        *, sigma: float = 0.0, layout: Layout = "shared", rank: int = 1, activation_guided: bool = False, span: int = 0,
        refresh: int = 100, exchange: Exchange = "gradients", pairing: Pairing = "split", **settings: Any,
    ) -> None:  # fmt: skip
        """Keep the settings; :meth:`bind` checks them against the network.

        Args:
            sigma: Standard deviation of the noise at all sites, in place of their own; 0: their own.
            layout: For sites whose ``directions`` are not set; ``directions: own`` means ``factored``. ``shared``: one
                dense direction for each query index (or pair), used by all samples. ``factored``: each row (or pair)
                has its own direction, of low rank on linears and convolutions and dense on all other parameters.
                ``flipout``: one dense direction for each query index, with each sample's own random signs on inputs
                and outputs of linears (:mod:`flops_lightning.strategies.flipout_directions`). ``subspace``: shared
                directions in a random subspace of each matrix, as in ZO-Muon (unbiased for the part of the gradient in
                it, see :mod:`flops_lightning.strategies.subspace_directions`).
            rank: Rank of the factored directions; dimensions of the subspaces (64 in ZO-Muon).
            activation_guided: Draw the input factors in the span of the layer's own inputs (``factored`` only).
            span: Number of leading directions of that span to keep (biased); 0: all.
            refresh: Batches for which a subspace is kept (``subspace`` only).
            exchange: What processes send each other: ``gradients``, or ``losses`` (``shared`` and ``subspace`` only):
                one scalar per direction, whatever the number of parameters, from which every process draws the
                directions of all.
            pairing: For two sites, of which the upper has draws that are shared by the batch (text and image prompts).
                ``split``: each is perturbed while the other is clean. ``crossed``: every query of one with every query
                of the other (:mod:`flops_lightning.strategies.crossed`), for losses that are rounded.
            **settings: See :class:`QueryStrategy`; the parameters of a site, a block or a group, move together.
        """
        super().__init__(**settings)
        check_at_least("model.strategy.sigma", sigma, 0, "Write, for example, 1.0e-3, or 0 for the sites' own.")
        check_choice("model.strategy.layout", layout, get_args(Layout))
        check_choice("model.strategy.exchange", exchange, get_args(Exchange))
        check_choice("model.strategy.pairing", pairing, get_args(Pairing))
        for name, value, unused, used, needs in (
            ("rank", rank, 1, layout in ("factored", "subspace"), "layout: factored or subspace"),
            ("activation_guided", activation_guided, False, layout == "factored", "layout: factored"),
            ("span", span, 0, activation_guided, "activation_guided: true"),
            ("refresh", refresh, 100, layout == "subspace", "layout: subspace"),
            ("exchange", exchange, "gradients", layout not in BY_ROW, "layout: shared or subspace"),
        ):
            if value != unused and not used:
                needed = f"Remove it, or write {needs}."
                raise SettingError(f"model.strategy.{name}", value, "has no effect here.", needed)
        for name, value in (("rank", rank), ("refresh", refresh)):
            check_at_least(f"model.strategy.{name}", value, 1)
        check_at_least("model.strategy.span", span, 0, "Write 0 for the whole span.")
        self.sigma, self.exchange, self.rank_of_directions, self.pairing = sigma, exchange, rank, pairing
        self.layout, self.activation_guided, self.span = layout, activation_guided, span
        self.refresh_every, self._bases = refresh, Bases()
        self._stages: FunctionalStages | None = None
        self._parts: dict[str, SiteParts] = {}

    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        """Resolve sites and, in the layouts by row, their layers."""
        super().bind(network, loss)
        self._stages = FunctionalStages(network)
        if self.pairing == "crossed":
            pilots = self.pilots.queries
            check_crossed(self.sites, loss, variant=self.variant, update=self.update, pilots=pilots)
        moved = [site for site in self.sites if site.directions == "own" or self.layout in BY_ROW]
        moved = [site for site in moved if site.directions != "shared"]
        if moved and self.exchange == "losses":
            problem = "needs directions that all samples share, but rows have their own at"
            remedy = "Write directions: shared at this site, or exchange: gradients."
            raise SettingError("model.strategy.exchange", self.exchange, f"{problem} {moved[0].name!r}.", remedy)
        if self.layout == "factored" and not moved:
            for name, value, unused in (
                ("activation_guided", self.activation_guided, False),
                ("rank", self.rank_of_directions, 1),
            ):
                if value != unused:
                    problem = "has no effect: all samples share the directions of every site."
                    remedy = "Remove it, or write directions: own at a site."
                    raise SettingError(f"model.strategy.{name}", value, problem, remedy)
        self._parts = {site.name: site_parts(network, site, self.layout) for site in moved}
        if moved:
            self.check_layers(network.unfit or {})
            for layer in (layer for parts in self._parts.values() for layer in parts.layers if self.activation_guided):
                if layer.has_matrix and getattr(layer.module, "groups", 1) > 1:
                    raise SettingError(
                        "model.strategy.activation_guided", True,
                        f"{layer.name} is a convolution of several groups, each "
                        "with inputs of its own.", f"Freeze {layer.name!r}, or write activation_guided: false.",
                    )  # fmt: skip

    @property
    def moved_layers(self) -> list[str]:
        """See :attr:`SiteStrategy.moved_layers`: those of the layouts by row."""
        return [layer.name for parts in self._parts.values() for layer in parts.layers]

    def check_layers(self, unfit: Mapping[str, str]) -> None:
        """See :meth:`SiteStrategy.check_layers`."""
        for name in self.moved_layers:
            if name in unfit:
                remedy = row_remedy(self.layout)
                raise SettingError(
                    "model.strategy.layout", self.layout, f"{name} {unfit[name]}", f"Freeze it, or {remedy}"
                )

    def resolve_sites(self, network: StagedNetwork) -> tuple[Site, ...]:
        """Blocks and groups of stages, whose parameters are perturbed."""
        specs = self.specs or tuple(default_specs(network, in_parameters=True))
        specs = tuple(replace(spec, sigma=self.sigma) for spec in specs) if self.sigma else specs
        return tuple(
            with_directions(network, s, self.layout) for s in resolve_sites(network, specs, in_parameters=True)
        )

    def clean_pass(self, inputs: Any, targets: Any) -> CleanPass:
        """See :meth:`QueryStrategy.clean_pass`.

        Activation-guided directions cost one more pass through their site, flipout's one more for each query.
        """
        first = self._costs is None
        clean = super().clean_pass(inputs, targets)
        if first and (self.activation_guided or self.layout == "flipout"):
            costs = self._known_costs
            inside = {s.name: costs.from_stage[s.first] - costs.from_stage[s.last + 1] for s in self.sites}
            if self.activation_guided:
                guided = {name: inside[name] for name in self._parts}
                self._costs = replace(costs, gradient={**costs.gradient, **guided})
            else:
                more = {name: costs.query[name] + self.passes_per_query * cost for name, cost in inside.items()}
                self._costs = replace(costs, query=more)
        return clean

    @property
    def response(self) -> Response:
        """How a query's loss becomes the weight of its direction."""
        return Response(self.variant)

    @property
    def engine(self) -> ParameterQueries:
        """Runs the queries of a site, with these settings."""
        if self._stages is None:
            raise RuntimeError("bind(network, loss) must come first.")
        key = NoiseKey(self.seed, 0, "", self.rank, self.generator)
        shared = (self.network, self._stages, self.loss, key, self.unit, self.chunk_rows, self.response)
        if self.layout == "flipout":
            flipout = FlipoutDirections(*shared, self._parts, rank=1, guided=False, span=0, layout=self.layout)
            return ParameterQueries(lambda _: flipout)
        ranks = self.communicator if self.exchange == "losses" else None
        if self.layout == "subspace":
            subspace = SubspaceDirections(*shared, ranks, self.rank_of_directions, self.refresh_every, self._bases)
            return ParameterQueries(lambda _: subspace)
        factored = (self._parts, self.rank_of_directions, self.activation_guided, self.span, self.layout)
        own, together = FactoredDirections(*shared, *factored), SharedDirections(*shared, ranks)
        return ParameterQueries(lambda site: own if site.directions == "own" else together)

    def paired_queries(
        self, clean: CleanPass, counts: NDArray[np.int64], places: Sequence[int], *, traces: bool
    ) -> Mapping[str, ParameterQueryResult]:
        """See :meth:`QueryStrategy.paired_queries`."""
        if self.pairing == "split":
            return {}
        if len(places) < len(self.sites):
            problem, names = "pairs the queries of both sites.", [self.sites[i].name for i in places]
            raise SettingError("sites", names, f"pairing: crossed {problem}", "Name both, or write pairing: split.")
        upper = self.sites[1]
        rows, draws = int(counts[0].sum()), upper.number(counts[1])
        self.meter.add(upper.name, forward_equivalents=rows * draws * self._known_costs.query[upper.name])
        return crossed_results(self.engine, self.sites, clean, counts, traces=traces)

    def site_scales(self, clean: CleanPass, metric: Mapping[str, Tensor] | None) -> list[float]:
        """Traces are those of the parameters' gradient: 1, or the mean weight, since directions are isotropic."""
        del clean
        if not metric:
            return [1.0] * len(self.sites)
        weights = [torch.cat([metric[name].flatten() for name in site.parameters]) for site in self.sites]
        return [float(each.mean()) for each in weights]


class EvolutionStrategies(ParameterPerturbation):
    """One-sided estimates with noise in the parameters: FLOPS (Ren et al., ICLR 2025), eq. 2; Salimans et al., 2017.

    With noise ``z ~ N(0, I)`` and width ``sigma`` on the parameters of a site, for sample ``b`` with ``A_b`` queries::

        g_b = 1 / A_b  sum_q (L_b(theta + sigma z_q) - c_bq) z_q / sigma        grad = 1 / B  sum_b g_b

    ``c_bq`` is 0 (``plain``, the paper's), the clean loss (``baseline``) or the mean of the sample's other queries
    (``leave_one_out``, which does not need the clean loss).

    Example:
        >>> from flops_lightning import EvolutionStrategies, SiteSpec, stage_network
        >>> network = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
        >>> site = SiteSpec(stages=["0"], sigma=1e-3, queries_per_sample=20_000)
        >>> strategy = EvolutionStrategies(sites=[site], layout="factored", chunk_rows=20_000, seed=0)
        >>> strategy.bind(stage_network(network), lambda output, target: (output - target)[:, 0])
        >>> strategy.estimate(strategy.clean_pass(torch.tensor([[3.0]]), torch.tensor([[0.0]]))).queries
        20000
        >>> round(network[0].weight.grad.item())  # the derivative of 3 w
        3
    """

    def __init__(self, *, variant: Variant = "baseline", **settings: Any) -> None:
        """Keep the settings.

        Args:
            variant: The control variate: ``plain`` (none), ``baseline`` (clean loss), ``leave_one_out``.
            **settings: See :class:`ParameterPerturbation`.
        """
        if variant == "antithetic":
            remedy = "Use strategy SPSA, or variant: baseline."
            raise SettingError("model.strategy.variant", variant, "is the estimator SPSA.", remedy)
        super().__init__(variant=variant, **settings)


class SPSA(ParameterPerturbation):
    """Two-sided estimates with noise in the parameters: FLOPS (Ren et al., ICLR 2025), eq. 3; Spall, 1992.

    With pairs of queries ``+z_p`` and ``-z_p``, ``z ~ N(0, I)``, on the parameters of a site, ``n_b = A_b / 2``::

        g_b = 1 / n_b  sum_p [L_b(theta + sigma z_p) - L_b(theta - sigma z_p)] z_p / (2 sigma)
        grad = 1 / B  sum_b g_b

    This is eq. 3 for ``z ~ N(0, I)``; the paper prints it for ``N(0, sigma^2)``, where its factor is off by sigma. As
    ``z`` and ``-z`` are equally likely, ``E L(theta - sigma z) z = -E L(theta + sigma z) z``, so the expectation is
    that of the one-sided estimate (eq. 2), ``E L(theta + sigma z) z / sigma``.

    ``normalize: std`` divides the estimate of each site by the standard deviation of the weights
    ``[L_b(theta + sigma z_p) - L_b(theta - sigma z_p)] / (2 sigma)`` over the batch (of all processes). Each sample
    counts the same, however many pairs it has. With a fixed learning rate, steps are then long where samples agree or
    the loss is flat. With ``layout: flipout``, one pair per sample and plain SGD it is GRZO (arXiv 2606.02857), which
    divides by the spread of the loss differences: its learning rate is ``2 sigma`` times ours. If all weights of a
    batch are equal, for example with one sample and one pair, the estimate is zero.

    Example:
        >>> from flops_lightning import SPSA, SiteSpec, stage_network
        >>> network = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False))
        >>> site = SiteSpec(stages=["0"], sigma=1e-3, queries_per_sample=20_000)
        >>> strategy = SPSA(sites=[site], layout="factored", chunk_rows=20_000, seed=0)
        >>> strategy.bind(stage_network(network), lambda output, target: (output - target)[:, 0])
        >>> strategy.estimate(strategy.clean_pass(torch.tensor([[3.0]]), torch.tensor([[0.0]]))).queries
        20000
        >>> round(network[0].weight.grad.item())  # the derivative of 3 w
        3
    """

    fixed = frozenset({"variant"})

    def __init__(self, *, normalize: Normalize = "none", **settings: Any) -> None:
        """Keep the settings.

        Args:
            normalize: ``none``, or ``std``: divide by the standard deviation over the batch.
            **settings: See :class:`ParameterPerturbation`.
        """
        super().__init__(variant="antithetic", **settings)
        check_choice("model.strategy.normalize", normalize, get_args(Normalize))
        if normalize == "std" and self.pilots.queries:
            problem = "divides by the spread of a step's weights, which is another one for pilots."
            raise SettingError("model.strategy.normalize", normalize, problem, "Write pilots: {queries: 0}, or none.")
        self.normalize = normalize

    def rescaled(self, clean: CleanPass, result: ParameterQueryResult | None) -> ParameterQueryResult | None:
        """See :func:`normalized`."""
        return normalized(result, clean, self.communicator) if self.normalize == "std" else result

    def derivative_along(self, clean: CleanPass, directions: Mapping[str, Tensor]) -> Tensor:
        """See :meth:`QueryStrategy.derivative_along`; refused for a gradient of another length."""
        if self.normalize == "std":
            problem = "changes the length of the gradient, from which the number of queries would be chosen."
            raise SettingError("model.strategy.normalize", "std", problem, "Write none, or budget: {rule: fixed}.")
        return super().derivative_along(clean, directions)
