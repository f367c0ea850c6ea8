"""What all strategies that spend queries at sites share: estimates from them, with counts for every sample and site.

The strategy's engine (:class:`QueryEngine`) runs the queries of one site and computes the gradient from them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.meter import CLEAN
from flops_lightning.network.rows import gather
from flops_lightning.protocol import TraceObservation
from flops_lightning.queries import CleanPass
from flops_lightning.strategies.base import Estimate, add_gradients, warn_silent
from flops_lightning.strategies.count_checks import checked_inclusion, equal_table
from flops_lightning.strategies.engine import Q, SiteGradient
from flops_lightning.strategies.observing_strategy import ObservingStrategy, record
from flops_lightning.strategies.pilots import pilot_share
from flops_lightning.strategies.signal import derivative_along, signal_samples
from flops_lightning.strategies.sites import Site
from flops_lightning.transfers import to_device


class QueryStrategy(ObservingStrategy[Q]):
    """Estimates gradients from perturbed forward passes at sites, with counts that differ from sample to sample."""

    # -- what a strategy adds ------------------------------------------------------------------------------------------

    def exact_gradient(self, site: Site, clean: CleanPass) -> dict[str, Tensor]:
        """Gradient of one of :attr:`exact_sites` by parameter name."""
        raise TypeError(f"{site.name} spends queries in {type(self).__name__} ({clean.batch_size} samples).")

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
        samples = signal_samples(clean.batch_size, clean.draw)
        index = to_device(samples, clean.loss.device)
        inputs, targets = gather((clean.activations[0], clean.targets), index, samples)
        part = replace(clean, targets=targets, loss=clean.loss.index_select(0, index))
        self.meter.add(CLEAN, clean_passes=2 * len(samples), forward_equivalents=2 * self.pass_cost(part))
        return derivative_along(self.network, self.loss, inputs, targets, directions, rows=self.chunk_rows)

    # -- the interface -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def estimate(
        self, clean: CleanPass, counts: Tensor | None = None, sites: Sequence[str] | None = None, *,
        pilot_weight: Tensor | None = None, inclusion: Tensor | None = None, traces: bool = False,
    ) -> Estimate:  # fmt: skip
        """Add the estimate to ``.grad``; see :meth:`ForwardGradientStrategy.estimate`."""
        table = self._table(clean, counts)
        weights = None if pilot_weight is None else to_device(pilot_weight, clean.loss).expand(len(self.sites), -1)
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
            runs = result.queries / max(1, site.number(table[i]))  # more than one where queries were repeated
            cost += runs * float(table[i] @ self.loss_costs(clean))
            lost.append(site.number(table[i]) - site.number(alive))
            self.meter.add(site.name, queries=result.queries, lost=lost[-1], forward_equivalents=cost)
            if used:
                gradients = result.gradients()
                add_gradients(site.parameters, gradients)
                sharing = result.sharing(gradients)
                if observation is not None and observation.sharing is not None and isinstance(sharing, Tensor):
                    observation.sharing[i] = sharing
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

    def _table(self, clean: CleanPass, counts: Tensor | None) -> NDArray[np.int64]:
        """``(s, b)`` counts on the host; None: each site's budget in equal parts, less the pilots that were spent."""
        if counts is not None:
            return self._checked(clean, counts, least=self._least)
        spent = [self.pilots.queries if self._pilots_of(site, clean) else 0 for site in self.sites]
        return equal_table(self.sites, spent, clean.batch_size)

    def _drawn(self, clean: CleanPass, inclusion: Tensor) -> Tensor:
        """``(s, b)`` probabilities, checked."""
        reused = [self._pilots_of(site, clean) is not None and self.pilots.reuse for site in self.sites]
        return checked_inclusion(to_device(inclusion, clean.loss), self.sites, reused)

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
            record(traces, place, rest)
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
