"""TF32 on machines without it: the operands of float32 products are rounded to 10 bits of mantissa."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Which arguments are operands: a bias and what is added are not.
_OPERANDS: dict[Any, tuple[int, ...]] = {
    F.linear: (0, 1),
    F.conv2d: (0, 1),
    torch.matmul: (0, 1),
    torch.Tensor.matmul: (0, 1),
    torch.Tensor.__matmul__: (0, 1),
    torch.bmm: (0, 1),
    torch.baddbmm: (1, 2),
}


def tf32_rounded(x: Tensor) -> Tensor:
    """``x`` with the mantissa of TF32 (10 bits beside the leading one), to nearest; finite float32 below 2^115."""
    scaled = x * (2.0**13 + 1)  # Veltkamp's splitting: the leading 24 - 13 bits
    return scaled - (scaled - x)


class SimulatedTF32(TorchFunctionMode):
    """Rounds the operands of the products that a timm ViT and the perturbations of this package make.

    Products inside of a backward pass are not seen: the local VJP keeps its float32.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run ``func`` on rounded operands if it is a product of float32 tensors."""
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        operands = _OPERANDS.get(func, ())
        rounded = [_rounded(arg) if i in operands else arg for i, arg in enumerate(args)]
        return func(*rounded, **(kwargs or {}))


def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    if dropout_p or is_causal or attn_mask is not None:
        raise ValueError("attention with a mask or dropout is not simulated.")
    q, k, v = (_rounded(part) for part in (q, k, v))
    attention = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1)
    return _rounded(attention) @ v


def _rounded(x: Any) -> Any:
    return tf32_rounded(x) if isinstance(x, Tensor) and x.dtype == torch.float32 else x
