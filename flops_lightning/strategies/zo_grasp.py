"""ZO-GraSP: estimates from forward passes how densely to sample each layer (DeepZero, ICLR 2024, section 4).

GraSP (Wang et al., ICLR 2020) scores every weight by ``S = -theta * (H g)``, half the first-order change of the squared
gradient norm when the weight is set to zero. Removing a weight with a negative score weakens the gradient, removing one
with a positive score strengthens it, so GraSP prunes the weights with the **largest** scores (its section 4; DeepZero's
public code keeps the largest magnitudes ``|S|`` instead). DeepZero takes from GraSP only the fraction of weights that
remains in each layer, and measures that fraction of the layer's weights, drawn at random.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flops_lightning.noise.keys import NoiseKey, normal_rows, split_into

Values = Callable[[str], Tensor]
"""The value of the parameter of a name."""


@dataclass(frozen=True, eq=False)
class GraspScores:
    """Scores ``-theta * (H g)`` by parameter name; queries of one sample, and how many of them had no finite loss."""

    scores: dict[str, Tensor]
    queries: int
    lost: int


@torch.no_grad()
def zo_grasp_scores(
    losses_at: Callable[[Values], Tensor], parameters: Mapping[str, Tensor], clean_loss: Tensor, *,
    queries: int, step: float, seed: int,
) -> GraspScores:  # fmt: skip
    """Estimate GraSP's scores with a randomised gradient estimator.

    With ``u_q ~ N(0, I)`` over all parameters, and ``c`` such that the step along the gradient is as long as those
    along the directions (DeepZero has ``step`` for ``c``, whose effect depends on the scale of the loss)::

        ghat(theta) = 1/Q  sum_q [L(theta + step u_q) - L(theta)] / step  u_q
        Hg          = [ghat(theta + c ghat(theta)) - ghat(theta)] / c

    Both gradients use the same directions; with different ones, the difference of their noise over ``c`` would drown
    ``Hg``. For small steps the expectation is ``(1 + 1/Q) H g + tr(H)/Q g``. With far fewer directions than parameters
    single scores are mostly noise, and a tensor's ratio reflects mainly the size of its weights.

    Directions are drawn again from their seeds, so apart from what ``losses_at`` holds, three copies of the parameters
    are in memory. Losses of the batch are ``(b,)``, ``clean_loss`` those at ``parameters``; ``step`` is in units of a
    standard normal direction.
    """
    key = NoiseKey(seed, 0, "zo_grasp")

    def estimate(base: Values, at_base: Tensor, offset: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """``1/Q sum_q w_q u_q`` with the batch mean ``w`` of slopes less ``offset``, and the ``(q, b)`` slopes."""
        total = {name: torch.zeros_like(p) for name, p in parameters.items()}
        slopes = torch.empty_like(offset)
        for q in range(queries):
            u = _direction(key, q, parameters)
            slopes[q] = (losses_at(lambda name, u=u: base(name) + step * u[name]) - at_base) / step  # type: ignore[misc]
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


def _direction(key: NoiseKey, number: int, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    row, like = (np.zeros(1, dtype=np.int64), np.array([number])), next(iter(parameters.values()))
    size = sum(p.numel() for p in parameters.values())  # at once: seeding costs as much as a few numbers do
    (flat,) = normal_rows(key, *row, (size,), device=like.device, dtype=like.dtype)
    drawn = split_into(flat, {name: p.shape for name, p in parameters.items()})
    return {name: part.to(parameters[name].dtype) for name, part in drawn.items()}


def kept_ratios(scores: Mapping[str, Tensor], keep: int) -> dict[str, float]:
    """Fraction of each tensor that remains when all but the ``keep`` smallest scores of all tensors are pruned.

    Ties at the threshold are split evenly, so that a flat loss (all scores zero) gives all tensors the same ratio. Each
    tensor keeps one entry at least; a bias that starts at zero (so do its scores) would otherwise never be trained.
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
