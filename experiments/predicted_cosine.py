"""Cosine of an estimate with the gradient, at rows of one linear layer's weight, from exact derivatives alone.

With ``G_b`` the gradient of sample ``b``'s loss at these rows, ``A_b`` independent queries and small sigma, theorem 1
of FLOPS (Ren et al., ICLR 2025) gives::

    <g_hat, g> / (||g|| sqrt(E ||g_hat||^2)) = (1 + sum_b Tr_b / A_b / ||sum_b G_b||^2)^(-1/2)

``Tr_b`` are :func:`likelihood_ratio_traces` or :func:`spsa_traces`. Noise may enter more than the rows: all outputs or
parameters of their layer. What it adds there is variance at the rows, too.

Legend: ``b`` sample, ``t`` token that gets noise, ``i`` / ``f`` input / output feature that gets noise; ``o`` rows.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flops_lightning.strategies.vjp import linear_gradient_sq_norm

ROUNDED = 16.0  # machine epsilons of what is added up, below which a gradient is zero


@dataclass(frozen=True)
class SquaredNorms:
    """Squared norms of gradients, ``(b,)`` of each sample's or ``()`` of their sum.

    Attributes:
        rows: At the rows in question.
        weight: At all of the layer's weight that gets noise.
        bias: At its bias; 0 where that gets none.
    """

    rows: Tensor
    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class RowGradients:
    """What a prediction needs to know of the gradients of a batch at rows of one layer's weight.

    Attributes:
        shape: Numbers of rows and of inputs.
        samples: Of each sample's gradient.
        batch: Of their sum.
        output: ``(b,)`` ``||delta_b||^2 sum_t ||x_bt||^2``.
    """

    shape: tuple[int, int]
    samples: SquaredNorms
    batch: SquaredNorms
    output: Tensor

    @classmethod
    def of(cls, x: Tensor, delta: Tensor, rows: slice = slice(None), *, bias: bool = False) -> "RowGradients":
        """From the layer's ``(b, t, i)`` inputs and the ``(b, t, f)`` gradients of the samples' losses at its outputs.

        Args:
            x: Inputs.
            delta: Gradients at the outputs that get noise, or whose weights get noise.
            rows: Which of them are in question.
            bias: Whether the bias gets noise, where parameters do.
        """
        own = delta[..., rows]
        total = delta.flatten(0, 1).T @ x.flatten(0, 1)  # (f, i)

        def biases(of: Tensor) -> Tensor:
            return of.double().square().sum(-1) if bias else torch.zeros(of.shape[:-1], dtype=torch.float64)

        weight = linear_gradient_sq_norm(x, delta, bias=False).double()
        at_rows = weight if own.shape == delta.shape else linear_gradient_sq_norm(x, own, bias=False).double()
        samples = SquaredNorms(at_rows, weight, biases(delta.sum(1)))
        batch = SquaredNorms(_squares(total[None, rows])[0], _squares(total[None])[0], biases(delta.sum((0, 1))))
        bound = (_squares(own) * _squares(x)).sqrt().sum()  # no cancellation makes their sum's norm larger
        if float(batch.rows.sqrt()) <= ROUNDED * torch.finfo(delta.dtype).eps * float(bound):
            batch = replace(batch, rows=torch.zeros_like(batch.rows))
        return cls((own.shape[-1], x.shape[-1]), samples, batch, _squares(delta) * _squares(x))

    @property
    def zero(self) -> bool:
        """Whether the batch's gradient at the rows is zero up to rounding: no estimate has a cosine with it."""
        return not float(self.batch.rows)


def likelihood_ratio_traces(gradients: RowGradients) -> Tensor:
    """``(b,)`` traces of the covariance of one query's gradient, noise at the layer's outputs, clean-loss baseline.

    ``Tr_b = o ||delta_b||^2 sum_t ||x_bt||^2 + ||G_b||^2``.
    """
    return gradients.shape[0] * gradients.output + gradients.samples.rows


def spsa_traces(gradients: RowGradients, *, rank: float = math.inf) -> Tensor:
    """``(b,)`` traces of the covariance, for a query of a pair that has a direction of its own.

    With dense directions on the rows alone, of ``D`` parameters, ``Tr_b = 2 (D + 1) ||G_b||^2``. Directions of a finite
    ``rank`` have longer tails. Pairs count as two queries.
    """
    own = gradients.samples
    return 2.0 * (_direction_square(own, gradients.shape, rank) - own.rows)


def shared_objective(gradients: RowGradients, pairs: float) -> Tensor:
    """J of SPSA with dense directions that all samples share, each with the same number of pairs.

    The cosine is ``(n / (n + D + 1))^(1/2)`` for noise on the rows alone, whatever the layer or the batch.
    """
    return (_direction_square(gradients.batch, gradients.shape, math.inf) - gradients.batch.rows) / pairs


def predicted_cosine(gradients: RowGradients, j: Tensor | float) -> float:
    """From J, ``sum_b Tr_b / A_b``; the batch's gradient must not be zero."""
    return float((1.0 + j / gradients.batch.rows).rsqrt())


def _direction_square(norms: SquaredNorms, shape: tuple[int, int], rank: float) -> Tensor:
    """``E (<G, z>^2 ||z_rows||^2)`` over directions with identity covariance: dense, or low-rank on the weight."""
    outputs, inputs = shape
    dense = outputs * inputs * (norms.weight + norms.bias) + 2.0 * norms.rows
    return dense + 2.0 * (outputs * norms.weight + (inputs + 1) * norms.rows) / rank


def _squares(x: Tensor) -> Tensor:
    """``(b,)`` float64."""
    return x.double().square().flatten(1).sum(1)
