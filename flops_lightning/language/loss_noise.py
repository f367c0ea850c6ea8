"""What a language model in few bits makes of small differences: the rounding in its losses, measured."""

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
GRAIN = 2.0**-6
"""Noise of this share of the vectors' size shows the steps of eight bits, and of a smooth loss no curvature."""
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

    With independent errors of variance ``v``, the fourth difference ``L_+ + L_- - 4 (L_+/2 + L_-/2) + 6 L``, with steps
    of sigma and half of it, has the mean square ``70 v`` whatever the curvature, and ``L_+ - L_-`` has
    ``4 signal^2 + 2 v``.
    """
    u = torch.randn((DIRECTIONS, *z.shape), generator=torch.Generator().manual_seed(seed)).to(z)
    clean = score(z, ids).double()
    plus, minus, half_plus, half_minus = (
        torch.stack([score(z + step * each, ids).double() for each in u])
        for step in (sigma, -sigma, sigma / 2, -sigma / 2)
    )
    rounding = (plus + minus - 4 * (half_plus + half_minus) + 6 * clean).square().mean() / 70
    signal = (plus - minus).square().mean() / 4 - rounding / 2
    return LossNoise(float(rounding.sqrt()), float(signal.clamp_min(0).sqrt()))


def check_sigma(
    score: Score, z: Tensor, ids: PaddedTargets, sigma: float, dtype: torch.dtype, *, quantized: bool = False
) -> None:
    """Refuse a sigma whose differences of losses drown in the rounding of a model that runs in ``dtype``.

    Less than half of a difference's variance would be signal. Takes 16 samples and some dozen passes of them. What is
    ``quantized`` may round in any dtype: activations in eight bits make steps of a loss, weights alone do not.

    Raises:
        SettingError: with the rounding that was measured, and a sigma that works.
    """
    few = torch.arange(min(SAMPLES, len(z)), device=z.device)
    z, ids = at_least_float32(z[few]), ids.take(few, few.cpu().numpy())
    size = float(z.square().mean().sqrt())
    # Below this width most entries of the vectors are rounded back to where they were, and no error is seen.
    grain = max(2 * torch.finfo(dtype).eps, GRAIN if quantized else 0.0) * size
    rounding = loss_noise(score, z, ids, grain).rounding
    told = loss_noise(score, z, ids, sigma).signal
    if told**2 > 2 * rounding**2:
        return
    width = max(sigma, grain)
    while width < size and loss_noise(score, z, ids, width).signal < CLEAR * rounding:
        width *= 2
    rounds, load = str(dtype), "load the model in float32"
    if quantized:
        rounds, load = "the quantised model", f"{load}, with nothing but its weights quantised"
    remedy = f"Write {width:.2g} or more, or {load}." if width < size else f"{load.capitalize()}."
    seen = f"changes a loss by {told:.1e} (rms), and {rounds} rounds it by {rounding:.1e}"
    problem = f"{seen}: its queries would show rounding."
    raise SettingError("model.strategy.sites.sigma", sigma, problem, remedy)
