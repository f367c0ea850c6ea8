"""The span of a layer's inputs: the gradient lies there. Directions in it are in ``test_row_directions.py``."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.noise.activation_guided import input_basis
from tests.reference.layouts import CONVOLUTIONS
from tests.reference.networks import normal, shaken


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


@given(samples=st.integers(1, 3), i=st.integers(1, 3), **CONVOLUTIONS)
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


def test_float32_inputs_of_low_rank_and_half_precision():
    half = normal(2, 3, 8).bfloat16()
    basis = input_basis(nn.Linear(8, 3), half)
    torch.testing.assert_close(half.float() @ basis.mT @ basis, half.float())
    x = (normal(2, 40, 3) @ normal(2, 3, 30, seed=1)).float() * 1e-3
    basis = input_basis(nn.Linear(30, 3), x)
    assert basis.dtype == torch.float32
    assert (basis.square().sum(2) > 0).sum(1).tolist() == [3, 3]
    torch.testing.assert_close(basis[:, :3] @ basis[:, :3].mT, torch.eye(3).expand(2, -1, -1))


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


def test_layers_that_are_refused():
    with pytest.raises(SettingError, match=r"activation_guided = .*groups=2.*several groups.*Leave this layer out"):
        input_basis(nn.Conv2d(4, 4, 3, groups=2), normal(1, 4, 5, 5))
    with pytest.raises(TypeError, match="LayerNorm has no weight matrix"):
        input_basis(nn.LayerNorm(4), normal(1, 4))
