"""Directions in the span of a layer's inputs: the gradient lies there, and the variance shrinks with the span."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from flops_lightning.errors import SettingError
from flops_lightning.noise.activation_guided import input_basis
from flops_lightning.noise.row_directions import RowDirection, direction_size, row_direction, sq_norm
from flops_lightning.strategies.row_layers import moved_output
from tests.reference.networks import shaken

BOTH = frozenset({"weight", "bias"})
WEIGHT = frozenset({"weight"})
DRAWS = 100_000


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(module: nn.Module, trained: frozenset[str], rank: int, basis: Tensor) -> RowDirection:
    flat = normal(len(basis), direction_size(module, trained, rank, basis_size=basis.shape[1]), seed=1)
    return row_direction(module, trained, rank, flat, basis)


def matrices(direction: RowDirection) -> Tensor:
    """``(r, o, i)`` directions of the weight."""
    return torch.einsum("rko,rki->roi", direction.a, direction.b) / direction.a.shape[1] ** 0.5


def sample_gradients(module: nn.Module, x: Tensor) -> Tensor:
    """``(b, o, i)`` gradient of every sample's own loss in the weight, by autograd."""
    shaken(module)
    output = module(x)
    delta = normal(*output.shape, seed=4)
    rows = [torch.autograd.grad((module(x[b : b + 1]) * delta[b]).sum(), module.weight)[0] for b in range(len(x))]
    return torch.stack(rows).flatten(2)


def assert_spans_the_gradient(module: nn.Module, x: Tensor) -> None:
    basis = input_basis(module, x)
    gradient = sample_gradients(module, x)
    torch.testing.assert_close(gradient @ basis.mT @ basis, gradient, rtol=1e-7, atol=1e-7)


@given(
    samples=st.integers(1, 3), tokens=st.lists(st.integers(1, 4), max_size=2), i=st.integers(1, 6), o=st.integers(1, 4)
)
def test_the_gradient_of_a_linear_lies_in_the_span(samples, tokens, i, o):
    assert_spans_the_gradient(nn.Linear(i, o), normal(samples, *tokens, i))


@given(
    samples=st.integers(1, 3),
    i=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    size=st.tuples(st.integers(5, 6), st.integers(5, 6)),
)
def test_the_gradient_of_a_convolution_lies_in_the_span(samples, i, kernel, stride, padding, dilation, size):
    assert_spans_the_gradient(nn.Conv2d(i, 2, kernel, stride, padding, dilation), normal(samples, i, *size))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # the side with one zero more
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_the_gradient_of_a_convolution_with_padding_by_name(padding):
    # At most 12 patches of 32 weights: a wrong padding has another span.
    assert_spans_the_gradient(nn.Conv2d(4, 2, (2, 4), padding=padding, dilation=(1, 1)), normal(2, 4, 2, 6))
    assert_spans_the_gradient(nn.Conv2d(4, 2, (3, 2), padding=padding, dilation=(1, 3)), normal(2, 4, 3, 4))


@pytest.mark.parametrize("shape", [(3, 2, 6), (3, 8, 4), (3, 5, 5), (3, 6), (2, 2, 2, 7)])
def test_the_basis_is_orthonormal(shape):
    basis = input_basis(nn.Linear(shape[-1], 2), normal(*shape))
    size = min(torch.Size(shape[1:-1]).numel(), shape[-1])
    torch.testing.assert_close(basis @ basis.mT, torch.eye(size, dtype=basis.dtype).expand(shape[0], -1, -1))


@pytest.mark.parametrize("tokens", [4, 9])
def test_rows_beyond_the_rank_of_the_inputs_are_zero(tokens):
    x = normal(3, tokens, 6)
    x[1] = normal(tokens, 2, seed=5) @ normal(2, 6, seed=6)  # rank 2
    x[2] = 0
    linear = nn.Linear(6, 3)
    basis = input_basis(linear, x)
    full = min(tokens, 6)
    assert (basis.square().sum(2) > 0).sum(1).tolist() == [full, 2, 0]
    torch.testing.assert_close(basis[1, :2] @ basis[1, :2].T, torch.eye(2, dtype=basis.dtype))
    torch.testing.assert_close(x @ basis.mT @ basis, x)
    assert_spans_the_gradient(linear, x)


