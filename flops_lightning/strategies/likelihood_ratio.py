"""``LikelihoodRatio``: the estimator of FLOPS (Ren et al., ICLR 2025), eq. 1, as a strategy.

At a site with activation ``h_b``, noise ``z ~ N(0, I)`` and noise width ``sigma``, for sample ``b`` with ``A_b``
queries::

    delta_b = 1 / A_b  sum_q (L_b(h_b + sigma z_q) - c_bq) z_q / sigma        grad = 1 / B  sum_b J_b^T delta_b

The weights ``(L - c) / sigma`` and the sums over queries are in ``delta.py``, the loop over chunks in
``site_queries.py``, ``J^T delta`` in ``closed_form.py`` and ``local_vjp.py``.

Forward only through everything between a site and the loss. ``linear`` sites use no autograd at all; ``block`` and
``group`` sites use a local VJP inside the site, never through its suffix.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.allocators.statistics import QueryBudget, SampleStatistics, TraceObservation
from flops_lightning.errors import SettingError
from flops_lightning.meter import CLEAN
from flops_lightning.queries import CleanPass, LossFunction, clean_pass, refresh
from flops_lightning.staging import StagedNetwork
from flops_lightning.strategies.base import (
    Estimate,
    ForwardGradientStrategy,
    add_gradients,
    refuse_second_network,
    resolve_seed,
)
from flops_lightning.strategies.costs import SiteCosts, site_costs
from flops_lightning.strategies.counts import check_counts, equal_counts
from flops_lightning.strategies.delta import DeltaSums, Variant
from flops_lightning.strategies.measured_costs import measured_costs
from flops_lightning.strategies.pilots import PilotSpec, check_pilots, combine
from flops_lightning.strategies.precision import warn_unresolved_sigma
from flops_lightning.strategies.seen_traces import SeenTraces
from flops_lightning.strategies.site_queries import SiteGradient, SiteQueries, parameter_space_input, sq_norm
from flops_lightning.strategies.site_scales import SCALE_EVERY, site_scales
from flops_lightning.strategies.site_specs import SiteSpec, read_specs
from flops_lightning.strategies.sites import Site, resolve_sites
from flops_lightning.strategies.trace_predictors import PREDICTORS, kept_for_predictors, trace_predictors

UpdateOrder = Literal["simultaneous", "site_by_site"]


class LikelihoodRatio(ForwardGradientStrategy):
    """Likelihood-ratio gradient estimates from forward passes."""

    def __init__(
        self,
        *,
        sites: Sequence[SiteSpec] = (),
        variant: Variant = "baseline",
        update: UpdateOrder = "simultaneous",
        pilots: PilotSpec | None = None,
        chunk_rows: int = 256,
        seed: int | None = None,
    ) -> None:
        """Keep the settings; they meet the network in :meth:`bind`.

        Args:
            sites: Where noise enters; empty: the paper's layout (three groups and the head).
            variant: The control variate: ``plain`` (none), ``baseline`` (clean loss), ``leave_one_out``,
                ``antithetic``.
            update: All sites from the same network and one optimiser step, or one step for each site, from the top
                down, with new losses in between (FLOPS, algorithm 1).
            pilots: Queries spent before the allocation.
            chunk_rows: Upper bound of the rows in one forward pass; bounds the memory, never changes the estimate.
            seed: Seed of all noise; None: the seed of ``seed_everything``.

        Raises:
            SettingError: an unknown variant or update, or fewer than two rows in a chunk.
        """
        super().__init__()
        for name, value, choices in (
            ("variant", variant, get_args(Variant)),
            ("update", update, get_args(UpdateOrder)),
        ):
            if value not in choices:
                raise SettingError(f"strategy.{name}", value, "is not known.", f"Choose from {list(choices)}.")
        if chunk_rows < 2:
            raise SettingError("strategy.chunk_rows", chunk_rows, "is too small.", "Write 2 or more, for example 256.")
        self.specs = tuple(read_specs(sites))
        self.variant: Variant = variant
        self.update: UpdateOrder = update
        self.pilots = PilotSpec(**pilots) if isinstance(pilots, Mapping) else pilots or PilotSpec()
        self.chunk_rows = chunk_rows
        self._seed_given = seed is not None
        self.seed = resolve_seed(seed)
        self._sites: tuple[Site, ...] = ()
        self._costs: SiteCosts | None = None
        # Of the draw whose pilots they are; nothing is piloted at draw -1.
        self._piloted: tuple[int, dict[str, DeltaSums]] = (-1, {})
        # By name of the statistic: the draw at which they were estimated, and the scales.
        self._scales: dict[str, tuple[int, list[float]]] = {}
        self._seconds: list[float] = []
        self._predicted: frozenset[str] = frozenset()

    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        """Resolve sites and pilots.

        Raises:
            SettingError: see :func:`resolve_sites` and :func:`check_pilots`; or a budget that the variant cannot use.
        """
        refuse_second_network(getattr(self, "network", None), network)
        self._sites = resolve_sites(network, self.specs)
        self.network, self.loss = network, loss
        self._costs, self._piloted, self._scales, self._seconds = None, (-1, {}), {}, []
        unit = self.site_queries.unit
        for site in self._sites:
            if site.queries_per_sample % unit:
                raise SettingError(
                    "strategy.sites.queries_per_sample", site.queries_per_sample,
                    f"is odd at site {site.name!r}, antithetic queries come in pairs.", "Write an even number.",
                )  # fmt: skip
            if self.variant == "leave_one_out" and len(site.layers) > 1:
                raise SettingError(
                    "strategy.variant", self.variant, f"cannot centre the jointly perturbed layers of {site.name!r}, "
                    "whose inputs differ from query to query.", "Use variant: baseline, or together: false.",
                )  # fmt: skip
        if self.pilots.queries:
            check_pilots(self.pilots, self._sites, unit=unit, one_update=self.update == "simultaneous")

    @property
    def sites(self) -> tuple[Site, ...]:
        """Sites from bottom to top."""
        return self._sites

    @property
    def budget(self) -> QueryBudget:
        """Queries of a sample at each site, pilots taken off."""
        left = [s.queries_per_sample - (self.pilots.queries if self._is_pilot_site(s) else 0) for s in self._sites]
        return QueryBudget(
            tuple(left), multiple=self.site_queries.unit, minimum=2 if self.variant == "leave_one_out" else 0
        )

    @property
    def update_groups(self) -> tuple[tuple[str, ...], ...]:
        """All sites at once, or one after the other from the top, so that the activations below stay valid."""
        names = tuple(site.name for site in self._sites)
        return (names,) if self.update == "simultaneous" else tuple((name,) for name in reversed(names))

    def clean_pass(self, inputs: Tensor, targets: Tensor) -> CleanPass:
        """Run the batch unperturbed, keep what the sites need, and advance the draw counter."""
        if not self._sites:
            raise RuntimeError("bind(network, loss) must come before the first clean_pass.")
        clean = clean_pass(
            self.network, self.loss, inputs, targets, keep=self._kept, draw=self.draw, rows=self.chunk_rows
        )
        if self._costs is None:
            self._costs = site_costs(self.network, self._sites, inputs)
            warn_unresolved_sigma(self._sites, clean)
        clean.activations.setdefault(0, inputs)  # not a copy: from it all that was not kept can be run again
        self.draw += 1
        self.meter.add(CLEAN, clean_passes=clean.batch_size, forward_equivalents=clean.batch_size)
        return clean

    def refresh(self, clean: CleanPass, updated: Sequence[str]) -> CleanPass:
        """The clean pass after the parameters of ``updated`` changed: their prefix is kept, the rest runs again."""
        start = min(self._sites[i].first for i in self._chosen(updated))
        cost = self._known_costs.from_stage[start] * clean.batch_size
        self.meter.add(CLEAN, forward_equivalents=cost)
        return refresh(self.network, self.loss, clean, start, keep=self._kept, rows=self.chunk_rows)

    @torch.no_grad()
    def pilot_traces(self, clean: CleanPass) -> TraceObservation | None:
        """Spend the pilots and return ``(s, b)`` traces of the covariance of one query's gradient, NaN elsewhere.

        In parameter space at a single ``nn.Linear`` (FLOPS, theorem 1), in activation space (a proxy) elsewhere.
        """
        chosen = self.pilots.names(self._sites)
        if not chosen:
            return None
        counts = np.zeros((len(self._sites), clean.batch_size), dtype=np.int64)
        counts[[site.name in chosen for site in self._sites]] = self.pilots.queries
        self._piloted = (clean.draw, {})
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
        table = check_counts(counts, self._sites, clean.batch_size, multiple=self.site_queries.unit, least=1)
        return self._look(clean, table, first_query=first_query)

    def _look(
        self,
        clean: CleanPass,
        counts: NDArray[np.int64],
        *,
        first_query: int = 0,
        kept: dict[str, DeltaSums] | None = None,
    ) -> TraceObservation:
        seen = SeenTraces.empty(len(self._sites), clean.loss)
        for i, site in enumerate(self._sites):
            if len(site.layers) > 1 or not counts[i].any():
                continue
            with self.network.evaluating():
                sums, _ = self._traced_sums(i, clean, counts[i], first_query=first_query, seen=seen)
            if sums is None:
                continue
            if kept is not None:
                kept[site.name] = sums
            queries = int(counts[i].sum())
            cost = queries * self._known_costs.query[site.name]
            lost = queries - int(sums.survivors.sum())
            self.meter.add(site.name, queries=queries, pilots=queries, lost=lost, forward_equivalents=cost)
        return seen.observation(self.site_queries.unit)

    def _traced_sums(
        self, place: int, clean: CleanPass, counts: NDArray[np.int64], *, first_query: int, seen: SeenTraces
    ) -> tuple[DeltaSums | None, Tensor | None]:
        """Run a site's queries and note their traces; also the layer's clean input, where that took it."""
        site, queries = self._sites[place], self.site_queries
        layer_input = parameter_space_input(queries, site, clean)
        sums = queries.sums(site, clean, counts, first_query=first_query, traces=True, layer_input=layer_input)
        if sums is not None:
            seen.put(place, sums.trace(sq_norm(site, layer_input, sums.weighted), queries.unit), sums.survivors)
        return sums, layer_input

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
        wanted = {name.split(".")[1] for name in names if name.startswith("predictors.")} & set(PREDICTORS)
        wanted |= set(PREDICTORS) if "predictors" in names else set()
        self._predicted = frozenset(wanted)
        pilots, sites = self.pilot_traces(clean), self._sites
        filled: dict[str, Any] = {}
        if wanted:
            filled["predictors"] = trace_predictors(self.network, self.loss, sites, self._completed(clean), wanted)
        if "query_flops" in names:
            filled["query_flops"] = clean.loss.new_tensor([self._known_costs.query[site.name] for site in sites])
        if "query_seconds" in names:
            self._seconds = self._seconds or measured_costs(self.site_queries, sites, clean, self._known_costs)
            filled["query_seconds"] = clean.loss.new_tensor(self._seconds)
        for name, weights in (("scale", None), ("preconditioned_scale", metric)):
            if name in names:
                filled[name] = clean.loss.new_tensor(self._scale(name if weights else "scale", clean, weights))
        return SampleStatistics(
            loss=clean.loss,
            embedding=clean.embedding,
            trace=None if pilots is None else pilots.trace,
            trace_queries=None if pilots is None else pilots.queries,
            pilots_reused=self.pilots.reuse,
            budget=self.budget,
            **filled,
        )

    def _completed(self, clean: CleanPass) -> CleanPass:
        """With the activations that predictors read: at the first batch's clean pass nobody had asked for them."""
        missing = self._kept - clean.activations.keys()
        if not missing:
            return clean
        start = max(i for i in clean.activations if i <= min(missing))
        self.meter.add(CLEAN, forward_equivalents=self._known_costs.from_stage[start] * clean.batch_size)
        return refresh(self.network, self.loss, clean, start, keep=self._kept, rows=self.chunk_rows)

    def _scale(self, name: str, clean: CleanPass, metric: Mapping[str, Tensor] | None) -> list[float]:
        # It costs a local VJP and changes with the weights, slowly.
        known = self._scales.get(name)
        if known is None or clean.draw - known[0] >= SCALE_EVERY:
            known = self._scales[name] = (
                clean.draw,
                site_scales(self.site_queries, self._sites, clean, metric).tolist(),
            )
            cost = sum(self._known_costs.gradient.values()) * clean.batch_size
            self.meter.add(CLEAN, forward_equivalents=cost)
        return known[1]

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
        """Add the likelihood-ratio estimate to ``.grad``.

        Raises:
            SettingError: counts of a wrong shape, not integers, negative, not in antithetic pairs, or a single
                leave-one-out query; or a name that is not a site's.
        """
        if counts is None:
            taken = [self.pilots.queries if self._pilots_of(site, clean) else 0 for site in self._sites]
            table = equal_counts(self._sites, clean.batch_size, taken=taken)
        else:
            least = 2 if self.variant == "leave_one_out" else 1
            table = check_counts(counts, self._sites, clean.batch_size, multiple=self.site_queries.unit, least=least)
        weights = None if pilot_weight is None else pilot_weight.to(clean.loss).expand(len(self._sites), -1)
        seen = SeenTraces.empty(len(self._sites), clean.loss) if traces else None
        chosen = self._chosen(sites)
        with self.network.evaluating():
            results = [
                self._estimate_site(i, clean, table[i], None if weights is None else weights[i], seen) for i in chosen
            ]
        # The only transfer of the estimate, all sites at once: how many queries survived, and how many count.
        survivors, counting = torch.stack(
            [torch.stack([result.survivors, self._counting(self._sites[i], clean, result)])
             for i, result in zip(chosen, results, strict=True)], dim=1,
        ).cpu().numpy()  # fmt: skip
        for i, result, alive, used in zip(chosen, results, survivors, counting, strict=True):
            site, costs = self._sites[i], self._known_costs
            cost = result.queries * costs.query[site.name] + clean.batch_size * costs.gradient[site.name]
            lost = int(table[i].sum() - alive.sum())
            self.meter.add(site.name, queries=result.queries, lost=lost, forward_equivalents=cost)
            if used.any():
                add_gradients(site.parameters, result.gradients)
        silent = int(((counting == 0) & (table[chosen] > 0)).sum())
        if silent:
            warnings.warn(
                f"{silent} (sample, site) pairs lost every query to non-finite losses and contribute nothing to this "
                "step. A smaller sigma or learning rate, or a higher precision, keeps losses finite.",
                RuntimeWarning, stacklevel=3,  # past the decorator
            )  # fmt: skip
        return Estimate(
            loss=clean.loss,
            output=clean.output,
            queries=sum(result.queries for result in results),
            lost=int(table[chosen].sum() - survivors.sum()),
            silent_samples=silent,
            lost_batch=not counting.any(),
            observation=None if seen is None else seen.observation(self.site_queries.unit),
        )

    def _estimate_site(
        self,
        place: int,
        clean: CleanPass,
        counts: NDArray[np.int64],
        pilot_weight: Tensor | None,
        seen: SeenTraces | None,
    ) -> SiteGradient:
        site = self._sites[place]
        if len(site.layers) > 1:
            return self.site_queries.joint(site, clean, counts)
        pilots = self._pilots_of(site, clean)
        first, layer_input = self.pilots.queries if pilots else 0, None
        if seen is None:
            sums = self.site_queries.sums(site, clean, counts, first_query=first)
        else:
            sums, layer_input = self._traced_sums(place, clean, counts, first_query=first, seen=seen)
        reused = pilots if self.pilots.reuse else None
        if sums is None:
            sums, reused = reused, None
        if sums is None:
            return SiteGradient({}, torch.zeros_like(clean.loss), 0)
        weight = self.pilots.queries / site.queries_per_sample if pilot_weight is None else pilot_weight
        delta = sums.delta() if reused is None else combine(reused, sums, weight)
        gradients = self.site_queries.gradient(site, clean, delta / clean.batch_size, layer_input)
        survivors = sums.survivors if counts.any() else torch.zeros_like(clean.loss)
        return SiteGradient(gradients, survivors.to(clean.loss.dtype), int(counts.sum()))

    def _counting(self, site: Site, clean: CleanPass, result: SiteGradient) -> Tensor:
        """``(b,)`` queries that enter the gradient: survivors and reused pilots, but no lone leave-one-out query."""
        pilots = self._pilots_of(site, clean)
        least = 1 if self.variant == "leave_one_out" else 0
        counting = torch.where(result.survivors > least, result.survivors, 0)
        if pilots is not None and self.pilots.reuse:
            counting = counting + torch.where(pilots.found, pilots.survivors, 0)
        return counting

    def _chosen(self, sites: Sequence[str] | None) -> list[int]:
        names = [site.name for site in self._sites]
        if sites is None:
            return list(range(len(names)))
        for name in sites:
            if name not in names:
                raise SettingError("sites", name, "is not a site.", f"Choose from {names}.")
        if not sites:
            raise SettingError("sites", [], "names no site.", f"Choose from {names}, or leave it out for all.")
        return [i for i, name in enumerate(names) if name in sites]

    @property
    def site_queries(self) -> SiteQueries:
        """What runs the queries of a site, with these settings."""
        return SiteQueries(self.network, self.loss, self.variant, self.chunk_rows, self.seed, self.rank)

    @property
    def _kept(self) -> set[int]:
        """Indices of the activations that sites start from."""
        entered = {i for site in self._sites for i in (site.first, site.start)}
        return entered | kept_for_predictors(self.network, self._predicted)

    @property
    def _known_costs(self) -> SiteCosts:
        if self._costs is None:
            raise RuntimeError("clean_pass must come first: it counts the costs.")
        return self._costs

    def _is_pilot_site(self, site: Site) -> bool:
        return site.name in self.pilots.names(self._sites)

    def _pilots_of(self, site: Site, clean: CleanPass) -> DeltaSums | None:
        return self._piloted[1].get(site.name) if self._piloted[0] == clean.draw else None

    def state_dict(self) -> dict[str, Any]:
        """Draw counter, meter, the seed of the noise, and what was measured."""
        measured = {"scales": {name: list(known) for name, known in self._scales.items()}, "seconds": self._seconds}
        return {**super().state_dict(), "seed": self.seed, "predictors": sorted(self._predicted), **measured}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned.

        Raises:
            SettingError: another seed was given explicitly.
        """
        if self._seed_given and self.seed != state["seed"]:
            raise SettingError(
                "strategy.seed", self.seed, f"the run to be resumed draws its noise from {state['seed']}.",
                f"Leave the seed out, or write {state['seed']}.",
            )  # fmt: skip
        super().load_state_dict(state)
        self._piloted = (-1, {})
        self._scales = {name: (draw, scale) for name, (draw, scale) in state.get("scales", {}).items()}
        self._seconds = list(state.get("seconds", []))
        self._predicted = frozenset(state.get("predictors", []))
        self.seed = int(state["seed"])
