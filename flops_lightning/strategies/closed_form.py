"""Gradients of single layers in closed form: the Jacobian of a layer's output in its parameters, no autograd.

Legend: ``r`` row, ``t`` token (any number of middle dimensions), ``i`` / ``o`` input / output feature. ``delta`` is the
gradient of the loss with respect to the layer's output; all functions sum over rows and tokens and divide by nothing.
Products have the dtype of ``delta``, under autocast too: half precision would round them, and float16 overflows.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from flops_lightning.queries import full_precision

# Exact classes: a subclass may scale, pad or standardise in a forward of its own, and the closed form would be silently
# wrong. timm's LayerNorm computes what torch's does; it is named, not imported.
_LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm)
_SAME_AS_LAYER_NORM = ("timm.layers.norm.LayerNorm",)


def has_closed_form(module: nn.Module) -> bool:
    """Whether :func:`layer_gradient` knows the module: a linear, zero-padded 2-d convolution or layer norm of torch."""
    kind = type(module)
    if kind not in _LAYERS and f"{kind.__module__}.{kind.__qualname__}" not in _SAME_AS_LAYER_NORM:
        return False
    if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or isinstance(module.padding, str)):
        return False
    return {name for name, _ in module.named_parameters(recurse=False)} <= {"weight", "bias"}


def layer_gradient(module: nn.Module, x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """``J^T delta`` of one layer, summed over rows.

    Args:
        module: An ``nn.Linear``, ``nn.Conv2d`` or ``nn.LayerNorm``.
        x: Its input: ``(r, ..., i)`` or, for a convolution, ``(r, i, h, w)``.
        delta: Gradient with respect to its output, ``(r, ..., o)`` or ``(r, o, h, w)``.

    Returns:
        Gradients by the layer's own parameter names (``weight``, ``bias``), those that it has.

    Raises:
        TypeError: a layer family without a closed form here.
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
            raise TypeError(f"{type(module).__name__} has no closed form; classes with one: {_LAYERS}.")
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
