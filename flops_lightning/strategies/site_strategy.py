"""What strategies with sites share before any query: settings, binding to a network, budget, clean passes, state."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from flops_lightning.errors import SettingError, check_choice
from flops_lightning.meter import CLEAN
from flops_lightning.network.compilation import CompiledNetwork, check_compiler
from flops_lightning.network.layers import layers_unlike_rows
from flops_lightning.network.rows import as_rows
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.noise.keys import NoiseKey
from flops_lightning.protocol import QueryBudget
from flops_lightning.queries import CleanPass, LossFunction, clean_pass, refresh, rows_of
from flops_lightning.settings import read_settings
from flops_lightning.strategies.base import ChunkedStrategy, refuse_second_network
from flops_lightning.strategies.costs import SiteCosts
from flops_lightning.strategies.delta import Variant
from flops_lightning.strategies.pilots import PilotSpec, check_pilots
from flops_lightning.strategies.precision import warn_unresolved_sigma
from flops_lightning.strategies.site_specs import SiteSpec
from flops_lightning.strategies.sites import Site, resolve_sites
from flops_lightning.strategies.statistics import OptionalStatistics
from flops_lightning.suffix_loss import SuffixLoss

UpdateOrder = Literal["simultaneous", "site_by_site"]


class SiteStrategy(ChunkedStrategy):
    """A strategy whose noise enters at sites.

    Attributes:
        passes_per_query: What a query costs, in forward passes of its suffix.
    """

    passes_per_query: float = 1.0
    least_rows = 2

    def __init__(
        self, *, sites: Sequence[SiteSpec] = (), variant: Variant = "baseline", update: UpdateOrder = "simultaneous",
        pilots: PilotSpec | None = None, compile_suffixes: bool = False, **settings: Any,
    ) -> None:  # fmt: skip
        """Keep the settings; :meth:`bind` checks them against the network.

        Args:
            sites: Where noise enters; empty: the paper's layout (three groups and the head).
            variant: The control variate: ``plain`` (none), ``baseline`` (clean loss), ``leave_one_out``,
                ``antithetic``.
            update: All sites from the same network and one optimiser step, or one step for each site, from the top
                down, with new losses in between (FLOPS, algorithm 1).
            pilots: Queries spent before the allocation.
            compile_suffixes: Run the network above a site through ``torch.compile``, which takes seconds to minutes
                at the first step and again for each other number of rows. Hooks added to the network later are ignored
                there.
            **settings: See :class:`ChunkedStrategy`.
        """
        super().__init__(**settings)
        check_choice("model.strategy.variant", variant, get_args(Variant))
        check_choice("model.strategy.update", update, get_args(UpdateOrder))
        self.specs = tuple(read_settings(SiteSpec, spec, f"model.strategy.sites[{i}]") for i, spec in enumerate(sites))
        self.variant: Variant = variant
        self.update: UpdateOrder = update
        self.pilots = read_settings(PilotSpec, pilots, "model.strategy.pilots")
        self.compile_suffixes = compile_suffixes
        self._costs: SiteCosts | None = None
        self._statistics = OptionalStatistics()

    def resolve_sites(self, network: StagedNetwork) -> tuple[Site, ...]:
        """The sites of a network."""
        return resolve_sites(network, self.specs)

    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        """Resolve sites and pilots."""
        refuse_second_network(getattr(self, "network", None), network)
        if not all(spec.active_tokens for spec in self.specs):
            network = network.with_all_tokens()
        self.sites = self.resolve_sites(network)
        self.network, self.loss = network, loss
        if self.compile_suffixes:
            self.network, self.loss = self._compiled(network, loss)
        self._costs, self._statistics = None, OptionalStatistics()
        self.check_layers(network.unfit or {})
        for site in self.sites:
            queries = site.queries_per_sample
            if isinstance(queries, int) and (queries % self.unit or queries < self._least):
                problem = f"is odd at site {site.name!r}, and antithetic queries come in pairs."
                if self.variant == "leave_one_out":
                    problem = f"leaves no other query to compare with at site {site.name!r} (leave_one_out)."
                remedy = "Write an even number."
                raise SettingError("model.strategy.sites.queries_per_sample", queries, problem, remedy)
            if self.variant == "leave_one_out" and site.together:
                raise SettingError(
                    "model.strategy.variant", self.variant,
                    f"cannot centre the jointly perturbed layers of {site.name!r}, "
                    "whose inputs differ from query to query.", "Use variant: baseline, or together: false.",
                )  # fmt: skip
        if self.pilots.queries:
            check_pilots(self.pilots, self.sites, unit=self.unit, one_update=self.update == "simultaneous")

    @property
    def moved_layers(self) -> list[str]:
        """Names of the layers whose outputs move, each row of them by noise of its own."""
        return [layer.name for site in self.sites for layer in site.layers]

    def check_layers(self, unfit: Mapping[str, str]) -> None:
        """Refuse layers whose outputs are not one line a row: the noise of one row would enter another."""
        for name in self.moved_layers:
            if name in unfit:
                remedy = "Train its stage with kind: block or group."
                raise SettingError("model.strategy.sites", name, unfit[name], remedy)

    def _compiled(self, network: StagedNetwork, loss: LossFunction) -> tuple[StagedNetwork, LossFunction]:
        compiled = CompiledNetwork(network)
        if isinstance(loss, SuffixLoss):
            return compiled, loss.compiled()
        if not any(compiled.compiles(site.last + 1) for site in self.sites if not site.layers):
            raise SettingError(
                "model.strategy.compile_suffixes", True,
                "has no effect: there is no block or layer to compile above any site "
                "(sites of kind: linear run uncompiled, since compiled code ignores their hooks).",
                "Use several sites of kind: block or group, or write compile_suffixes: false.",
            )  # fmt: skip
        return compiled, loss

    @property
    def unit(self) -> int:
        """Queries per independent unit: 2 in antithetic pairs, else 1."""
        return 2 if self.variant == "antithetic" else 1

    @property
    def _least(self) -> int:
        """Fewest queries of a sample that estimate its gradient."""
        return 2 if self.variant == "leave_one_out" else 1

    @property
    def budget(self) -> QueryBudget:
        """Queries of a sample at each site, less the pilots."""
        names, minimum = self.pilots.names(self.sites), self._least if self._least > 1 else 0
        left = [site.queries_per_sample - self.pilots.queries * (site.name in names) for site in self.sites]
        sites = tuple(site.name for site in self.sites)
        shared = tuple(site.per_batch for site in self.sites)
        return QueryBudget(
            tuple(left), multiple=self.unit, minimum=minimum, sites=sites, shared=shared if any(shared) else ()
        )

    @property
    def update_groups(self) -> tuple[tuple[str, ...], ...]:
        """All sites at once, or one after the other from the top, so that the activations below stay valid."""
        names = tuple(site.name for site in (*self.sites, *self.exact_sites))
        return (names,) if self.update == "simultaneous" else tuple((name,) for name in reversed(names))

    def clean_pass(self, inputs: Any, targets: Any) -> CleanPass:
        """Run the batch unperturbed, keep the activations that sites start from, and advance the draw counter."""
        if not self.sites:
            raise RuntimeError("bind(network, loss) must come before the first clean_pass.")
        if self.compile_suffixes and self._costs is None:
            check_compiler(inputs.device)
        inputs = as_rows(inputs)
        if self._costs is None and self.network.unfit is None and self.moved_layers:
            self.check_layers(layers_unlike_rows(self.network, inputs))
        self._settle(inputs, targets)
        with rows_of(self.network, self.loss, NoiseKey(self.seed, self.draw, CLEAN, self.rank)):
            clean = clean_pass(
                self.network, self.loss, inputs, targets, keep=self._kept, draw=self.draw, rows=self.chunk_rows
            )
        clean.activations.setdefault(0, inputs)  # not a copy: from it all that was not kept can be run again
        if self._costs is None:
            counted = self._loss_costs.count(self.network, self.sites, inputs, self.loss, targets, self.communicator)
            query, context = (
                {name: cost * self.passes_per_query for name, cost in costs.items()}
                for costs in (counted.query, counted.context)
            )
            self._costs = replace(counted, query=query, context=context)
            warn_unresolved_sigma(self.sites, clean)
        self.draw += 1
        cost = self.pass_cost(clean) + self._known_costs.contexts
        self.meter.add(CLEAN, clean_passes=clean.batch_size, forward_equivalents=cost)
        return clean

    def pass_cost(self, clean: CleanPass, start: int = 0) -> float:
        """Cost of a forward pass of the batch from a stage to the losses, without contexts."""
        return self._known_costs.from_stage[start] * clean.batch_size + float(self.loss_costs(clean).sum())

    def query_costs(self, samples: int) -> dict[str, float]:
        """Cost of a query by site; where it is one direction for all, that of the direction for so many samples."""
        costs, mean = self._known_costs, self._loss_costs.mean
        return {
            site.name: costs.of(site, 1, samples) + mean * (samples if site.per_batch else 1) for site in self.sites
        }

    def loss_costs(self, clean: CleanPass) -> NDArray[np.float64]:
        """``(b,)`` what one query of each sample pays for a loss that is the rest of the network; zero for others."""
        return self._loss_costs.of(self.loss, clean.targets, clean.batch_size)

    def refresh(self, clean: CleanPass, updated: Sequence[str]) -> CleanPass:
        """The clean pass after the parameters of ``updated`` changed: their prefix is kept, the rest runs again."""
        places, exact = self._select(updated)
        start = min(site.first for site in (*(self.sites[i] for i in places), *exact))
        self.meter.add(CLEAN, forward_equivalents=self.pass_cost(clean, start))
        with rows_of(self.network, self.loss, NoiseKey(self.seed, clean.draw, CLEAN, self.rank)):
            return refresh(self.network, self.loss, clean, start, keep=self._kept, rows=self.chunk_rows)

    def _select(self, names: Sequence[str] | None) -> tuple[list[int], list[Site]]:
        """Places of the sites with these names (None: all) that spend queries, and the exact sites among them."""
        known = [site.name for site in (*self.sites, *self.exact_sites)]
        for name in names or ():
            if name not in known:
                raise SettingError("sites", name, "is not a site.", f"Choose from {known}.")
        if names is not None and not names:
            raise SettingError("sites", [], "names no site.", f"Choose from {known}, or leave it out for all.")
        chosen = known if names is None else names
        places = [i for i, site in enumerate(self.sites) if site.name in chosen]
        return places, [site for site in self.exact_sites if site.name in chosen]

    @property
    def _kept(self) -> set[int]:
        """Indices of the activations that sites and predictors start from."""
        entered = {i for site in self.sites for i in (site.first, site.start)}
        entered |= {site.first for site in self.exact_sites}
        return (entered | self._statistics.kept(self.network)) - {0}  # the inputs are there anyway

    @property
    def _known_costs(self) -> SiteCosts:
        if self._costs is None:
            raise RuntimeError("clean_pass must come first: it counts the costs.")
        return self._costs

    def state_dict(self) -> dict[str, Any]:
        """Draw counter, meter, the seed of the noise, and what was measured."""
        return super().state_dict() | self._statistics.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self._statistics.load_state_dict(state)
