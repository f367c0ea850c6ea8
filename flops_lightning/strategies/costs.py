"""What a query costs, in units of a full forward pass of one sample: counted in FLOPs, or measured on a clock."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flops_lightning.network.staging import StagedNetwork, flops
from flops_lightning.queries import CleanPass
from flops_lightning.strategies.sites import Site

TIMED_ROWS = 256
"""Queries that are timed at once, about."""
REPEATS = 3
RunQueries = Callable[[Site, CleanPass, NDArray[np.int64]], object]
"""Runs ``(b,)`` queries of a site as a step would."""


@dataclass(frozen=True)
class SiteCosts:
    """Counted costs in forward-equivalents (one full forward pass of one sample).

    Attributes:
        query: One query at a site: its suffix (and, where layers are perturbed together, the closed-form product of
            each row, counted at most).
        gradient: Once per sample and step: the local VJP (forward and backward pass, three times the site's forward)
            or, at a single layer, the pass that fetches the layer's input.
        from_stage: The forward pass from each stage to the end.
    """

    query: dict[str, float]
    gradient: dict[str, float]
    from_stage: tuple[float, ...]


@torch.no_grad()
def site_costs(network: StagedNetwork, sites: Sequence[Site], inputs: Any) -> SiteCosts:
    """Count on the first sample of ``inputs``; stages of a network without a single matrix product count as equal."""
    with network.evaluating(), _without_gradients(network):
        activations, by_stage = [inputs[:1]], []
        for stage in network.stages:
            counted, output = flops(stage.run, activations[-1].clone())  # the stage may work in place
            by_stage.append(counted)
            activations.append(output)
        if not sum(by_stage):
            by_stage = [1.0] * len(network)
        full = sum(by_stage)
        from_stage = tuple(sum(by_stage[i:]) / full for i in range(len(network) + 1))
        query, gradient = {}, {}
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
            elif site.narrow:
                rows = activations[site.start][:, site.tokens]
                query[site.name] = flops(partial(network.run, start=site.start), rows)[0] / full
    return SiteCosts(query, gradient, from_stage)


@contextmanager
def _without_gradients(network: StagedNetwork) -> Iterator[None]:
    # The counter asks every tensor that requires a gradient for its graph, and a view of a parameter has none here.
    trainable = list(network.trainable().values())
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@torch.no_grad()
def measured_costs(
    run: RunQueries, sites: Sequence[Site], clean: CleanPass, counted: SiteCosts, *, unit: int
) -> list[float]:
    """Cost of a query at each site from bottom to top, in forward-equivalents, from the time that it takes.

    FLOPs leave out the noise, the sums and the overhead of small layers; the clock does not. The time is the median of
    a few repetitions after a warm-up. The unit comes from the counted costs: the slowest query costs as much as the
    most expensive one was counted. Measured costs differ from run to run, and the meter leaves out their own cost.
    """
    each = max(1, TIMED_ROWS // max(1, clean.batch_size) // unit) * unit
    counts = np.full(clean.batch_size, each, dtype=np.int64)
    seconds = [_seconds(run, site, clean, counts) for site in sites]
    return [time_ / max(seconds) * max(counted.query.values()) for time_ in seconds]


def _seconds(run: RunQueries, site: Site, clean: CleanPass, counts: NDArray[np.int64]) -> float:
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        run(site, clean, counts)
        if clean.loss.is_cuda:
            torch.cuda.synchronize(clean.loss.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
