"""What every strategy that spends queries at sites has in common: sites, budget, clean passes, pilots, statistics.

How the queries of one site are run, and what gradient follows from them, is the business of the strategy's engine
(:class:`QueryEngine`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Generic, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.errors import SettingError, check_choice
from flops_lightning.meter import CLEAN
from flops_lightning.network.compilation import CompiledNetwork, check_compiler
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.phases import phase
from flops_lightning.protocol import QueryBudget, SampleStatistics, TraceObservation
from flops_lightning.queries import CleanPass, LossFunction, clean_pass, refresh
from flops_lightning.strategies.base import (
    Estimate,
    ForwardGradientStrategy,
    add_gradients,
    refuse_second_network,
    resolve_seed,
    warn_silent,
)
from flops_lightning.strategies.chunk_rows import ChunkRows, RowsSetting
from flops_lightning.strategies.costs import SiteCosts, site_costs
from flops_lightning.strategies.counts import check_counts, equal_counts
from flops_lightning.strategies.delta import Variant
from flops_lightning.strategies.engine import Q, QueryEngine, SiteGradient
from flops_lightning.strategies.measured_costs import measured_costs
from flops_lightning.strategies.pilots import PilotSpec, check_pilots, pilot_share, read_pilots
from flops_lightning.strategies.precision import warn_unresolved_sigma
from flops_lightning.strategies.sample_facts import SampleFacts
from flops_lightning.strategies.seen_traces import SeenTraces
from flops_lightning.strategies.setting_checks import refuse_other_seed
from flops_lightning.strategies.site_specs import SiteSpec, read_specs
from flops_lightning.strategies.sites import Site, resolve_sites

UpdateOrder = Literal["simultaneous", "site_by_site"]


class QueryStrategy(ForwardGradientStrategy, Generic[Q]):
    """Estimates gradients from perturbed forward passes at sites, with counts that differ from sample to sample."""

    def __init__(
        self,
        *,
        sites: Sequence[SiteSpec] = (),
        variant: Variant = "baseline",
        update: UpdateOrder = "simultaneous",
        pilots: PilotSpec | None = None,
        chunk_rows: RowsSetting = 256,
        compile_suffixes: bool = False,
        seed: int | None = None,
    ) -> None:
        """Keep the settings; :meth:`bind` checks them against the network.

        Args:
            sites: Where noise enters; empty: the paper's layout (three groups and the head).
            variant: The control variate: ``plain`` (none), ``baseline`` (clean loss), ``leave_one_out``,
                ``antithetic``.
            update: All sites from the same network and one optimiser step, or one step for each site, from the top
                down, with new losses in between (FLOPS, algorithm 1).
            pilots: Queries spent before the allocation.
            chunk_rows: Upper bound of the rows in one forward pass; bounds the memory, never changes the estimate.
                ``auto``: as many as suit the device, chosen at the first batch.
            compile_suffixes: Run the network above a site through ``torch.compile``, which takes seconds to minutes
                at the first step and again for each other number of rows. Hooks added to the network later are ignored
                there.
            seed: Seed of all noise; None: the seed of ``seed_everything``.

        Raises:
            SettingError: an unknown variant or update, or fewer than two rows in a chunk.
        """
        super().__init__()
        check_choice("strategy.variant", variant, get_args(Variant))
        check_choice("strategy.update", update, get_args(UpdateOrder))
        self.specs = tuple(read_specs(sites))
        self.variant: Variant = variant
        self.update: UpdateOrder = update
        self.pilots = read_pilots(pilots)
        self._chunks = ChunkRows(chunk_rows, least=2)
        self.compile_suffixes = compile_suffixes
        self._seed_given = seed is not None
        self.seed = resolve_seed(seed)
        self._sites: tuple[Site, ...] = ()
        self._costs: SiteCosts | None = None
        # Of the draw whose pilots they are; nothing is piloted at draw -1.
        self._piloted: tuple[int, dict[str, Q]] = (-1, {})
        self._facts = SampleFacts()

    passes_per_query: float = 1.0
    """What a query costs, in forward passes of its suffix."""

    # -- what a strategy adds ------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def engine(self) -> QueryEngine[Q]:
        """What runs the queries of a site, with these settings."""

    @abstractmethod
    def site_scales(self, clean: CleanPass, metric: Mapping[str, Tensor] | None) -> list[float]:
        """Factors that take each site's traces to squared units of its parameters, weighted by ``metric``."""

    def resolve_sites(self, network: StagedNetwork) -> tuple[Site, ...]:
        """The sites of a network."""
        return resolve_sites(network, self.specs)

    # -- the interface -------------------------------------------------------------------------------------------------

    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        """Resolve sites and pilots.

        Raises:
            SettingError: see :func:`resolve_sites` and :func:`check_pilots`; or a budget that the variant cannot use.
        """
        refuse_second_network(getattr(self, "network", None), network)
        if not all(spec.active_tokens for spec in self.specs):
            network = network.with_all_tokens()
        self._sites = self.resolve_sites(network)
        if self.compile_suffixes:
            network = self._compiled(network)
        self.network, self.loss = network, loss
        self._costs, self._piloted, self._facts = None, (-1, {}), SampleFacts()
        for site in self._sites:
            if site.queries_per_sample % self.unit:
                raise SettingError(
                    "strategy.sites.queries_per_sample", site.queries_per_sample,
                    f"is odd at site {site.name!r}, antithetic queries come in pairs.", "Write an even number.",
                )  # fmt: skip
            if self.variant == "leave_one_out" and site.together:
                raise SettingError(
                    "strategy.variant", self.variant, f"cannot centre the jointly perturbed layers of {site.name!r}, "
                    "whose inputs differ from query to query.", "Use variant: baseline, or together: false.",
                )  # fmt: skip
        if self.pilots.queries:
            check_pilots(self.pilots, self._sites, unit=self.unit, one_update=self.update == "simultaneous")

    def _compiled(self, network: StagedNetwork) -> CompiledNetwork:
        compiled = CompiledNetwork(network)
        if not any(compiled.compiles(site.last + 1) for site in self._sites if not site.layers):
            raise SettingError(
                "strategy.compile_suffixes", True, "has no effect: above no site is there a block or layer to compile "
                "(sites of kind: linear run uncompiled, since compiled code does not see their hooks).",
                "Use several sites of kind: block or group, or write compile_suffixes: false.",
            )  # fmt: skip
        return compiled

    @property
    def chunk_rows(self) -> int:
        """Upper bound of the rows in one forward pass."""
        return self._chunks.rows

    @property
    def sites(self) -> tuple[Site, ...]:
        """Sites from bottom to top."""
        return self._sites

    @property
    def unit(self) -> int:
        """Queries that are independent of others only together: 2 in antithetic pairs, else 1."""
        return 2 if self.variant == "antithetic" else 1

    @property
    def budget(self) -> QueryBudget:
        """Queries of a sample at each site, pilots taken off."""
        left = [s.queries_per_sample - (self.pilots.queries if self._is_pilot_site(s) else 0) for s in self._sites]
        minimum, names = 2 if self.variant == "leave_one_out" else 0, tuple(site.name for site in self._sites)
        return QueryBudget(tuple(left), multiple=self.unit, minimum=minimum, sites=names)

    @property
    def update_groups(self) -> tuple[tuple[str, ...], ...]:
        """All sites at once, or one after the other from the top, so that the activations below stay valid."""
        names = tuple(site.name for site in (*self._sites, *self.exact_sites))
        return (names,) if self.update == "simultaneous" else tuple((name,) for name in reversed(names))

    def clean_pass(self, inputs: Tensor, targets: Tensor) -> CleanPass:
        """Run the batch unperturbed, keep what the sites need, and advance the draw counter."""
        if not self._sites:
            raise RuntimeError("bind(network, loss) must come before the first clean_pass.")
        if self.compile_suffixes and self._costs is None:
            check_compiler(inputs.device)
        self._chunks.settle(self.network, inputs)
        clean = clean_pass(
            self.network, self.loss, inputs, targets, keep=self._kept, draw=self.draw, rows=self.chunk_rows
        )
        clean.activations.setdefault(0, inputs)  # not a copy: from it all that was not kept can be run again
        if self._costs is None:
            counted = site_costs(self.network, self._sites, inputs)
            dearer = {name: cost * self.passes_per_query for name, cost in counted.query.items()}
            self._costs = replace(counted, query=dearer)
            warn_unresolved_sigma(self._sites, clean)
        self.draw += 1
        self.meter.add(CLEAN, clean_passes=clean.batch_size, forward_equivalents=clean.batch_size)
        return clean

    def refresh(self, clean: CleanPass, updated: Sequence[str]) -> CleanPass:
        """The clean pass after the parameters of ``updated`` changed: their prefix is kept, the rest runs again."""
        queried, exact = self._chosen(updated)
        start = min(site.first for site in (*(self._sites[i] for i in queried), *exact))
        self.meter.add(CLEAN, forward_equivalents=self._known_costs.from_stage[start] * clean.batch_size)
        return refresh(self.network, self.loss, clean, start, keep=self._kept, rows=self.chunk_rows)

    @torch.no_grad()
    def pilot_traces(self, clean: CleanPass) -> TraceObservation | None:
        """Spend the pilots and return ``(s, b)`` traces of the covariance of one query's gradient, NaN elsewhere."""
        chosen = self.pilots.names(self._sites)
        if not chosen:
            return None
        counts = np.zeros((len(self._sites), clean.batch_size), dtype=np.int64)
        counts[[site.name in chosen for site in self._sites]] = self.pilots.queries
        self._piloted = (clean.draw, {})
        with phase("pilots"):
            return self._look(clean, counts, kept=self._piloted[1])

    @torch.no_grad()
    def observe_traces(self, clean: CleanPass, counts: Tensor, *, first_query: int) -> TraceObservation:
        """Spend queries on nothing but traces: how noisy the gradient of each sample is.

        Args:
            clean: The batch's clean pass.
            counts: ``(s, b)`` or ``(b,)`` integer queries of each sample (at each site).
            first_query: Index of their first query. What is looked at with others than those that made the counts or
                the gradient is independent of both: take an index above all of theirs.

        Raises:
            SettingError: as :meth:`estimate`, about the counts.
        """
        table = check_counts(counts, self._sites, clean.batch_size, multiple=self.unit, least=1)
        return self._look(clean, table, first_query=first_query)

    def _look(
        self, clean: CleanPass, counts: NDArray[np.int64], *, first_query: int = 0, kept: dict[str, Q] | None = None
    ) -> TraceObservation:
        seen = SeenTraces.empty(len(self._sites), clean.loss)
        for i, site in enumerate(self._sites):
            if site.together:
                continue
            with self.network.evaluating():
                queried = self.engine.query(site, clean, counts[i], first_query=first_query, traces=True)
            if queried is None:
                continue
            seen.put(i, queried.trace(), queried.survivors)
            if kept is not None:
                kept[site.name] = queried
            queries = int(counts[i].sum())
            cost = queries * self._known_costs.query[site.name]
            lost = queries - int(queried.survivors.sum())
            self.meter.add(site.name, queries=queries, pilots=queries, lost=lost, forward_equivalents=cost)
        return seen.observation(self.unit)

    def sample_statistics(
        self, clean: CleanPass, names: Collection[str] = (), metric: Mapping[str, Tensor] | None = None
    ) -> SampleStatistics:
        """Spend the pilots, if any, and tell what else is known of the samples.

        Args:
            clean: The batch's clean pass.
            names: Fields of :class:`SampleStatistics` to fill beside loss, embedding, traces and budget.
            metric: Weights of the squared derivatives for ``preconditioned_scale``; None while the optimiser has none,
                where it is ``scale``.
        """
        self._facts.request(names)
        pilots = self.pilot_traces(clean)
        facts, network, loss, costs, meter = self._facts, self.network, self.loss, self._known_costs, self.meter
        complete = facts.complete(
            clean, self._kept, network=network, loss=loss, costs=costs, meter=meter, rows=self.chunk_rows
        )
        filled = facts.fill(
            names, complete, self._sites, network=network, loss=loss, costs=costs, meter=meter,
            metric=metric, scales=self.site_scales, seconds=self._query_seconds,
        )  # fmt: skip
        return SampleStatistics(
            loss=clean.loss,
            embedding=clean.embedding,
            trace=None if pilots is None else pilots.trace,
            trace_queries=None if pilots is None else pilots.queries,
            pilots_reused=self.pilots.reuse,
            budget=self.budget,
            **filled,
        )

    @torch.no_grad()
    def estimate(
        self,
        clean: CleanPass,
        counts: Tensor | None = None,
        sites: Sequence[str] | None = None,
        *,
        pilot_weight: Tensor | None = None,
        traces: bool = False,
    ) -> Estimate:
        """Add the estimate to ``.grad``.

        Raises:
            SettingError: counts of a wrong shape, not integers, negative, not in antithetic pairs, or a single
                leave-one-out query; or a name that is not a site's.
        """
        if counts is None:
            taken = [self.pilots.queries if self._pilots_of(site, clean) else 0 for site in self._sites]
            table = equal_counts(self._sites, clean.batch_size, taken=taken)
        else:
            least = 2 if self.variant == "leave_one_out" else 1
            table = check_counts(counts, self._sites, clean.batch_size, multiple=self.unit, least=least)
        weights = None if pilot_weight is None else pilot_weight.to(clean.loss).expand(len(self._sites), -1)
        seen = SeenTraces.empty(len(self._sites), clean.loss) if traces else None
        chosen, exact = self._chosen(sites)
        with self.network.evaluating():
            results = [
                self.estimate_site(i, clean, table[i], None if weights is None else weights[i], seen) for i in chosen
            ]
        # The only transfer of the estimate, all sites at once: how many queries survived, how many count, and for which
        # samples there are losses at all.
        finite = torch.isfinite(clean.loss).to(clean.loss)
        *lines, known = torch.stack(
            [line for i, result in zip(chosen, results, strict=True)
             for line in (result.survivors, self._counting(self._sites[i], clean, result))] + [finite],
        ).cpu().numpy()  # fmt: skip
        survivors, counting = (np.array(lines[k::2]).reshape(len(chosen), clean.batch_size) for k in (0, 1))
        of_any = self.used_by_any([bool(line.any()) for line in counting])
        for i, result, alive, used in zip(chosen, results, survivors, of_any, strict=True):
            site, costs = self._sites[i], self._known_costs
            cost = result.queries * costs.query[site.name] + clean.batch_size * costs.gradient[site.name]
            lost = int(table[i].sum() - alive.sum())
            self.meter.add(site.name, queries=result.queries, lost=lost, forward_equivalents=cost)
            if used:
                add_gradients(site.parameters, result.gradients())
        for site in exact if known.any() else ():
            add_gradients(site.parameters, self.exact_gradient(site, clean))
            inside = self._known_costs.from_stage[site.first]
            self.meter.add(site.name, forward_equivalents=clean.batch_size * (1 if site.layers else 3) * inside)
        silent = int(((counting == 0) & (table[chosen] > 0)).sum())
        if silent:
            warn_silent(silent, "(sample, site) pairs")
        return Estimate(
            loss=clean.loss,
            output=clean.output,
            queries=sum(result.queries for result in results),
            lost=int(table[chosen].sum() - survivors.sum()),
            silent_samples=silent,
            lost_batch=not any(of_any) and not (exact and known.any()),
            observation=None if seen is None else seen.observation(self.unit),
        )

    def estimate_site(
        self,
        place: int,
        clean: CleanPass,
        counts: NDArray[np.int64],
        pilot_weight: Tensor | None,
        seen: SeenTraces | None,
    ) -> SiteGradient:
        """Gradient of one site from its queries and the pilots that are reused; traces go to ``seen``."""
        site, engine = self._sites[place], self.engine
        pilots = self._pilots_of(site, clean)
        first = self.pilots.queries if pilots else 0
        rest = engine.query(site, clean, counts, first_query=first, traces=seen is not None)
        if rest is not None:
            self.learn(site, rest)
        if rest is not None and seen is not None:
            seen.put(place, rest.trace(), rest.survivors)
        reused = pilots if self.pilots.reuse else None
        one = torch.ones_like(clean.loss)
        parts = [(queried, one) for queried in (reused, rest) if queried is not None]
        if reused is not None and rest is not None:
            weight = self.pilots.queries / site.queries_per_sample if pilot_weight is None else pilot_weight
            share = pilot_share(reused, rest, weight)
            parts = [(reused, share), (rest, 1 - share)]
        late: Callable[[], Mapping[str, Tensor]] = partial(engine.mixed_gradient, site, clean, parts) if parts else dict
        if not all(queried.small for queried, _ in parts):
            late = partial(dict, late())
        survivors = torch.zeros_like(clean.loss) if rest is None else rest.survivors.to(clean.loss.dtype)
        return SiteGradient(late, survivors, int(counts.sum()))

    def exact_gradient(self, site: Site, clean: CleanPass) -> dict[str, Tensor]:
        """Gradient of one of :attr:`exact_sites` by parameter name."""
        raise TypeError(f"{site.name} spends queries in {type(self).__name__} ({clean.batch_size} samples).")

    def learn(self, site: Site, queried: Q) -> None:
        """Learn from a step's own queries, for the steps that follow."""

    def spend(self, site: Site, clean: CleanPass, counts: NDArray[np.int64]) -> None:
        """Run queries of a site, to time them."""
        self.engine.query(site, clean, counts)

    def _counting(self, site: Site, clean: CleanPass, result: SiteGradient) -> Tensor:
        """``(b,)`` queries that enter the gradient: survivors and reused pilots, but no lone leave-one-out query."""
        pilots = self._pilots_of(site, clean)
        least = 1 if self.variant == "leave_one_out" else 0
        counting = torch.where(result.survivors > least, result.survivors, 0)
        if pilots is not None and self.pilots.reuse:
            counting = counting + torch.where(pilots.found, pilots.survivors, 0)
        return counting

    def _query_seconds(self, clean: CleanPass) -> list[float]:
        def spend(site: Site, counts: NDArray[np.int64]) -> None:
            self.spend(site, clean, counts)

        with self.network.evaluating():
            return measured_costs(spend, self._sites, clean, self._known_costs, unit=self.unit)

    def _chosen(self, sites: Sequence[str] | None) -> tuple[list[int], list[Site]]:
        """Places of the sites with these names that spend queries, and those that are exact."""
        names = [site.name for site in (*self._sites, *self.exact_sites)]
        for name in sites or ():
            if name not in names:
                raise SettingError("sites", name, "is not a site.", f"Choose from {names}.")
        if sites is not None and not sites:
            raise SettingError("sites", [], "names no site.", f"Choose from {names}, or leave it out for all.")
        chosen = names if sites is None else sites
        queried = [i for i, site in enumerate(self._sites) if site.name in chosen]
        return queried, [site for site in self.exact_sites if site.name in chosen]

    @property
    def _kept(self) -> set[int]:
        """Indices of the activations that sites start from."""
        entered = {i for site in self._sites for i in (site.first, site.start)}
        entered |= {site.first for site in self.exact_sites}
        return (entered | self._facts.kept(self.network)) - {0}  # the inputs are there anyway

    @property
    def _known_costs(self) -> SiteCosts:
        if self._costs is None:
            raise RuntimeError("clean_pass must come first: it counts the costs.")
        return self._costs

    def _is_pilot_site(self, site: Site) -> bool:
        return site.name in self.pilots.names(self._sites)

    def _pilots_of(self, site: Site, clean: CleanPass) -> Q | None:
        return self._piloted[1].get(site.name) if self._piloted[0] == clean.draw else None

    def state_dict(self) -> dict[str, Any]:
        """Draw counter, meter, the seed of the noise, and what was measured."""
        return {**super().state_dict(), "seed": self.seed, **self._facts.state_dict(), **self._chunks.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            SettingError: another seed was given explicitly.
        """
        refuse_other_seed(self.seed, state["seed"], given=self._seed_given)
        super().load_state_dict(state)
        self._piloted = (-1, {})
        self._facts.load_state_dict(state)
        self._chunks.load_state_dict(state)
        self.seed = int(state["seed"])
