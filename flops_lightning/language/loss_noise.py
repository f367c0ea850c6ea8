"""What a language model in half precision makes of small differences: the rounding in its losses, measured."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.queries import at_least_float32
from flops_lightning.suffix_loss import PaddedTargets

SAMPLES, DIRECTIONS = 16, 4
CLEAR = 4.0
"""A workable sigma changes a loss by so many times its rounding."""
Score = Callable[[Tensor, PaddedTargets], Tensor]


@dataclass(frozen=True)
class LossNoise:
    """Root mean squares over samples and directions.

    Attributes:
        rounding: Error of a loss that differs from one input to the next.
        signal: What a step of sigma along a Gaussian direction changes in a loss.
    """

    rounding: float
    signal: float


@torch.no_grad()
def loss_noise(score: Score, z: Tensor, ids: PaddedTargets, sigma: float, *, seed: int = 0) -> LossNoise:
    """Rounding and signal of losses of vectors at ``z + sigma u`` and ``z - sigma u``.

    With independent errors ``e`` of variance ``v``, ``L_+ + L_- - 2 L`` has the mean square ``6 v`` where the loss is
    straight within sigma, and ``L_+ - L_-`` has ``4 signal^2 + 2 v``.
    """
    u = torch.randn((DIRECTIONS, *z.shape), generator=torch.Generator().manual_seed(seed)).to(z)
    clean = score(z, ids).double()
    plus, minus = (torch.stack([score(z + step * each, ids).double() for each in u]) for step in (sigma, -sigma))
    rounding = (plus + minus - 2 * clean).square().mean() / 6
    signal = (plus - minus).square().mean() / 4 - rounding / 2
    return LossNoise(float(rounding.sqrt()), float(signal.clamp_min(0).sqrt()))


def check_sigma(score: Score, z: Tensor, ids: PaddedTargets, sigma: float, dtype: torch.dtype) -> None:
    """Refuse a sigma whose differences of losses drown in the rounding of a model that runs in ``dtype``.

    Less than half of a difference's variance would be signal. Takes 16 samples and some dozen passes of them.

    Raises:
        SettingError: with the rounding that was measured, and a sigma that works.
    """
    few = torch.arange(min(SAMPLES, len(z)), device=z.device)
    z, ids = at_least_float32(z[few]), ids.take(few, few.cpu().numpy())
    size = float(z.square().mean().sqrt())
    # Below this width most entries of the vectors are rounded back to where they were, and no error is seen.
    narrowest = max(sigma, torch.finfo(dtype).eps * size)
    rounding = loss_noise(score, z, ids, narrowest).rounding
    told = loss_noise(score, z, ids, sigma).signal
    if told**2 > 2 * rounding**2:
        return
    width = narrowest
    while width < size and loss_noise(score, z, ids, width).signal < CLEAR * rounding:
        width *= 2
    load = "load the model in float32"
    remedy = f"Write {width:.2g} or more, or {load}." if width < size else f"{load.capitalize()}."
    problem = (
        f"changes a loss by {told:.1e} (rms), and {dtype} rounds it by {rounding:.1e}: its queries would show rounding."
    )
    raise SettingError("model.strategy.sites.sigma", sigma, problem, remedy)
