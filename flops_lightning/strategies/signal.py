"""How much of a gradient estimate is signal: the derivative of the clean loss along it.

The noise of a step's queries is independent of the exact gradient ``G`` of its batch, and the estimate ``G_hat`` has
the expectation ``G``. So the derivative of the mean clean loss in the direction ``G_hat``, ``G . G_hat``, has the
expectation ``|G|^2``, and takes no backward pass: a central difference, two clean passes. Its variance is that of
``G . (G_hat - G)``, while the product of two independent estimates, which has the same expectation, adds that of the
product of their noises.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flops_lightning.network.rows import as_rows
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.queries import LossFunction, clean_pass, full_precision

RELATIVE_STEP = 2e-4
"""Norm of the parameters' move in the central difference, relative to theirs."""
SHARE = 4
"""One sample in so many shows the signal: which batch it is makes more difference than which part of it."""
LEAST_SAMPLES = 16
"""Of a small batch more samples show it, so many at least."""


def signal_samples(samples: int, draw: int) -> NDArray[np.int64]:
    """Places in a batch of the samples whose losses show its signal; over the draws, every sample is as often there.

    Chosen without regard to the queries, so that the derivative of their mean loss along an estimate has the same
    expectation as that of the batch's.
    """
    step = max(1, min(SHARE, samples // LEAST_SAMPLES))
    return np.arange(draw % step, samples, step)


@torch.no_grad()
def derivative_along(
    network: StagedNetwork, loss: LossFunction, inputs: Any, targets: Any, directions: Mapping[str, Tensor], *,
    rows: int = 256,
) -> Tensor:  # fmt: skip
    """Derivative of ``1/b sum_b L_b`` when parameters move along ``directions``, by their names; a float64 scalar.

    Samples whose loss is not finite count as zero. The network runs in eval mode and in the precision of its
    parameters, ``rows`` samples at a time. Its parameters are the same afterwards, to the bit.
    """
    named = dict(network.module.named_parameters())
    moved: list[tuple[nn.Parameter, Tensor]] = [(named[name], d) for name, d in directions.items()]
    kept = [p.detach().clone() for p, _ in moved]
    norm = _norm([d for _, d in moved])
    step = float(RELATIVE_STEP * _norm(kept) / norm) if norm > 0 else 0.0
    if not step:
        return torch.zeros((), dtype=torch.float64, device=kept[0].device)
    means = []
    try:
        with full_precision(kept[0]):
            for sign in (step, -step):
                for (p, direction), start in zip(moved, kept, strict=True):
                    p.copy_(torch.add(start, direction.to(start.dtype), alpha=sign))
                clean = clean_pass(network, loss, as_rows(inputs), targets, keep=(), draw=0, rows=rows)
                means.append(clean.loss.double())
    finally:
        for (p, _), start in zip(moved, kept, strict=True):
            p.copy_(start)
    change = (means[0] - means[1]) / (2 * step)
    return torch.where(change.isfinite(), change, 0.0).mean()


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.double().square().sum() for t in tensors]).sum().sqrt()
