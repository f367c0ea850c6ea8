"""Layers whose parameters differ from row to row: the clean output plus a small product.

Legend as in :mod:`flops_lightning.noise.row_directions`.
"""

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.noise.row_directions import RowDirection, has_row_directions
from flops_lightning.strategies.sites import Site


@dataclass(frozen=True, eq=False)
class RowLayer:
    """A layer with row directions, and which of its parameters a site owns (leaf names)."""

    name: str
    module: nn.Module
    trained: frozenset[str]

    @property
    def has_matrix(self) -> bool:
        """Whether its weight gets a low-rank direction."""
        return "weight" in self.trained and isinstance(self.module, (nn.Linear, nn.Conv2d))


@dataclass(frozen=True, eq=False)
class SiteParts:
    """How a site's parameters are moved.

    Attributes:
        layers: In the order of the network.
        others: Names of the parameters outside such layers (class token, position embedding, prompts, ...), by stage.
            They get a dense direction a row, and their stage is run row by row (``torch.func.vmap``).
    """

    layers: list[RowLayer]
    others: dict[int, list[str]]

    @property
    def names(self) -> list[str]:
        """Names of the other parameters, those of one stage next to each other."""
        return [name for names in self.others.values() for name in names]


def row_remedy(layout: str) -> str:
    """What to write where a layer cannot move by row: a site with ``directions: own`` can be in ``layout: shared``."""
    return "write directions: shared at this site." if layout == "shared" else "write layout: shared."


def site_parts(network: StagedNetwork, site: Site, layout: str) -> SiteParts:
    """The layers of a site with directions by row, and its other parameters; tied parameters are refused."""
    layers: list[RowLayer] = []
    rest = list(site.parameters)
    holders = Counter(id(p) for module in network.module.modules() for p in module.parameters(recurse=False))
    for stage in range(site.first, site.last + 1):
        for name, module in network.modules_of(stage):
            own = dict(module.named_parameters(recurse=False))
            mine = {leaf: full for leaf, p in own.items() for full, q in site.parameters.items() if p is q}
            if not mine or not has_row_directions(module):
                continue
            tied = [full for leaf, full in mine.items() if holders[id(own[leaf])] > 1]
            if tied:
                raise SettingError(
                    "model.strategy.layout", layout,
                    f"perturbs layers one by one, but {tied[0]!r} belongs to two modules.",
                    f"Freeze it (freeze: {tied}), or {row_remedy(layout)}",
                )  # fmt: skip
            layers.append(RowLayer(name, module, frozenset(mine)))
            rest = [full for full in rest if full not in mine.values()]
    others: dict[int, list[str]] = {}
    for name in rest:
        stage = next(i for i in range(site.first, site.last + 1) if network.stages[i].owns(name))
        others.setdefault(stage, []).append(name)
    return SiteParts(layers, others)


def moved_output(
    module: nn.Module, x: Tensor, output: Tensor, direction: RowDirection, sigma: float | Tensor, *,
    overwrite: bool = False,
) -> Tensor:  # fmt: skip
    """``(r, ...)`` output of a layer with the parameters ``theta + sigma D_r`` in row r.

    A linear with ``shared`` signs ``Z`` adds ``sigma (a_r * Z (b_r * x) + bias_r)`` to its clean output, any other
    ``sigma ((x b_r) a_r / sqrt(K) + bias_r)``; a convolution the same with a grouped convolution, one group a row (and
    group of the module), for ``x b_r``. Norms standardise their input once more.

    Args:
        module: A module that ``has_row_directions`` knows; others raise a TypeError.
        x: ``(r, ..., i)`` its input, or ``(r, i, h, w)``; ``(r, i, ...)`` for a group norm.
        output: ``module(x)``; returned itself where nothing is trained. Result and product have its dtype.
        direction: Directions of the ``r`` rows.
        sigma: Noise width, or ``(r,)`` one for each row: the sign of an antithetic pair goes here.
        overwrite: ``output`` may be written to, which spares passes over memory; else it is not modified.
    """
    moved, dtype = output, output.dtype
    if direction.a is not None and direction.b is not None:
        a = times(direction.a, sigma, 1 / math.sqrt(direction.a.shape[1])).to(dtype)
        x, b = x.to(dtype), direction.b.to(dtype)
        if isinstance(module, nn.Conv2d):
            moved = _conv2d(module, x, output, a, b)
        elif direction.shared is not None:
            moved = _flipped(x, output, a, b, direction.shared.to(dtype), overwrite=overwrite)
        else:
            moved = _linear(x, output, a, b, overwrite=overwrite)
    if direction.weight is not None:
        weight = _beside(module, times(direction.weight, sigma).to(dtype), output.dim())
        normalised = _normalised(module, x.to(dtype))
        moved = output.addcmul_(normalised, weight) if overwrite else torch.addcmul(output, normalised, weight)
    if direction.bias is not None:
        bias = _beside(module, times(direction.bias, sigma).to(dtype), output.dim())
        moved = moved.add_(bias) if overwrite or moved is not output else output + bias
    return moved


def times(part: Tensor, sigma: float | Tensor, factor: float = 1.0) -> Tensor:
    """``part`` ``(r, ...)`` times one number, or one for each row."""
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


def _flipped(x: Tensor, output: Tensor, a: Tensor, b: Tensor, shared: Tensor, *, overwrite: bool) -> Tensor:
    """One product for all rows, with signs of each row before it (b) and after it (a, which has the width too)."""
    inner = F.linear(x * b.view(len(b), *(1,) * (x.dim() - 2), -1), shared)
    a = a.view(len(a), *(1,) * (x.dim() - 2), -1)
    return output.addcmul_(inner, a) if overwrite else torch.addcmul(output, inner, a)


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
