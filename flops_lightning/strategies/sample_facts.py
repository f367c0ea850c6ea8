"""What a strategy tells an allocator of samples and sites beside losses and pilots, and what it keeps of that."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from flops_lightning.meter import CLEAN, QueryMeter
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.queries import CleanPass, LossFunction, refresh
from flops_lightning.strategies.costs import SiteCosts
from flops_lightning.strategies.sites import Site
from flops_lightning.strategies.trace_predictors import PREDICTORS, kept_for_predictors, trace_predictors

SCALE_EVERY = 20
"""Batches after which a scale is estimated anew."""
Metric = Mapping[str, Tensor]


class SampleFacts:
    """Fills the optional fields of :class:`SampleStatistics`.

    Attributes:
        predicted: Names of the trace predictors that are read.
    """

    def __init__(self) -> None:
        """Nothing known yet."""
        self.predicted: frozenset[str] = frozenset()
        # By name of the statistic: the draw at which they were estimated, and the scales.
        self._scales: dict[str, tuple[int, list[float]]] = {}
        self._seconds: list[float] = []

    def request(self, names: Collection[str]) -> None:
        """Note which predictors are read, so that clean passes keep their activations."""
        wanted = {name.split(".")[1] for name in names if name.startswith("predictors.")} & set(PREDICTORS)
        self.predicted = frozenset(wanted | (set(PREDICTORS) if "predictors" in names else set()))

    def kept(self, network: StagedNetwork) -> set[int]:
        """Indices of the activations that the predictors read."""
        return kept_for_predictors(network, self.predicted)

    def fill(
        self,
        names: Collection[str],
        clean: CleanPass,
        sites: Sequence[Site],
        *,
        network: StagedNetwork,
        loss: LossFunction,
        costs: SiteCosts,
        meter: QueryMeter,
        metric: Metric | None,
        scales: Callable[[CleanPass, Metric | None], list[float]],
        seconds: Callable[[CleanPass], list[float]],
    ) -> dict[str, Any]:
        """Fields by name.

        Args:
            names: Fields of :class:`SampleStatistics` that are read.
            clean: The batch's clean pass, with the activations in :meth:`kept`.
            sites: The sites.
            network: The network.
            loss: One loss a row.
            costs: What queries cost, counted.
            meter: Where the scales' cost is noted.
            metric: Weights of the squared derivatives for ``preconditioned_scale``; None while the optimiser has none,
                where it is ``scale``.
            scales: Estimates the factors from traces to squared units of the parameters; costs a gradient of each site.
            seconds: Times a query at each site.
        """
        filled: dict[str, Any] = {}
        if self.predicted:
            filled["predictors"] = trace_predictors(network, loss, sites, clean, self.predicted)
        if "counted_costs" in names:
            filled["counted_costs"] = clean.loss.new_tensor([costs.query[site.name] for site in sites])
        if "measured_costs" in names:
            self._seconds = self._seconds or seconds(clean)
            filled["measured_costs"] = clean.loss.new_tensor(self._seconds)
        for name, weights in (("scale", None), ("preconditioned_scale", metric)):
            if name not in names:
                continue
            kept_as = name if weights else "scale"
            known = self._scales.get(kept_as)
            # It costs a gradient of each site and changes with the weights, slowly.
            if known is None or clean.draw - known[0] >= SCALE_EVERY:
                known = self._scales[kept_as] = (clean.draw, scales(clean, weights))
                meter.add(CLEAN, forward_equivalents=sum(costs.gradient.values()) * clean.batch_size)
            filled[name] = clean.loss.new_tensor(known[1])
        return filled

    def complete(
        self,
        clean: CleanPass,
        kept: Collection[int],
        *,
        network: StagedNetwork,
        loss: LossFunction,
        costs: SiteCosts,
        meter: QueryMeter,
        rows: int,
    ) -> CleanPass:
        """With the activations that predictors read: at the first batch's clean pass nobody had asked for them."""
        missing = set(kept) - clean.activations.keys()
        if not missing:
            return clean
        start = max(i for i in clean.activations if i <= min(missing))
        meter.add(CLEAN, forward_equivalents=costs.from_stage[start] * clean.batch_size)
        return refresh(network, loss, clean, start, keep=kept, rows=rows)

    def state_dict(self) -> dict[str, Any]:
        """What was measured."""
        scales = {name: list(known) for name, known in self._scales.items()}
        return {"predictors": sorted(self.predicted), "scales": scales, "seconds": self._seconds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; a state from before there were such facts has none."""
        self._scales = {name: (draw, scale) for name, (draw, scale) in state.get("scales", {}).items()}
        self._seconds = list(state.get("seconds", []))
        self.predicted = frozenset(state.get("predictors", []))
