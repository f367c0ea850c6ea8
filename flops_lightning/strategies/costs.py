"""What a query costs: FLOPs counted once on one sample, in units of a full forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from flops_lightning.network.staging import StagedNetwork, flops
from flops_lightning.strategies.sites import Site


@dataclass(frozen=True)
class SiteCosts:
    """Costs in forward-equivalents (one full forward pass of one sample).

    Attributes:
        query: One query at a site: its suffix (and, where layers are perturbed together, the closed-form product of
            each row, counted at most).
        gradient: Once per sample and step: the local VJP (its forward and backward pass, three times the site's
            forward) or, at a single layer, the pass that fetches the layer's input.
        from_stage: The forward pass from each stage to the end.
    """

    query: dict[str, float]
    gradient: dict[str, float]
    from_stage: tuple[float, ...]


@torch.no_grad()
def site_costs(network: StagedNetwork, sites: Sequence[Site], inputs: Tensor) -> SiteCosts:
    """Count on the first sample of ``inputs``.

    A network without a single matrix product counts every stage as equal.
    """
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
