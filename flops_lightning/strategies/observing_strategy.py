"""What a strategy with queries at sites tells an allocator: pilots, traces, costs and scales, through its engine."""

from abc import abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, Generic

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.meter import CLEAN
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.phases import phase
from flops_lightning.protocol import SampleStatistics, TraceObservation
from flops_lightning.queries import CleanPass, LossFunction, refresh
from flops_lightning.strategies.costs import measured_costs
from flops_lightning.strategies.count_checks import checked_table
from flops_lightning.strategies.engine import Q, QueryEngine, QueryResult, SiteGradient
from flops_lightning.strategies.site_strategy import SiteStrategy
from flops_lightning.strategies.sites import Site
from flops_lightning.strategies.statistics import SCALE_EVERY, trace_predictors
from flops_lightning.suffix_loss import SuffixLoss
from flops_lightning.transfers import to_device


class ObservingStrategy(SiteStrategy, Generic[Q]):
    """Spends queries on what is known of samples before their counts are chosen; its subclass makes gradients."""

    _pilot_results: tuple[int, dict[str, Q]] = (-1, {})  # the draw of the batch, and the results by site

    @property
    @abstractmethod
    def engine(self) -> QueryEngine[Q]:
        """Runs the queries of a site."""

    @abstractmethod
    def site_scales(self, clean: CleanPass, metric: Mapping[str, Tensor] | None) -> list[float]:
        """Factors that convert each site's traces to squared units of its parameters, weighted by ``metric``."""

    def joint_gradient(self, site: Site, clean: CleanPass, counts: NDArray[np.int64]) -> SiteGradient:
        """Gradient of a site whose layers are perturbed together: it has no sums by sample, no pilots and no traces."""
        del clean, counts
        raise TypeError(f"{type(self).__name__} perturbs no layers together, as {site.name} wants.")

    def run_queries(self, site: Site, clean: CleanPass, counts: NDArray[np.int64]) -> None:
        """Run ``(b,)`` queries of a site, to time them."""
        run = self.joint_gradient if site.together else self.engine.query
        run(site, clean, counts)

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
        traces, survivors = self._unknown_traces(clean), dict[int, Tensor]()
        for i, site in enumerate(self.sites):
            if site.together:
                continue
            with self.network.evaluating():
                result = self.engine.query(site, clean, counts[i], first_query=first_query, traces=True)
            if result is None:
                continue
            record(traces, i, result)
            if keep is not None:
                keep[site.name] = result
            survivors[i] = result.survivors
        # One transfer for all sites.
        alive = torch.stack(list(survivors.values())).cpu().numpy() if survivors else ()
        for i, line in zip(survivors, alive, strict=True):
            site, queries = self.sites[i], self.sites[i].number(counts[i])
            cost = self._known_costs.of(site, queries, clean.batch_size) + float(counts[i] @ self.loss_costs(clean))
            lost = queries - site.number(line)
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
        self._statistics.request(names, self.loss)
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
        of_loss = self.loss_costs(clean)
        missing = (known.kept(self.network) - {0}) - clean.activations.keys()
        if missing:  # the clean pass came before the first request
            start = max(i for i in clean.activations if i <= min(missing))
            self.meter.add(CLEAN, forward_equivalents=self.pass_cost(clean, start))
            keep = missing | clean.activations.keys()
            clean = refresh(self.network, self.loss, clean, start, keep=keep, rows=self.chunk_rows)
        if known.predictors:
            filled["predictors"] = trace_predictors(self.network, self.loss, self.sites, clean, known.predictors)
        if "counted_costs" in names:
            each = np.array([costs.each(site, clean.batch_size) for site in self.sites])
            each = each[:, None] + of_loss if isinstance(self.loss, SuffixLoss) else each
            filled["counted_costs"] = to_device(each, clean.loss)
        if "fixed_costs" in names:
            shared = self.pass_cost(clean) / clean.batch_size + sum(map(self._exact_cost, self.exact_sites))
            shared = shared / len(self.sites)
            filled["fixed_costs"] = to_device([costs.gradient[site.name] + shared for site in self.sites], clean.loss)
        if "measured_costs" in names:
            if not known.measured_costs:
                with self.network.evaluating():
                    most = max(costs.query.values()) + float(of_loss.mean())
                    measured = measured_costs(self.run_queries, self.sites, clean, most, unit=self.unit)
                known.measured_costs = measured
            filled["measured_costs"] = to_device(known.measured_costs, clean.loss)
        for name, weights in (("scale", None), ("preconditioned_scale", metric)):
            if name in names:
                draw, scales = known.scales.get(name if weights else "scale", (-SCALE_EVERY, []))
                # It costs a gradient of each site and changes with the weights, slowly.
                if clean.draw - draw >= SCALE_EVERY:
                    scales = self.site_scales(clean, weights)
                    known.scales[name if weights else "scale"] = (clean.draw, scales)
                    self.meter.add(CLEAN, forward_equivalents=sum(costs.gradient.values()) * clean.batch_size)
                filled[name] = to_device(scales, clean.loss)
        return filled

    def _exact_cost(self, site: Site) -> float:
        return (1 if site.layers else 3) * self._known_costs.from_stage[site.first]

    def _checked(self, clean: CleanPass, counts: Tensor, *, least: int) -> NDArray[np.int64]:
        return checked_table(counts, self.sites, clean.batch_size, multiple=self.unit, least=least)

    def _pilots_of(self, site: Site, clean: CleanPass) -> Q | None:
        return self._pilot_results[1].get(site.name) if self._pilot_results[0] == clean.draw else None

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See :meth:`SiteStrategy.load_state_dict`; results of pilots do not survive it."""
        super().load_state_dict(state)
        self._pilot_results = (-1, {})


def record(traces: TraceObservation, place: int, result: QueryResult) -> None:
    """Write the traces of a site's queries to its line."""
    traces.trace[place] = result.trace().to(traces.trace)
    traces.queries[place] = result.survivors.to(traces.queries)
