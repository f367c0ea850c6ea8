"""Outputs of layers whose parameters are another tensor in every row, from the clean output and a small product.

Legend as in :mod:`flops_lightning.noise.row_directions`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flops_lightning.noise.row_directions import RowDirection


def moved_output(
    module: nn.Module,
    x: Tensor,
    output: Tensor,
    direction: RowDirection,
    sigma: float | Tensor,
    *,
    overwrite: bool = False,
) -> Tensor:
    """``(r, ...)`` output of a layer with the parameters ``theta + sigma D_r`` in row r.

    A linear adds ``sigma ((x b_r) a_r / sqrt(K) + bias_r)`` to its clean output; a convolution the same with a grouped
    convolution, one group a row (and group of the module), for ``x b_r``. Norms standardise their input once more.

    Args:
        module: A module that ``has_row_directions`` knows.
        x: ``(r, ..., i)`` its input, or ``(r, i, h, w)``; ``(r, i, ...)`` for a group norm.
        output: ``module(x)``; returned itself where nothing is trained. Result and product have its dtype.
        direction: Directions of the ``r`` rows.
        sigma: Noise width, or ``(r,)`` one for each row: the sign of an antithetic pair goes here.
        overwrite: ``output`` may be written to, which spares passes over memory; else it is not modified.

    Raises:
        TypeError: a layer family that is not known here.
    """
    moved, dtype = output, output.dtype
    if direction.a is not None and direction.b is not None:
        a = _times(direction.a, sigma, 1 / math.sqrt(direction.a.shape[1])).to(dtype)
        x, b = x.to(dtype), direction.b.to(dtype)
        if isinstance(module, nn.Conv2d):
            moved = _conv2d(module, x, output, a, b)
        else:
            moved = _linear(x, output, a, b, overwrite=overwrite)
    if direction.weight is not None:
        weight = _beside(module, _times(direction.weight, sigma).to(dtype), output.dim())
        normalised = _normalised(module, x.to(dtype))
        moved = output.addcmul_(normalised, weight) if overwrite else torch.addcmul(output, normalised, weight)
    if direction.bias is not None:
        bias = _beside(module, _times(direction.bias, sigma).to(dtype), output.dim())
        moved = moved.add_(bias) if overwrite or moved is not output else output + bias
    return moved


def _times(part: Tensor, sigma: float | Tensor, factor: float = 1.0) -> Tensor:
    if isinstance(sigma, Tensor) and sigma.dim():
        sigma = sigma.to(part.dtype).view(-1, *(1,) * (part.dim() - 1))
    return part * (sigma * factor)


def _linear(x: Tensor, output: Tensor, a: Tensor, b: Tensor, *, overwrite: bool) -> Tensor:
    rows, outputs = a.shape[0], a.shape[-1]
    inner = torch.bmm(x.reshape(rows, -1, x.shape[-1]), b.mT)  # (r, t, K)
    flat = output.reshape(rows, -1, outputs)
    if a.shape[1] > 1:
        return torch.baddbmm(flat, inner, a, out=flat if overwrite else None).view(output.shape)
    # With one factor the product is elementwise, where a matrix product is slower by half.
    return (flat.addcmul_(inner, a) if overwrite else torch.addcmul(flat, inner, a)).view(output.shape)


def _conv2d(module: nn.Conv2d, x: Tensor, output: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Every group of the module has the same filters b, and its own output channels of a."""
    (rows, size, _), groups = a.shape, module.groups
    filters = b.view(rows, 1, size, *module.weight.shape[1:]).expand(-1, groups, -1, -1, -1, -1).flatten(0, 2)
    x = x.reshape(1, -1, *x.shape[2:])
    inner = F.conv2d(x, filters, None, module.stride, module.padding, module.dilation, rows * groups)
    inner = inner.view(rows * groups, size, -1)  # (r g, K, h w)
    a = a.mT.reshape(rows * groups, -1, size)
    return torch.baddbmm(output.reshape(rows * groups, a.shape[1], -1), a, inner).view(output.shape)


def _normalised(module: nn.Module, x: Tensor) -> Tensor:
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, eps=module.eps)
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(x, module.normalized_shape, eps=module.eps)
    raise TypeError(f"{type(module).__name__} has no row directions here.")


def _beside(module: nn.Module, part: Tensor, dim: int) -> Tensor:
    """A parameter of each row, ``(r, *shape)``, with dimensions of size 1 where the layer's output has others."""
    ones = (1,) * (dim - part.dim())
    channels_first = isinstance(module, (nn.Conv2d, nn.GroupNorm))
    return part.view(*part.shape, *ones) if channels_first else part.view(part.shape[0], *ones, *part.shape[1:])
