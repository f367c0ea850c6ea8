"""ZO-GraSP: which layers deserve how many coordinates, found from forward passes (DeepZero, ICLR 2024, section 4).

GraSP (Wang et al., ICLR 2020) scores every weight by ``S = -theta * (H g)``, half the first-order change of the squared
gradient norm when the weight is removed. Removing a weight with a negative score reduces the gradient flow, one with a
positive score increases it, so the weights with the **largest** scores are pruned (GraSP, section 4). This rule is
followed here; the public code of DeepZero keeps the largest magnitudes ``|S|`` instead.

DeepZero takes of this no more than the density of each layer: which weights of a layer are measured is drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flops_lightning.noise.keys import NoiseKey, row_seeds, standard_normal

Values = Callable[[str], Tensor]
"""The value of the parameter of a name."""


@dataclass(frozen=True, eq=False)
class GraspScores:
    """Scores, and what they cost.

    Attributes:
        scores: ``-theta * (H g)`` by name, shaped like the parameters.
        queries: Forward passes of one sample, without the clean ones.
        lost: Number of them lost to non-finite losses.
    """

    scores: dict[str, Tensor]
    queries: int
    lost: int


@torch.no_grad()
def zo_grasp_scores(
    losses_at: Callable[[Values], Tensor],
    parameters: Mapping[str, Tensor],
    clean_loss: Tensor,
    *,
    queries: int,
    step: float,
    seed: int,
) -> GraspScores:
    """Estimate GraSP's scores with a randomised gradient estimator.

    With ``u_q ~ N(0, I)`` over all parameters, and ``c`` such that the step along the gradient is as long as those
    along the directions (DeepZero has ``step`` for ``c``, whose effect depends on the scale of the loss)::

        ghat(theta) = 1/Q  sum_q [L(theta + step u_q) - L(theta)] / step  u_q
        Hg          = [ghat(theta + c ghat(theta)) - ghat(theta)] / c

    Both gradients have the same directions: otherwise their noise, divided by ``c``, would be all there is. For small
    steps the expectation is then ``(1 + 1/Q) H g + tr(H)/Q g``. With far fewer directions than parameters a single
    score is mostly noise, and a tensor's ratio says most of all how large its weights are.

    Directions are drawn again from their seeds instead of being kept: beside what ``losses_at`` holds, memory is that
    of three copies of the parameters.

    Args:
        losses_at: ``(b,)`` losses of the batch with the given parameters.
        parameters: The parameters ``theta`` by name.
        clean_loss: ``(b,)`` losses at ``theta``.
        queries: Number of directions ``Q``.
        step: Length of the finite differences, in units of a standard normal direction.
        seed: The run's seed.
    """
    seeds = row_seeds(NoiseKey(seed, 0, "zo_grasp"), np.zeros(queries, dtype=np.int64), np.arange(queries))

    def slopes_along(q: int, base: Values, at_base: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """``(b,)`` directional derivatives at a point, not finite where a loss is not, and the direction."""
        u = _direction(seeds[q], parameters)
        return (losses_at(lambda name: base(name) + step * u[name]) - at_base) / step, u

    def estimate(base: Values, at_base: Tensor, offset: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """``1/Q sum_q w_q u_q`` with the batch mean ``w`` of slopes less ``offset``, and the ``(q, b)`` slopes."""
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        slopes = torch.empty_like(offset)
        for q in range(queries):
            slopes[q], u = slopes_along(q, base, at_base)
            excess = slopes[q] - offset[q]
            weight = torch.where(torch.isfinite(excess), excess, 0).mean() / queries  # a lost row has weight zero
            for name, gradient in total.items():
                gradient.add_(weight.to(gradient.dtype) * u[name])
        return total, slopes

    gradient, here = estimate(parameters.__getitem__, clean_loss, clean_loss.new_zeros(queries, len(clean_loss)))
    entries = sum(p.numel() for p in parameters.values())
    length = torch.stack([g.float().square().sum() for g in gradient.values()]).sum().sqrt()
    scale = torch.where(length > 0, step * entries**0.5 / length, 1)

    def moved(name: str) -> Tensor:
        return parameters[name] + scale.to(gradient[name].dtype) * gradient[name]

    at_moved = losses_at(moved)
    change, there = estimate(moved, at_moved, here)
    scores = {name: -p * change[name] / scale.to(p.dtype) for name, p in parameters.items()}
    lost = int((~torch.isfinite(torch.cat([here, at_moved[None], there]))).sum())
    return GraspScores(scores, (2 * queries + 1) * len(clean_loss), lost)


def _direction(seed: int, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    like = next(iter(parameters.values()))
    sizes = [p.numel() for p in parameters.values()]
    flat = standard_normal([seed], (sum(sizes),), device=like.device, dtype=like.dtype)[0]
    parts = zip(parameters.items(), flat.split(sizes), strict=True)
    return {name: part.view(p.shape).to(p.dtype) for (name, p), part in parts}


def kept_ratios(scores: Mapping[str, Tensor], keep: int) -> dict[str, float]:
    """Part of each tensor that stays when the largest scores of all tensors together are pruned.

    Entries that tie at the threshold are kept in equal parts, so that scores that are all zero (a flat loss) give all
    tensors the same ratio. A tensor keeps one entry at least: without it, a bias that starts at zero, whose scores are
    zero, would never be trained.

    Args:
        scores: Finite scores by name.
        keep: Number of entries to keep, from 1 to all.
    """
    everything = torch.cat([score.flatten() for score in scores.values()])
    threshold = everything.kthvalue(keep).values
    below = torch.stack([(score < threshold).sum() for score in scores.values()]).tolist()
    tied = torch.stack([(score == threshold).sum() for score in scores.values()]).tolist()
    part = (keep - sum(below)) / sum(tied)
    return {
        name: max(1.0, low + part * equal) / score.numel()
        for (name, score), low, equal in zip(scores.items(), below, tied, strict=True)
    }
