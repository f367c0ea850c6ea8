"""Where the gradient of a layer's weight lies: the span of the layer's own inputs.

A sample's gradient is ``dW = sum_t delta_t x_t^T``: every row of it is a combination of the sample's inputs ``x_t``.
Directions drawn in that span miss nothing of the gradient and waste no query beside it (AGZO, arXiv 2601.17261,
with the leading directions by power iteration; here every sample has a span of its own, whole unless capped).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flops_lightning.errors import SettingError

# Of the largest eigenvalue; 1e-5 in singular values, above what float32 inputs leave behind as rounding noise. A share
# of the gradient of that order is lost.
_NEGLIGIBLE = 1e-10


@torch.no_grad()
def input_basis(module: nn.Module, x: Tensor, rank_cap: int = 0) -> Tensor:
    """Orthonormal basis of the span of each sample's inputs, as ``row_direction`` takes it.

    With the full span ``<G, D> D`` stays an unbiased estimate of the sample's gradient ``G``, at about ``m / i`` of
    the variance: no gain where a sample has as many independent tokens as there are features. With ``rank_cap`` it
    estimates the gradient *projected onto the leading directions*: biased, at less variance still. The span is that of
    the clean inputs: where layers below move as well, it holds the gradient as sigma goes to 0.

    The cost is one symmetric eigenproblem in float64 of the smaller side, ``min(t, i)``, for every sample.

    Args:
        module: An ``nn.Linear``, or an ``nn.Conv2d`` of one group, whose inputs are the patches under its kernel.
        x: ``(b, ..., i)`` clean input, or ``(b, i, h, w)``; ``(b, i)`` is one vector a sample.
        rank_cap: Keep at most so many directions, those in which the inputs are largest; 0: all.

    Returns:
        ``(b, m, i)`` with orthonormal rows, the leading direction first, ``m = min(t, i)`` or ``rank_cap``. Rows beyond
        a sample's rank are zero, all of them where its input is zero or not finite. In float32, or float64 as x.

    Raises:
        SettingError: a convolution of several groups.
        TypeError: another layer family.
    """
    inputs = _inputs(module, x).double()
    inputs = torch.where(inputs.isfinite().all(2, keepdim=True).all(1, keepdim=True), inputs, 0.0)
    by_token = inputs.shape[1] <= inputs.shape[2]
    values, vectors = torch.linalg.eigh(inputs @ inputs.mT if by_token else inputs.mT @ inputs)  # rising
    size = min(values.shape[1], rank_cap or values.shape[1])
    values, basis = values[:, -size:].flip(1), vectors[:, :, -size:].mT.flip(1)
    if by_token:
        basis = basis @ inputs / values.clamp_min(torch.finfo(values.dtype).tiny).sqrt()[:, :, None]
    spans = values > _NEGLIGIBLE * values[:, :1]
    return torch.where(spans[:, :, None], basis, 0.0).to(torch.promote_types(x.dtype, torch.float32))


def _inputs(module: nn.Module, x: Tensor) -> Tensor:
    """``(b, t, i)`` vectors that the rows of the layer's weight are multiplied with."""
    if isinstance(module, nn.Linear):
        return x[:, None] if x.dim() == 2 else x.flatten(1, -2)
    if not isinstance(module, nn.Conv2d):
        raise TypeError(f"{type(module).__name__} has no weight matrix that its inputs are multiplied with.")
    if module.groups != 1:
        raise SettingError(
            "activation_guided", str(module), "is a convolution of several groups, each with inputs of its own.",
            "Leave this layer out, or write activation_guided: false.",
        )  # fmt: skip
    if isinstance(module.padding, str):
        return F.unfold(_padded(module, x), module.kernel_size, module.dilation, 0, module.stride).mT
    return F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).mT


def _padded(module: nn.Conv2d, x: Tensor) -> Tensor:
    """The input with the zeros that ``padding="same"`` (or ``"valid"``: none) puts around it."""
    if module.padding == "valid":
        return x
    height, width = (d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
    return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
