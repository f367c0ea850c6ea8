"""Mean and covariance of estimates of two prompts' gradients, and what the formulas say of them."""

from typing import Any

import torch
from torch import Tensor

from flops_lightning.strategies import SPSA, EvolutionStrategies

LOO: dict[str, Any] = {"variant": "leave_one_out"}
VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "baseline": (EvolutionStrategies, {}), "leave_one_out": (EvolutionStrategies, LOO), "antithetic": (SPSA, {}),
}  # fmt: skip
PAIRED = [
    (pairing, variant)
    for pairing in ("split", "crossed", "joint")
    for variant in VARIANTS
    if (pairing, variant) != ("crossed", "baseline")
]
COUNTS = torch.tensor([[24, 8, 16], [16, 16, 16]])
"""Queries of three images, and text draws."""
MANY = torch.tensor([[96, 32, 64], [12, 12, 12]])
"""So many that estimates are nearly normal, and their variance has a small standard error."""


def formulas(pairing: str, variant: str, counts: Tensor, of_image: Tensor, of_text: Tensor) -> list[float]:
    """Traces of the covariance of the estimates at the image and at the text prompt, where the loss is linear.

    Args:
        pairing: ``split``, ``crossed`` or ``joint``.
        variant: ``baseline``, ``leave_one_out`` or ``antithetic``.
        counts: ``(2, b)`` queries of each image, and text draws.
        of_image: ``(b, d)`` gradients of the samples' losses in the image prompt.
        of_text: The same in the text prompt.
    """
    one_sided = {"baseline": counts, "leave_one_out": counts - 1, "antithetic": counts / 2}[variant]
    (own, draws), batch = one_sided.to(of_image), len(of_image)
    norms = [of.square().sum(1) for of in (of_image, of_text)]
    d = [of.shape[1] for of in (of_image, of_text)]
    if pairing == "joint":
        # E (g v)^2 |v_side|^2 - |g_side|^2: the other side moves the loss too.
        return [
            float((((d[side] + 1) * norms[side] + d[side] * norms[1 - side]) / own).sum() / batch**2)
            for side in range(2)
        ]
    shared = (d[1] + 1) * of_text.mean(0).square().sum() / draws[0]
    return [float((d[0] + 1) * (norms[0] / own).sum() / batch**2), float(shared)]


def chi_square(lines: Tensor, expected: Tensor) -> float:
    """``n (mean - expected)^2 / variance`` of ``(n, d)`` estimates, summed over coordinates.

    Raises:
        AssertionError: the estimates scatter so much that their mean would fit anything.
    """
    error = lines.std(0) / len(lines) ** 0.5
    assert float(error.norm()) < 0.35 * float(expected.norm())
    return float(((lines.mean(0) - expected) / error).square().sum())


def trace(lines: Tensor) -> tuple[float, float]:
    """Trace of the covariance of ``(n, d)`` estimates and its standard error."""
    squares = (lines - lines.mean(0)).square().sum(1)
    return float(lines.var(0).sum()), float(squares.std() / len(lines) ** 0.5)
