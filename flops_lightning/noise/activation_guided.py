"""Where the gradient of a layer's weight lies: in the span of the layer's own inputs, ``dW = sum_t delta_t x_t^T``.

Directions drawn in that span miss nothing of the gradient and waste no query beside it (AGZO, arXiv 2601.17261, with
the leading directions by power iteration; here every sample has a span of its own, whole unless capped).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flops_lightning.errors import SettingError

# Of the largest eigenvalue; 1e-5 in singular values, above the rounding noise of float32 inputs.
_NEGLIGIBLE = 1e-10


@torch.no_grad()
def input_basis(module: nn.Module, x: Tensor, rank_cap: int = 0) -> Tensor:
    """``(b, m, i)`` orthonormal rows that span each sample's inputs, the leading direction first; ``m = min(t, i)``.

    With the full span ``<G, D> D`` stays an unbiased estimate of the sample's gradient ``G``, at about ``m / i`` of
    the variance: no gain where a sample has as many independent tokens as there are features. With ``rank_cap`` it
    estimates the gradient *projected onto the leading directions*: biased, at less variance still. The span is that of
    the clean inputs: where layers below move as well, it holds the gradient as sigma goes to 0. The cost is a symmetric
    eigenproblem in float64 of the smaller side, ``min(t, i)``, for every sample.

    Rows beyond a sample's rank are zero, all of them where its input is not finite. In float32, or float64 as x.

    Args:
        module: An ``nn.Linear``, or an ``nn.Conv2d`` of one group, whose inputs are the patches under its kernel.
        x: ``(b, ..., i)`` clean input, or ``(b, i, h, w)``; ``(b, i)`` is one vector a sample.
        rank_cap: Keep at most so many directions, those in which the inputs are largest; 0: all.
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
    padding: Any = module.padding
    if padding == "same":
        height, width = (d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True))
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
    padding = 0 if isinstance(padding, str) else padding
    return F.unfold(x, module.kernel_size, module.dilation, padding, module.stride).mT
