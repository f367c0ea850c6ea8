"""What a query costs, in units of a full forward pass of one sample: counted in FLOPs, or measured on a clock."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.distributed import Communicator, mean_over_ranks
from flops_lightning.network.functional import FunctionalStages
from flops_lightning.network.operations import flops
from flops_lightning.network.staging import StageContext, StagedNetwork
from flops_lightning.queries import CleanPass, LossFunction
from flops_lightning.strategies.sites import Site
from flops_lightning.suffix_loss import SuffixLoss

TIMED_ROWS = 256
"""Queries that are timed at once, about."""
REPEATS = 3
RunQueries = Callable[[Site, CleanPass, NDArray[np.int64]], object]
"""Runs ``(b,)`` queries of a site as a step would."""


@dataclass(frozen=True)
class SiteCosts:
    """Counted costs in forward-equivalents (one full forward pass of one sample).

    Attributes:
        query: One query of a sample at a site: its suffix (and, where layers are perturbed together, the closed-form
            product of each row, counted at most).
        gradient: Once per sample and step: the local VJP (forward and backward pass, three times the site's forward)
            or, at a single layer, the pass that fetches the layer's input.
        from_stage: The forward pass from each stage to the end, without contexts, and without a loss that is the rest
            of the network.
        context: A direction at a site that pays for it once for all samples.
        contexts: All contexts of the network's stages, once in a clean pass.
        unit: FLOPs of a forward-equivalent.
    """

    query: dict[str, float]
    gradient: dict[str, float]
    from_stage: tuple[float, ...]
    context: dict[str, float] = field(default_factory=dict)
    contexts: float = 0.0
    unit: float = 1.0

    def of(self, site: Site, queries: int, samples: int) -> float:
        """Cost of queries at a site; of directions for all of ``samples``, where these are counted."""
        return queries * (self.query[site.name] * (samples if site.per_batch else 1) + self.context.get(site.name, 0.0))

    def each(self, site: Site, samples: int) -> float:
        """Cost of one more query of every sample, shared by the samples."""
        return self.of(site, 1, samples) / (samples if site.per_batch else 1)


@dataclass
class LossCosts:
    """Costs of a :class:`~flops_lightning.suffix_loss.SuffixLoss`, sample by sample; other losses cost nothing.

    Attributes:
        unit: FLOPs of a forward-equivalent with such a loss, those of network and loss at the mean of the first batch;
            0 before that.
        mean: What the loss costs there.
    """

    unit: float = 0.0
    mean: float = 0.0

    def count(
        self, network: StagedNetwork, sites: Sequence[Site], inputs: Any, loss: LossFunction, targets: Any,
        ranks: Communicator,
    ) -> SiteCosts:  # fmt: skip
        """The costs of sites, in the unit of the first batch that was counted, which all ranks have in common."""
        if not isinstance(loss, SuffixLoss):
            return site_costs(network, sites, inputs)
        own = loss.flops(targets)
        mean = float(mean_over_ranks(ranks, torch.tensor(own.mean(), device=inputs.device), len(own)))
        costs = site_costs(network, sites, inputs, loss=mean, unit=self.unit)
        self.unit, self.mean = costs.unit, mean / costs.unit
        return costs

    def of(self, loss: LossFunction, targets: Any, samples: int) -> NDArray[np.float64]:
        """``(b,)`` forward-equivalents that one query of each sample pays for the loss."""
        return loss.flops(targets) / self.unit if isinstance(loss, SuffixLoss) else np.zeros(samples)


@torch.no_grad()
def site_costs(
    network: StagedNetwork, sites: Sequence[Site], inputs: Any, *, loss: float = 0.0, unit: float = 0.0
) -> SiteCosts:
    """Count on the first sample of ``inputs``; stages of a network without a single matrix product count as equal.

    ``loss`` are FLOPs of a loss that is the rest of the network, ``unit`` those of a forward-equivalent (0: of network
    and loss).
    """
    # Copies of the parameters behind a context, since a stage may keep that of its own.
    copies = [{name: p.detach() for name, p in network.parameters_of(i, i).items()} for i in range(len(network))]
    # The counter asks every tensor that requires a gradient for its graph, and a view of a parameter has none here.
    with network.evaluating(), network.frozen_parameters(), network.unpaid():
        activations, by_stage, contexts = [inputs[:1]], [], []
        functional = FunctionalStages(network)
        for i, stage in enumerate(network.stages):
            run, of_context = stage.run, 0.0
            if stage.context is not None:
                of_context, value = flops(partial(_context, functional, i, copies[i]), activations[-1])
                run = partial(_with_context, stage.context, value)
            counted, output = flops(run, activations[-1].clone())  # the stage may work in place
            counted, of_context = stage.flops or (counted, of_context)
            by_stage.append(counted)
            contexts.append(of_context)
            activations.append(output)
        if not sum(by_stage) + loss:
            by_stage = [1.0] * len(network)
        full = unit or sum(by_stage) + loss
        from_stage = tuple(sum(by_stage[i:]) / full for i in range(len(network) + 1))
        query, gradient, context = {}, {}, {}
        for site in sites:
            inside = sum(by_stage[site.first : site.last + 1]) / full
            query[site.name] = from_stage[site.start]
            gradient[site.name] = 3 * inside
            if site.layers:
                joint = site.together
                query[site.name] += inside if joint else 0.0
                gradient[site.name] = 0.0 if joint else by_stage[site.first] / full
            elif site.in_parameters:
                gradient[site.name] = 0.0  # directions are drawn again, nothing runs
                of_contexts = sum(contexts[site.first : site.last + 1]) / full
                if site.per_batch:
                    context[site.name] = of_contexts
                else:
                    query[site.name] += of_contexts
            elif site.narrow:
                rows = activations[site.start][:, site.tokens]
                query[site.name] = flops(partial(network.run, start=site.start), rows)[0] / full
    return SiteCosts(query, gradient, from_stage, context, sum(contexts) / full, full)


def _context(functional: FunctionalStages, stage: int, values: Mapping[str, Tensor], _: Any) -> Tensor:
    return functional.context(stage, values)


def _with_context(context: StageContext, value: Tensor, x: Any) -> Any:
    return context.apply(x, value)


@torch.no_grad()
def measured_costs(run: RunQueries, sites: Sequence[Site], clean: CleanPass, most: float, *, unit: int) -> list[float]:
    """Cost of a query at each site from bottom to top, in forward-equivalents, from the time that it takes.

    FLOPs leave out the noise, the sums and the overhead of small layers; the clock does not. The time is the median of
    a few repetitions after a warm-up. The unit comes from the counted costs: the slowest query costs as much as the
    most expensive one was counted, ``most``. Measured costs differ from run to run, and the meter leaves out their own
    cost.
    """
    each = max(1, TIMED_ROWS // max(1, clean.batch_size) // unit) * unit
    counts = np.full(clean.batch_size, each, dtype=np.int64)
    seconds = [_seconds(run, site, clean, counts) for site in sites]
    return [time_ / max(seconds) * most for time_ in seconds]


def _seconds(run: RunQueries, site: Site, clean: CleanPass, counts: NDArray[np.int64]) -> float:
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        run(site, clean, counts)
        if clean.loss.is_cuda:
            torch.cuda.synchronize(clean.loss.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
