"""``J^T delta``: from the gradient at a site's output to that of its parameters.

In closed form at a single layer, without autograd (:func:`layer_gradient`); by autograd inside a block or a group of
blocks, never through its suffix (:func:`local_vjp`).

Legend: ``r`` row, ``t`` token (any number of middle dimensions), ``i`` / ``o`` input / output feature. ``delta`` is the
gradient of the loss with respect to the output; all functions sum over rows and tokens and never average. Products
have the dtype of ``delta``, under autocast too: half precision would round them, and float16 overflows.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from flops_lightning.errors import SettingError
from flops_lightning.network.rows import value_of
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.queries import CleanPass, at_least_float32, full_precision
from flops_lightning.strategies.precision import differentiable
from flops_lightning.strategies.sites import Site


def layer_gradient(module: nn.Module, x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """``J^T delta`` of one layer, summed over rows.

    By the layer's own parameter names. ``x`` is its input ``(r, ..., i)`` or ``(r, i, h, w)``, ``delta`` the gradient
    in its output ``(r, ..., o)`` or ``(r, o, h, w)``; see :func:`has_closed_form`.
    """
    x = x.to(delta.dtype)
    with full_precision(delta):
        if isinstance(module, nn.Linear):
            weight, bias = _linear(x, delta)
        elif isinstance(module, nn.Conv2d):
            weight, bias = _conv2d(module, x, delta)
        elif isinstance(module, nn.LayerNorm):
            weight, bias = _layer_norm(module, x, delta)
        else:
            raise TypeError(f"{type(module).__name__} has no closed form; Linear, Conv2d and LayerNorm have one.")
    gradients = {"weight": weight, "bias": bias}
    return {name: gradients[name] for name, _ in module.named_parameters(recurse=False)}


def _linear(x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    x, delta = x.flatten(0, -2), delta.flatten(0, -2)
    return delta.T @ x, delta.sum(0)  # dW = sum_t delta_t x_t^T, db = sum_t delta_t


def _conv2d(module: nn.Conv2d, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    weight = conv2d_weight(x, module.weight.shape, delta, module.stride, module.padding, module.dilation, module.groups)
    return weight, delta.sum((0, 2, 3))


def _layer_norm(module: nn.LayerNorm, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    normalised = F.layer_norm(x, module.normalized_shape, eps=module.eps)
    over = tuple(range(x.dim() - len(module.normalized_shape)))
    return (delta * normalised).sum(over), delta.sum(over)


def linear_gradient_sq_norm(x: Tensor, delta: Tensor, *, bias: bool) -> Tensor:
    """``(r,)`` squared norm of each row's parameter gradient of an ``nn.Linear``, without building it.

    ``||sum_t delta_t x_t^T||_F^2 = sum_{t,t'} (delta_t . delta_t') (x_t . x_t')``, plus ``||sum_t delta_t||^2`` for the
    bias.
    """
    if x.dim() == 2:
        x, delta = x[:, None], delta[:, None]
    x, delta = x.flatten(1, -2), delta.flatten(1, -2)
    with full_precision(delta):
        norms = ((delta @ delta.mT) * (x @ x.mT)).sum((1, 2))
    return norms + delta.sum(1).square().sum(-1) if bias else norms


def local_vjp(network: StagedNetwork, site: Site, clean: CleanPass, delta: Tensor, *, rows: int) -> dict[str, Tensor]:
    """``sum_b J_b^T delta_b``, ``J_b`` the Jacobian of the site's output in its parameters at the clean input.

    Under bfloat16 autocast the site runs in bfloat16, as in all mixed-precision training, and sums are in float32.
    Under float16 autocast it runs in float32: see :func:`differentiable`.

    ``delta`` ``(b, ...)`` is at the site's active output; ``rows`` bounds the samples whose graph is kept at a time.

    Returns:
        Gradients by parameter name, in float32 at least; zeros for a parameter that the output does not depend on.
    """
    total = {name: torch.zeros_like(at_least_float32(p)) for name, p in site.parameters.items()}
    parameters = list(site.parameters.values())
    with network.evaluating():
        for index, d in zip(clean.stand_ins().split(rows), delta.split(rows), strict=True):
            h = clean.activations[site.first].index_select(0, index)
            # Copies of the weights that autocast made without a graph would cut the gradient off.
            torch.clear_autocast_cache()
            with torch.enable_grad(), differentiable(h) as entering:
                output = value_of(network.run(entering, site.first, site.last + 1))
                output = output if site.tokens is None else output[:, site.tokens]
            with full_precision(d):  # each derivative has the dtype of its function, no lower
                gradients = _gradients(network.module, output, parameters, d.to(output.dtype))
            for name, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient
    return total


def _gradients(module: nn.Module, output: Tensor, parameters: list[nn.Parameter], d: Tensor) -> tuple[Any, ...]:
    try:
        return torch.autograd.grad(output, parameters, d, allow_unused=True)
    except RuntimeError as error:
        if "inplace operation" not in str(error):
            raise
        raise SettingError(
            "network", type(module).__name__, "writes to a tensor, perhaps its input, that its derivative needs.",
            "Write y = 2 * x instead of x *= 2, or a copy: x = x.clone().",
        ) from error  # fmt: skip


def graph_rows(site: Site, chunk_rows: int) -> int:
    """Samples whose graph takes about the memory of a forward pass of ``chunk_rows`` rows.

    A graph keeps every stage's activations, about twice as many as one stage holds while it runs.
    """
    return max(1, chunk_rows // (2 * (site.last - site.first + 1)))
