"""Plain reference steps: what one writes first, without any of this package's savings.

Both give the estimate of ``LikelihoodRatio`` with ``variant="baseline"`` from the same noise. :meth:`Reference.literal`
is equation 1 as it reads: one query after the other, each through the whole network, the gradient of each taken on its
own. :meth:`Reference.batched` repeats the batch once for each of its queries and keeps all noise until the losses are
known; it is spared two costs that plain code may well have, clean losses for each site, and a vector-Jacobian product
for each row instead of each sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.noise.keys import NoiseKey, normal_rows
from flops_lightning.queries import LossFunction
from flops_lightning.strategies.sites import Site


@dataclass(frozen=True, eq=False)
class Reference:
    """Likelihood-ratio estimates of the gradient of ``(1/b) sum_b L_b``, FLOPS (Ren et al., ICLR 2025), eq. 1."""

    network: StagedNetwork
    loss: LossFunction
    sites: Sequence[Site]  # blocks or groups
    inputs: Tensor  # (b, ...)
    targets: Tensor
    counts: Tensor  # (s, b), queries of each sample at each site, on the CPU, at least 1
    seed: int  # of the strategy
    draw: int  # its draw counter for the batch

    def __post_init__(self) -> None:
        for site in self.sites:
            if site.layers:
                problem = "perturbs single layers, which the reference step does not."
                raise SettingError("sites", site.name, problem, "Use kind: block or kind: group.")

    def noise(self, site: Site, samples: Tensor, queries: Tensor, like: Tensor) -> Tensor:
        """What the strategy draws for a site: ``(r, ...)``, for ``(r,)`` samples and queries."""
        key, shape = NoiseKey(self.seed, self.draw, site.name, 0), tuple(like.shape[1:])
        return normal_rows(key, samples.numpy(), queries.numpy(), shape, device=like.device, dtype=like.dtype)

    @torch.no_grad()
    def batched(self, rows: int) -> dict[str, Tensor]:
        """Gradients by parameter name, with ``rows`` rows in one forward pass."""
        network, loss, inputs, targets = self.network, self.loss, self.inputs, self.targets
        gradients: dict[str, Tensor] = {}
        with network.evaluating():
            clean = torch.cat(
                [loss(network.run(x), y) for x, y in zip(*(t.split(rows) for t in (inputs, targets)), strict=True)]
            )
            for site, counts in zip(self.sites, self.counts, strict=True):
                samples = torch.arange(len(inputs)).repeat_interleave(counts)
                queries = torch.cat([torch.arange(int(n)) for n in counts])
                place = samples.to(inputs.device)
                expanded, labels = inputs[place], targets[place]
                losses, kept = [], []
                for chunk in torch.arange(len(samples)).split(rows):
                    h = network.run(expanded[chunk], 0, site.last + 1)
                    active = _active(site, h)
                    z = self.noise(site, samples[chunk], queries[chunk], active)
                    active += site.sigma * z
                    losses.append(loss(network.run(h, site.last + 1), labels[chunk]))
                    kept.append(z)
                z = torch.cat(kept)
                weights = (torch.cat(losses) - clean[place]) / site.sigma / counts.to(clean)[place]
                weighted = weights.view(-1, *(1,) * (z.dim() - 1)) * z
                delta = z.new_zeros(len(inputs), *z.shape[1:]).index_add_(0, place, weighted)
                with torch.enable_grad():
                    output = _active(site, network.run(inputs, 0, site.last + 1))
                gradients |= _vjp(site, output, delta / len(inputs))
        return gradients

    @torch.no_grad()
    def literal(self) -> dict[str, Tensor]:
        """Gradients by parameter name, one sample and one query at a time."""
        network, loss, batch = self.network, self.loss, len(self.inputs)
        total = {name: torch.zeros_like(p) for site in self.sites for name, p in site.parameters.items()}
        with network.evaluating():
            for b in range(batch):
                x, y = self.inputs[b : b + 1], self.targets[b : b + 1]
                clean = loss(network.run(x), y)
                for site, counts in zip(self.sites, self.counts, strict=True):
                    for q in range(int(counts[b])):
                        with torch.enable_grad():
                            h = network.run(x, 0, site.last + 1)
                            active = _active(site, h)
                        z = self.noise(site, torch.tensor([b]), torch.tensor([q]), active)
                        moved = h.detach().clone()
                        _active(site, moved).add_(z, alpha=site.sigma)
                        weight = (loss(network.run(moved, site.last + 1), y) - clean) / site.sigma
                        for name, gradient in _vjp(site, active, weight * z).items():
                            total[name] += gradient / (int(counts[b]) * batch)
        return total


def _active(site: Site, h: Tensor) -> Tensor:
    return h if site.tokens is None else h[:, site.tokens]


def _vjp(site: Site, output: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """``sum_b J_b^T delta_b`` by parameter name."""
    gradients = torch.autograd.grad(output, list(site.parameters.values()), delta, materialize_grads=True)
    return dict(zip(site.parameters, gradients, strict=True))
