"""Plain reference steps: what one writes first, without any of this package's savings.

:func:`literal_gradient` is equation 1 as it reads: one query after the other, each through the whole network, the
gradient of each taken on its own. :func:`reference_gradient` does the same in batches: the batch is repeated once for
each of its queries, every repeated row runs through the whole network with noise added at the site, all noise is kept
until the losses are known, and one site follows the other. Both give the estimate of
:class:`~flops_lightning.strategies.LikelihoodRatio` with ``variant="baseline"`` from the same noise, which is what
their tests assert.

The latter is spared two costs that plain code may well have: the clean losses are computed once for all sites, and the
vector-Jacobian product is taken once for each sample (of the weighted mean of its noise) instead of once for each row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.noise.keys import NoiseKey, row_seeds, standard_normal
from flops_lightning.queries import LossFunction
from flops_lightning.strategies.sites import Site

RowNoise = Callable[[str, Tensor, Tensor, Tensor], Tensor]
"""``(name of the site, (r,) samples, (r,) queries, (r, ...) activation) -> (r, ...)`` standard normal noise."""


def keyed_noise(seed: int, *, draw: int, rank: int = 0) -> RowNoise:
    """The noise that a strategy with this seed and rank draws for the batch with this draw counter."""

    def noise(site: str, samples: Tensor, queries: Tensor, like: Tensor) -> Tensor:
        seeds = row_seeds(NoiseKey(seed, draw, site, rank), samples.numpy(), queries.numpy())
        return standard_normal(seeds, tuple(like.shape[1:]), device=like.device, dtype=like.dtype)

    return noise


@torch.no_grad()
def reference_gradient(
    network: StagedNetwork,
    loss: LossFunction,
    sites: Sequence[Site],
    inputs: Tensor,
    targets: Tensor,
    counts: Tensor,
    *,
    noise: RowNoise,
    rows: int,
) -> dict[str, Tensor]:
    """Likelihood-ratio estimate of the gradient of ``(1/b) sum_b L_b``, FLOPS (Ren et al., ICLR 2025), eq. 1.

    Args:
        network: The staged network; stages are only used to find the site.
        loss: One loss a row.
        sites: ``block`` or ``group`` sites.
        inputs: ``(b, ...)`` inputs.
        targets: ``(b, ...)`` targets.
        counts: ``(s, b)`` queries of each sample at each site, on the CPU, at least 1.
        noise: Where the noise comes from.
        rows: Rows in one forward pass.

    Returns:
        Gradients by parameter name.

    Raises:
        SettingError: a ``linear`` site.
    """
    _refuse_linear(sites)
    gradients: dict[str, Tensor] = {}
    with network.evaluating():
        chunks = zip(inputs.split(rows), targets.split(rows), strict=True)
        clean = torch.cat([loss(network.run(x), y) for x, y in chunks])
        for site, site_counts in zip(sites, counts, strict=True):
            delta = _delta(network, loss, site, inputs, targets, clean, site_counts, noise, rows)
            gradients |= _vjp(network, site, inputs, delta / len(inputs))
    return gradients


def _delta(
    network: StagedNetwork,
    loss: LossFunction,
    site: Site,
    inputs: Tensor,
    targets: Tensor,
    clean: Tensor,
    counts: Tensor,
    noise: RowNoise,
    rows: int,
) -> Tensor:
    """``(b, ...)`` mean over each sample's queries of ``(L_q - L) z_q / sigma``."""
    samples = torch.arange(len(inputs)).repeat_interleave(counts)
    queries = torch.cat([torch.arange(int(n)) for n in counts])
    place = samples.to(inputs.device)
    expanded, labels = inputs[place], targets[place]
    losses, kept = [], []
    for chunk in torch.arange(len(samples)).split(rows):
        h = network.run(expanded[chunk], 0, site.last + 1)
        active = h if site.tokens is None else h[:, site.tokens]
        z = noise(site.name, samples[chunk], queries[chunk], active)
        active += site.sigma * z
        losses.append(loss(network.run(h, site.last + 1), labels[chunk]))
        kept.append(z)
    z = torch.cat(kept)
    weights = (torch.cat(losses) - clean[place]) / site.sigma / counts.to(clean)[place]
    weighted = weights.view(-1, *(1,) * (z.dim() - 1)) * z
    return z.new_zeros(len(inputs), *z.shape[1:]).index_add_(0, place, weighted)


def _vjp(network: StagedNetwork, site: Site, inputs: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """``sum_b J_b^T delta_b`` by parameter name."""
    with torch.enable_grad():
        output = network.run(inputs, 0, site.last + 1)
        output = output if site.tokens is None else output[:, site.tokens]
    gradients = torch.autograd.grad(output, list(site.parameters.values()), delta, materialize_grads=True)
    return dict(zip(site.parameters, gradients, strict=True))


@torch.no_grad()
def literal_gradient(
    network: StagedNetwork,
    loss: LossFunction,
    sites: Sequence[Site],
    inputs: Tensor,
    targets: Tensor,
    counts: Tensor,
    *,
    noise: RowNoise,
) -> dict[str, Tensor]:
    """The estimate of :func:`reference_gradient`, one sample and one query at a time.

    Args:
        network: The staged network; stages are only used to find the site.
        loss: One loss a row.
        sites: ``block`` or ``group`` sites.
        inputs: ``(b, ...)`` inputs.
        targets: ``(b, ...)`` targets.
        counts: ``(s, b)`` queries of each sample at each site, on the CPU, at least 1.
        noise: Where the noise comes from.

    Returns:
        Gradients by parameter name.

    Raises:
        SettingError: a ``linear`` site.
    """
    _refuse_linear(sites)
    total = {name: torch.zeros_like(p) for site in sites for name, p in site.parameters.items()}
    with network.evaluating():
        for b in range(len(inputs)):
            x, y = inputs[b : b + 1], targets[b : b + 1]
            clean = loss(network.run(x), y)
            for site, of_site in zip(sites, counts, strict=True):
                for q in range(int(of_site[b])):
                    with torch.enable_grad():
                        h = network.run(x, 0, site.last + 1)
                        active = h if site.tokens is None else h[:, site.tokens]
                    z = noise(site.name, torch.tensor([b]), torch.tensor([q]), active)
                    moved = h.detach().clone()
                    (moved if site.tokens is None else moved[:, site.tokens]).add_(z, alpha=site.sigma)
                    weight = (loss(network.run(moved, site.last + 1), y) - clean) / site.sigma
                    parameters = list(site.parameters.values())
                    gradients = torch.autograd.grad(active, parameters, weight * z, materialize_grads=True)
                    for name, gradient in zip(site.parameters, gradients, strict=True):
                        total[name] += gradient / (int(of_site[b]) * len(inputs))
    return total


def _refuse_linear(sites: Sequence[Site]) -> None:
    for site in sites:
        if site.layers:
            raise SettingError(
                "sites", site.name, "perturbs single layers, which the reference step does not.",
                "Use kind: block or kind: group.",
            )  # fmt: skip