def test_float32_inputs_of_low_rank():
    x = (normal(2, 40, 3) @ normal(2, 3, 30, seed=1)).float() * 1e-3
    basis = input_basis(nn.Linear(30, 3), x)
    assert basis.dtype == torch.float32
    assert (basis.square().sum(2) > 0).sum(1).tolist() == [3, 3]
    torch.testing.assert_close(basis[:, :3] @ basis[:, :3].mT, torch.eye(3).expand(2, -1, -1))


def test_half_precision_inputs_get_a_float32_basis():
    x = normal(2, 3, 8).bfloat16()
    basis = input_basis(nn.Linear(8, 3), x)
    assert basis.dtype == torch.float32
    torch.testing.assert_close(x.float() @ basis.mT @ basis, x.float())


def test_a_sample_whose_input_is_not_finite_gets_no_direction_and_harms_no_other():
    x = normal(3, 2, 6)
    expected = input_basis(nn.Linear(6, 3), x)
    expected[1] = 0
    x[1, 0, 3] = torch.nan
    torch.testing.assert_close(input_basis(nn.Linear(6, 3), x), expected)


@pytest.mark.parametrize("tokens", [4, 9])
def test_a_cap_keeps_the_leading_principal_directions(tokens):
    x = normal(3, tokens, 6)
    basis = input_basis(nn.Linear(6, 3), x, 2)
    leading = torch.linalg.svd(x, full_matrices=False).Vh[:, :2]
    assert basis.shape == (3, 2, 6)
    torch.testing.assert_close((basis * leading).sum(2).abs(), torch.ones(3, 2, dtype=x.dtype))
    assert input_basis(nn.Linear(6, 3), x, 100).shape == (3, min(tokens, 6), 6)


def test_an_all_zero_input_moves_the_bias_alone():
    module, x = shaken(nn.Linear(6, 3)), torch.zeros(2, 4, 6, dtype=torch.float64)
    direction = drawn(module, BOTH, 2, input_basis(module, x))
    assert torch.equal(matrices(direction), torch.zeros(2, 3, 6, dtype=torch.float64))
    moved = moved_output(module, x, module(x), direction, 0.3)
    torch.testing.assert_close(moved, module(x) + 0.3 * direction.bias[:, None])
    torch.testing.assert_close(sq_norm(direction), direction.bias.square().sum(1))


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Linear(6, 5), (3, 3, 6)), (nn.Linear(6, 2), (3, 3, 6)), (nn.Conv2d(2, 5, 3), (3, 2, 3, 4))],
)
@torch.no_grad()
def test_outputs_and_norms_are_those_of_each_row_s_matrix(module, shape, rank):
    x = normal(*shape)
    direction = drawn(shaken(module), BOTH, rank, input_basis(module, x))
    dense = matrices(direction)
    rows = []
    for r in range(len(x)):
        moved = {
            "weight": module.weight + 0.3 * dense[r].view_as(module.weight),
            "bias": module.bias + 0.3 * direction.bias[r],
        }
        rows.append(functional_call(module, moved, x[r : r + 1]))
    torch.testing.assert_close(moved_output(module, x, module(x), direction, 0.3), torch.cat(rows))
    norms = dense.square().sum((1, 2)) + direction.bias.square().sum(1)
    torch.testing.assert_close(sq_norm(direction), norms)


def test_a_basis_leaves_norms_alone():
    norm = nn.LayerNorm(6)
    flat = normal(2, direction_size(norm, BOTH, 2))
    with_basis = row_direction(norm, BOTH, 2, flat, normal(2, 3, 6))
    torch.testing.assert_close(with_basis.weight, flat[:, :6])
    torch.testing.assert_close(with_basis.bias, flat[:, 6:])


