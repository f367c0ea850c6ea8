"""What all strategies that spend queries at sites share: sites, budget, clean passes, pilots, statistics, estimates.

The strategy's engine (:class:`QueryEngine`) runs the queries of one site and computes the gradient from them.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Generic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.meter import CLEAN
from flops_lightning.network.rows import gather
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.phases import phase
from flops_lightning.protocol import SampleStatistics, TraceObservation
from flops_lightning.queries import CleanPass, LossFunction, refresh
from flops_lightning.strategies.base import Estimate, add_gradients, warn_silent
from flops_lightning.strategies.costs import measured_costs
from flops_lightning.strategies.count_checks import checked_inclusion, checked_table, equal_table
from flops_lightning.strategies.engine import Q, QueryEngine, QueryResult, SiteGradient
from flops_lightning.strategies.pilots import pilot_share
from flops_lightning.strategies.signal import derivative_along, signal_samples
from flops_lightning.strategies.site_strategy import SiteStrategy
from flops_lightning.strategies.sites import Site
from flops_lightning.strategies.statistics import SCALE_EVERY, trace_predictors


class QueryStrategy(SiteStrategy, Generic[Q]):
    """Estimates gradients from perturbed forward passes at sites, with counts that differ from sample to sample."""

    _pilot_results: tuple[int, dict[str, Q]] = (-1, {})  # the draw of the batch, and the results by site

    # -- what a strategy adds ------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def engine(self) -> QueryEngine[Q]:
        """Runs the queries of a site."""

    @abstractmethod
    def site_scales(self, clean: CleanPass, metric: Mapping[str, Tensor] | None) -> list[float]:
        """Factors that convert each site's traces to squared units of its parameters, weighted by ``metric``."""

    def exact_gradient(self, site: Site, clean: CleanPass) -> dict[str, Tensor]:
        """Gradient of one of :attr:`exact_sites` by parameter name."""
        raise TypeError(f"{site.name} spends queries in {type(self).__name__} ({clean.batch_size} samples).")

    def joint_gradient(self, site: Site, clean: CleanPass, counts: NDArray[np.int64]) -> SiteGradient:
        """Gradient of a site whose layers are perturbed together: it has no sums by sample, no pilots and no traces."""
        del clean, counts
        raise TypeError(f"{type(self).__name__} perturbs no layers together, as {site.name} wants.")

    def paired_queries(
        self, clean: CleanPass, counts: NDArray[np.int64], places: Sequence[int], *, traces: bool
    ) -> Mapping[str, Q]:
        """Results of ``(s, b)`` queries of sites, by name, where they are evaluated beside each other's; here none."""
        del clean, counts, places, traces
        return {}

    def rescaled(self, clean: CleanPass, result: Q | None) -> Q | None:
        """The results of a step's queries at a site, changed before the gradient is made; every rank asks."""
        del clean
        return result

    def learn(self, site: Site, result: Q) -> None:
        """Learn from a step's own queries, for later steps."""

    def derivative_along(self, clean: CleanPass, directions: Mapping[str, Tensor]) -> Tensor:
        """Derivative of the mean clean loss of some samples along directions of parameters, by name.

        Every fourth sample, 16 at least, another set for each draw: over the draws the mean is that of the batch. Two
        clean passes of each; see :func:`~flops_lightning.strategies.signal.derivative_along`.
        """
        index = signal_samples(clean.batch_size, clean.draw, device=clean.loss.device)
        inputs, targets = gather((clean.activations[0], clean.targets), index)
        passes = 2 * len(index)
        self.meter.add(CLEAN, clean_passes=passes, forward_equivalents=passes)
        return derivative_along(self.network, self.loss, inputs, targets, directions, rows=self.chunk_rows)

    def run_queries(self, site: Site, clean: CleanPass, counts: NDArray[np.int64]) -> None:
        """Run ``(b,)`` queries of a site, to time them."""
        run = self.joint_gradient if site.together else self.engine.query
        run(site, clean, counts)

    # -- the interface -------------------------------------------------------------------------------------------------

    def bind(self, network: StagedNetwork, loss: LossFunction) -> None:
        """See :meth:`SiteStrategy.bind`; results of pilots do not survive it."""
        super().bind(network, loss)
        self._pilot_results = (-1, {})

    @torch.no_grad()
    def pilot_traces(self, clean: CleanPass) -> TraceObservation | None:
        """Spend the pilots and return ``(s, b)`` traces of the covariance of one query's gradient, NaN elsewhere."""
        names = self.pilots.names(self.sites)
        if not names:
            return None
        counts = np.zeros((len(self.sites), clean.batch_size), dtype=np.int64)
        counts[[site.name in names for site in self.sites]] = self.pilots.queries
        self._pilot_results = (clean.draw, {})
        with phase("pilots"):
            return self._observe(clean, counts, keep=self._pilot_results[1])

    @torch.no_grad()
    def observe_traces(self, clean: CleanPass, counts: Tensor, *, first_query: int) -> TraceObservation:
        """Spend queries on traces alone: how noisy the gradient of each sample is.

        Args:
            clean: The batch's clean pass.
            counts: ``(s, b)`` or ``(b,)`` integer queries of each sample (at each site).
            first_query: Index of their first query. Above the indices of the queries that made the counts and the
                gradient, the traces are independent of both.
        """
        table = self._checked(clean, counts, least=1)
        return self._observe(clean, table, first_query=first_query)

    def _observe(
        self, clean: CleanPass, counts: NDArray[np.int64], *, first_query: int = 0, keep: dict[str, Q] | None = None
    ) -> TraceObservation:
        traces = self._unknown_traces(clean)
        for i, site in enumerate(self.sites):
            if site.together:
                continue
            with self.network.evaluating():
                result = self.engine.query(site, clean, counts[i], first_query=first_query, traces=True)
            if result is None:
                continue
            _record(traces, i, result)
            if keep is not None:
                keep[site.name] = result
            queries = site.number(counts[i])
            cost = self._known_costs.of(site, queries, clean.batch_size)
            lost = queries - site.number(result.survivors.cpu().numpy())
            self.meter.add(site.name, queries=queries, pilots=queries, lost=lost, forward_equivalents=cost)
        return traces

    def _unknown_traces(self, clean: CleanPass) -> TraceObservation:
        shape = (len(self.sites), clean.batch_size)
        unknown = clean.loss.new_full(shape, torch.nan)
        return TraceObservation(unknown, clean.loss.new_zeros(shape), self.unit, sharing=unknown[:, 0].clone())

    def sample_statistics(
        self, clean: CleanPass, names: Collection[str] = (), metric: Mapping[str, Tensor] | None = None
    ) -> SampleStatistics:
        """See :meth:`ForwardGradientStrategy.sample_statistics`."""
        self._statistics.request(names)
        pilots = self.pilot_traces(clean)
        return SampleStatistics(
            loss=clean.loss, embedding=clean.embedding, trace=None if pilots is None else pilots.trace,
            trace_queries=None if pilots is None else pilots.queries, pilots_reused=self.pilots.reuse,
            budget=self.budget, **self._optional_statistics(names, clean, metric),
        )  # fmt: skip

    def _optional_statistics(
        self, names: Collection[str], clean: CleanPass, metric: Mapping[str, Tensor] | None
    ) -> dict[str, Any]:
        """The fields of :class:`SampleStatistics` that are computed on request only."""
        known, costs, filled = self._statistics, self._known_costs, dict[str, Any]()
        missing = (known.kept(self.network) - {0}) - clean.activations.keys()
        if missing:  # the clean pass came before the first request
            start = max(i for i in clean.activations if i <= min(missing))
            self.meter.add(CLEAN, forward_equivalents=costs.from_stage[start] * clean.batch_size)
            keep = missing | clean.activations.keys()
            clean = refresh(self.network, self.loss, clean, start, keep=keep, rows=self.chunk_rows)
        if known.predictors:
            filled["predictors"] = trace_predictors(self.network, self.loss, self.sites, clean, known.predictors)
        if "counted_costs" in names:
            filled["counted_costs"] = clean.loss.new_tensor([costs.each(site, clean.batch_size) for site in self.sites])
        if "fixed_costs" in names:
            shared = (1.0 + sum(map(self._exact_cost, self.exact_sites))) / len(self.sites)
            filled["fixed_costs"] = clean.loss.new_tensor([costs.gradient[site.name] + shared for site in self.sites])
        if "measured_costs" in names:
            if not known.measured_costs:
                with self.network.evaluating():
                    measured = measured_costs(self.run_queries, self.sites, clean, costs, unit=self.unit)
                known.measured_costs = measured
            filled["measured_costs"] = clean.loss.new_tensor(known.measured_costs)
        for name, weights in (("scale", None), ("preconditioned_scale", metric)):
            if name in names:
                draw, scales = known.scales.get(name if weights else "scale", (-SCALE_EVERY, []))
                # It costs a gradient of each site and changes with the weights, slowly.
                if clean.draw - draw >= SCALE_EVERY:
                    scales = self.site_scales(clean, weights)
                    known.scales[name if weights else "scale"] = (clean.draw, scales)
                    self.meter.add(CLEAN, forward_equivalents=sum(costs.gradient.values()) * clean.batch_size)
                filled[name] = clean.loss.new_tensor(scales)
        return filled

    @torch.no_grad()
    def estimate(
        self, clean: CleanPass, counts: Tensor | None = None, sites: Sequence[str] | None = None, *,
        pilot_weight: Tensor | None = None, inclusion: Tensor | None = None, traces: bool = False,
    ) -> Estimate:  # fmt: skip
        """Add the estimate to ``.grad``; see :meth:`ForwardGradientStrategy.estimate`."""
        table = self._table(clean, counts)
        weights = None if pilot_weight is None else pilot_weight.to(clean.loss).expand(len(self.sites), -1)
        drawn = None if inclusion is None else self._drawn(clean, inclusion)
        observation = self._unknown_traces(clean) if traces else None
        places, exact = self._select(sites)
        with self.network.evaluating():
            paired = self.paired_queries(clean, table, places, traces=traces)
            results = [
                self.estimate_site(i, clean, table[i], weights, drawn, observation, paired.get(self.sites[i].name))
                for i in places
            ]
        # The only transfer of the estimate, all sites at once: how many queries survived, how many count, and for which
        # samples there are losses at all.
        finite = torch.isfinite(clean.loss).to(clean.loss)
        *lines, known = torch.stack(
            [line for i, result in zip(places, results, strict=True)
             for line in (result.survivors, self._counting(self.sites[i], clean, result))] + [finite],
        ).cpu().numpy()  # fmt: skip
        survivors, counting = (np.array(lines[k::2]).reshape(len(places), clean.batch_size) for k in (0, 1))
        of_any = self.used_by_any([bool(line.any()) for line in counting])
        costs, lost = self._known_costs, list[int]()
        for i, result, alive, used in zip(places, results, survivors, of_any, strict=True):
            site = self.sites[i]
            cost = costs.of(site, result.queries, clean.batch_size) + clean.batch_size * costs.gradient[site.name]
            lost.append(site.number(table[i]) - site.number(alive))
            self.meter.add(site.name, queries=result.queries, lost=lost[-1], forward_equivalents=cost)
            if used:
                gradients = result.gradients()
                add_gradients(site.parameters, gradients)
                if observation is not None and observation.sharing is not None:
                    observation.sharing[i] = result.sharing(gradients)
        for site in exact if known.any() else ():
            add_gradients(site.parameters, self.exact_gradient(site, clean))
            self.meter.add(site.name, forward_equivalents=clean.batch_size * self._exact_cost(site))
        silent = int(((counting == 0) & (table[places] > 0)).sum())
        if silent:
            warn_silent(silent, "(sample, site) pairs")
        return Estimate(
            loss=clean.loss, output=clean.output, queries=sum(result.queries for result in results),
            lost=sum(lost), silent_samples=silent,
            lost_batch=not any(of_any) and not (exact and known.any()), observation=observation,
        )  # fmt: skip

    def _exact_cost(self, site: Site) -> float:
        return (1 if site.layers else 3) * self._known_costs.from_stage[site.first]

    def _table(self, clean: CleanPass, counts: Tensor | None) -> NDArray[np.int64]:
        """``(s, b)`` counts on the host; None: each site's budget in equal parts, less the pilots that were spent."""
        if counts is not None:
            return self._checked(clean, counts, least=self._least)
        spent = [self.pilots.queries if self._pilots_of(site, clean) else 0 for site in self.sites]
        return equal_table(self.sites, spent, clean.batch_size)

    def _checked(self, clean: CleanPass, counts: Tensor, *, least: int) -> NDArray[np.int64]:
        return checked_table(counts, self.sites, clean.batch_size, multiple=self.unit, least=least)

    def _drawn(self, clean: CleanPass, inclusion: Tensor) -> Tensor:
        """``(s, b)`` probabilities, checked."""
        reused = [self._pilots_of(site, clean) is not None and self.pilots.reuse for site in self.sites]
        return checked_inclusion(inclusion.to(clean.loss), self.sites, reused)

    def estimate_site(
        self, place: int, clean: CleanPass, counts: NDArray[np.int64], pilot_weight: Tensor | None,
        inclusion: Tensor | None, traces: TraceObservation | None, done: Q | None = None,
    ) -> SiteGradient:  # fmt: skip
        """Gradient of one site from its queries and the pilots that are reused; writes its traces to ``traces``.

        ``pilot_weight`` and ``inclusion`` are ``(s, b)``. ``done``: its queries, where they ran beside another site's.
        """
        site, engine = self.sites[place], self.engine
        if site.together:
            return self.joint_gradient(site, clean, counts)
        pilots = self._pilots_of(site, clean)
        first = self.pilots.queries if pilots else 0
        rest = done or engine.query(site, clean, counts, first_query=first, traces=traces is not None)
        rest = self.rescaled(clean, rest)
        if rest is not None:
            self.learn(site, rest)
        if rest is not None and traces is not None:
            _record(traces, place, rest)
        reused = pilots if self.pilots.reuse else None
        one = torch.ones_like(clean.loss) if inclusion is None else 1 / inclusion[place]
        parts = [(result, one) for result in (reused, rest) if result is not None]
        if reused is not None and rest is not None:
            weight = self.pilots.queries / site.queries_per_sample if pilot_weight is None else pilot_weight[place]
            share = pilot_share(reused, rest, weight)
            parts = [(reused, share), (rest, 1 - share)]
        gradients: Callable[[], Mapping[str, Tensor]] = dict
        if parts:
            gradients = partial(engine.mixed_gradient, site, clean, parts)
        if not all(result.small for result, _ in parts):
            gradients = partial(dict, gradients())
        survivors = torch.zeros_like(clean.loss) if rest is None else rest.survivors.to(clean.loss.dtype)
        found = SiteGradient(gradients, survivors, site.number(counts))
        alone = rest if len(parts) == 1 and inclusion is None else None
        return found if alone is None else replace(found, sharing=alone.sharing)

    def _counting(self, site: Site, clean: CleanPass, result: SiteGradient) -> Tensor:
        """``(b,)`` queries that enter the gradient: survivors and reused pilots, but no lone leave-one-out query."""
        pilots = self._pilots_of(site, clean)
        counting = torch.where(result.survivors >= self._least, result.survivors, 0)
        if pilots is not None and self.pilots.reuse:
            counting = counting + torch.where(pilots.found, pilots.survivors, 0)
        return counting

    def _pilots_of(self, site: Site, clean: CleanPass) -> Q | None:
        return self._pilot_results[1].get(site.name) if self._pilot_results[0] == clean.draw else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`SiteStrategy.load_state_dict`; results of pilots do not survive it."""
        super().load_state_dict(state)
        self._pilot_results = (-1, {})


def _record(traces: TraceObservation, place: int, result: QueryResult) -> None:
    traces.trace[place] = result.trace().to(traces.trace)
    traces.queries[place] = result.survivors.to(traces.queries)
