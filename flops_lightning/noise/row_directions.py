"""Directions on a layer's parameters, one for every row: what the ``factored`` noise layout of ES and SPSA is made of.

Row ``r`` (one query of one sample) moves the weight of a linear or convolution along a low-rank matrix that is never
built, ``D_r = sum_k a_rk b_rk^T / sqrt(K)``; biases and the weights of norms along a dense vector.

Legend: ``r`` row, ``t`` token, ``i`` / ``o`` input / output feature, ``k`` one of ``K`` factors. For a convolution
``i`` counts the weights of one output channel (input channels of one group x kernel).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flops_lightning.queries import full_precision

# Exact classes: a subclass may scale, pad or standardise in a forward of its own, and the product added here would be
# silently wrong. timm's LayerNorm computes what torch's does; it is named, not imported.
_LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.GroupNorm)
_SAME_AS_LAYER_NORM = ("timm.layers.norm.LayerNorm",)


@dataclass(frozen=True, eq=False)
class RowDirection:
    """Directions of ``r`` rows on one layer; what is not trained is None.

    Attributes:
        a: ``(r, K, o)`` output factors of the weight of a linear or convolution.
        b: ``(r, K, i)`` its input factors.
        weight: ``(r, *shape)`` direction of a norm's weight.
        bias: ``(r, *shape)`` direction of the bias.
        shared: ``(o, i)`` signs by which the matrix of every row is multiplied, elementwise (``flipout``).
    """

    a: Tensor | None = None
    b: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    shared: Tensor | None = None


def has_row_directions(module: nn.Module) -> bool:
    """Whether the functions here know the module: linear, zero-padded 2-d convolution, layer or group norm of torch."""
    kind = type(module)
    if kind not in _LAYERS and f"{kind.__module__}.{kind.__qualname__}" not in _SAME_AS_LAYER_NORM:
        return False
    if isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
        return False
    return {name for name, _ in module.named_parameters(recurse=False)} <= {"weight", "bias"}


def direction_size(module: nn.Module, trained: frozenset[str], rank: int, *, basis_size: int = 0) -> int:
    """Standard normals that one row's direction takes; ``basis_size`` ``m``: see :func:`row_direction`, 0: no basis."""
    return sum(math.prod(shape) for shape in _drawn_shapes(module, trained, rank, basis_size).values())


def row_direction(
    module: nn.Module, trained: frozenset[str], rank: int, flat: Tensor, basis: Tensor | None = None
) -> RowDirection:
    """Isotropic directions out of standard normals: ``E[vec(D) vec(D)^T] = I`` over the trained entries.

    ``K = min(rank, o, i)``. A factor as wide as its own side is not drawn: it is ``sqrt(K)`` times the identity, and
    ``D`` is then an ordinary dense Gaussian. For a gradient ``G`` of the weight the estimate ``<G, D> D`` has the trace
    ``||G||^2 ([(o + 2)(i + 2) + (K - 1)(o i + 2)] / K - 1)``, where dense noise has ``||G||^2 (o i + 1)``.

    With a basis the input factors are drawn in its span, ``E[vec(D) vec(D)^T] = I (x) P`` with ``P`` the projection
    onto it, and ``m`` takes the place of ``i`` in K and in the trace.

    ``-flat`` is not the antithetic partner: two negated factors make the same matrix. Negate ``sigma`` instead.

    Args:
        module: A module that :func:`has_row_directions` knows.
        trained: Which of its parameters move: a subset of ``{"weight", "bias"}``.
        rank: Largest K, at least 1.
        flat: ``(r, n)`` standard normals, ``n`` as :func:`direction_size` says, in float32 or float64; the parts are
            views of it where they can be.
        basis: ``(r, m, i)`` orthonormal or zero rows of ``activation_guided.input_basis``; no effect on bias and norms.
    """
    shapes = _drawn_shapes(module, trained, rank, 0 if basis is None else basis.shape[1])
    parts = flat.split([math.prod(shape) for shape in shapes.values()], dim=1)
    drawn = {name: part.unflatten(1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    a, b = drawn.get("a"), drawn.get("b")
    if b is not None and basis is not None:
        with full_precision(flat):
            b = b @ basis.to(b.dtype)
    if a is not None and b is None:
        size = a.shape[1]
        b = math.sqrt(size) * (_identity(flat, size) if basis is None else basis.to(flat.dtype))
    elif b is not None and a is None:
        a = math.sqrt(b.shape[1]) * _identity(flat, b.shape[1])
    return RowDirection(a, b, drawn.get("weight"), drawn.get("bias"))


def accumulate(module: nn.Module, direction: RowDirection, weights: Tensor) -> dict[str, Tensor]:
    """``sum_r weights_r D_r``, ``weights`` ``(r,)``, by the layer's own parameter names in the directions' dtype."""
    sums: dict[str, Tensor] = {}
    if direction.a is not None and direction.b is not None:
        weights = weights.to(direction.a.dtype)
        a = direction.a * (weights / math.sqrt(direction.a.shape[1]))[:, None, None]
        with full_precision(a):  # one product over r and k
            sums["weight"] = (a.flatten(0, 1).mT @ direction.b.flatten(0, 1)).view(_shape(module, "weight"))
        if direction.shared is not None:
            sums["weight"] = sums["weight"] * direction.shared
    for name, part in (("weight", direction.weight), ("bias", direction.bias)):
        if part is not None:
            with full_precision(part):
                sums[name] = (weights.to(part.dtype) @ part.flatten(1)).view(part.shape[1:])
    return sums


def sq_norm(direction: RowDirection) -> Tensor:
    """``(r,)`` squared norms over all trained entries: ``||D_r||_F^2 = sum_kl (a_rk . a_rl)(b_rk . b_rl) / K``.

    Shared signs change no norm of a matrix of rank one.
    """
    norms = []
    if direction.a is not None and direction.b is not None:
        a, b = direction.a, direction.b
        with full_precision(a):
            norms.append(((a @ a.mT) * (b @ b.mT)).sum((1, 2)) / a.shape[1])
    norms += [part.flatten(1).square().sum(1) for part in (direction.weight, direction.bias) if part is not None]
    return torch.stack(norms).sum(0)


def _drawn_shapes(module: nn.Module, trained: frozenset[str], rank: int, basis_size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the parts of one row's normals, in the order in which they lie in ``flat``."""
    shapes: dict[str, tuple[int, ...]] = {}
    if "weight" in trained and isinstance(module, (nn.Linear, nn.Conv2d)):
        outputs, *columns = _shape(module, "weight")
        inputs = basis_size or math.prod(columns)
        size = min(rank, outputs, inputs)
        if size < inputs:
            shapes["b"] = (size, inputs)
        if size < outputs or size == inputs:
            shapes["a"] = (size, outputs)
    elif "weight" in trained:
        shapes["weight"] = _shape(module, "weight")
    if "bias" in trained:
        shapes["bias"] = _shape(module, "bias")
    return shapes


def _shape(module: nn.Module, name: str) -> tuple[int, ...]:
    parameter: Tensor = getattr(module, name)
    return tuple(parameter.shape)


def _identity(flat: Tensor, size: int) -> Tensor:
    return torch.eye(size, dtype=flat.dtype, device=flat.device).expand(flat.shape[0], -1, -1)