# ---- laws of chance: 2 tokens of rank 2 among 8 features


def estimates(rank: int, *, guided: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A sample's gradient ``(o, i)``, the mean of its estimates ``<G, D> D``, and their squared norms ``(draws,)``."""
    module, x = nn.Linear(8, 4, bias=False), normal(1, 2, 8)
    (gradient,) = sample_gradients(module, x)
    if guided:
        direction = drawn(module, WEIGHT, rank, input_basis(module, x).expand(DRAWS, -1, -1))
    else:
        direction = row_direction(module, WEIGHT, rank, normal(DRAWS, direction_size(module, WEIGHT, rank), seed=2))
    dense = matrices(direction)
    slopes = (dense * gradient).sum((1, 2))
    return gradient, (slopes[:, None, None] * dense).mean(0), slopes.square() * dense.square().sum((1, 2))


def trace_law(o: int, i: int, rank: int) -> float:
    """Trace of the covariance of ``<G, D> D`` over ``||G||^2``; dense where the rank is that of a side."""
    if rank >= min(o, i):
        return o * i + 1
    return ((o + 2) * (i + 2) + (rank - 1) * (o * i + 2)) / rank - 1


@pytest.mark.parametrize("rank", [1, 3])
def test_the_estimate_is_unbiased_at_the_variance_of_the_span(rank):
    gradient, mean, guided = estimates(rank, guided=True)
    s = float(gradient.square().sum())
    law = s * trace_law(4, 2, rank)
    assert float((mean - gradient).square().sum()) < 2 * law / DRAWS
    assert (law / DRAWS / s) ** 0.5 < 0.02

    _, _, unguided = estimates(rank, guided=False)
    trace, other = float(guided.mean()) - s, float(unguided.mean()) - s
    ratio, expected = trace / other, trace_law(4, 2, rank) / trace_law(4, 8, rank)
    error = ratio * ((float(guided.std()) / trace) ** 2 + (float(unguided.std()) / other) ** 2) ** 0.5 / DRAWS**0.5
    assert expected < 0.45
    assert abs(ratio - expected) < 4 * error
    assert error < 0.03 * expected


def test_directions_are_isotropic_in_the_span():
    module, x = nn.Linear(4, 2, bias=False), normal(1, 2, 4)
    basis = input_basis(module, x)
    dense = matrices(drawn(module, WEIGHT, 1, basis.expand(DRAWS, -1, -1))).flatten(1)
    products = dense[:, :, None] * dense[:, None, :]
    expected = torch.kron(torch.eye(2, dtype=x.dtype), basis[0].T @ basis[0])
    error = (products.mean(0) - expected) / (products.std(0) / DRAWS**0.5)
    assert error.abs().max() < 4


def test_with_a_cap_it_estimates_the_projected_gradient():
    module, x = nn.Linear(8, 4, bias=False), normal(1, 4, 8)
    (gradient,) = sample_gradients(module, x)
    basis = input_basis(module, x, 1)
    dense = matrices(drawn(module, WEIGHT, 1, basis.expand(DRAWS, -1, -1)))
    mean = ((dense * gradient).sum((1, 2))[:, None, None] * dense).mean(0)
    projected = gradient @ basis[0].T @ basis[0]
    law = float(projected.square().sum()) * trace_law(4, 1, 1)
    assert float((mean - projected).square().sum()) < 2 * law / DRAWS
    assert float((gradient - projected).square().sum()) > 100 * law / DRAWS


# ---- refusals


def test_a_convolution_of_several_groups_is_refused():
    with pytest.raises(SettingError, match=r"activation_guided = .*groups=2.*several groups.*Leave this layer out"):
        input_basis(nn.Conv2d(4, 4, 3, groups=2), normal(1, 4, 5, 5))


def test_a_norm_has_no_span():
    with pytest.raises(TypeError, match="LayerNorm has no weight matrix"):
        input_basis(nn.LayerNorm(4), normal(1, 4))
