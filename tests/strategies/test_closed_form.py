"""Closed forms against autograd, over shapes (no row and one row included)."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from flops_lightning.errors import SettingError
from flops_lightning.noise.row_directions import has_row_directions
from flops_lightning.strategies.vjp import layer_gradient, linear_gradient_sq_norm
from tests.reference.layouts import CONVOLUTIONS
from tests.reference.networks import bound, shaken, squared_error

ROWS = st.integers(0, 3)
SIZE = st.integers(1, 4)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def assert_equals_autograd(module: nn.Module, x: Tensor) -> None:
    module = shaken(module)
    output = module(x)
    delta = normal(*output.shape)
    named = dict(module.named_parameters())
    expected = torch.autograd.grad(output, list(named.values()), delta)
    found = layer_gradient(module, x, delta)
    assert set(found) == set(named)
    for name, gradient in zip(named, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10)


@given(rows=ROWS, tokens=st.lists(SIZE, max_size=2), i=SIZE, o=SIZE, bias=st.booleans())
def test_linear(rows, tokens, i, o, bias):
    assert_equals_autograd(nn.Linear(i, o, bias=bias), normal(rows, *tokens, i))


@given(
    rows=ROWS, groups=st.integers(1, 2), i=st.integers(1, 2), o=st.integers(1, 2), **CONVOLUTIONS, bias=st.booleans()
)
def test_conv2d(rows, groups, i, o, kernel, stride, padding, dilation, size, bias):
    conv = nn.Conv2d(groups * i, groups * o, kernel, stride, padding, dilation, groups, bias)
    assert_equals_autograd(conv, normal(rows, groups * i, *size))


@given(
    rows=ROWS,
    tokens=st.lists(SIZE, max_size=2),
    shape=st.lists(st.integers(2, 4), min_size=1, max_size=2),
    eps=st.sampled_from([1e-5, 0.1]),
    bias=st.booleans(),
)
def test_layer_norm(rows, tokens, shape, eps, bias):
    assert_equals_autograd(nn.LayerNorm(shape, eps=eps, bias=bias), normal(rows, *tokens, *shape))


def test_timm_s_layer_norm():
    assert_equals_autograd(timm.layers.LayerNorm(4), normal(2, 3, 4))


def test_inputs_in_half_precision_are_taken_up_to_the_noise_s():
    x, delta = normal(3, 2, 4).bfloat16(), normal(3, 2, 5).float()
    weight = layer_gradient(nn.Linear(4, 5), x, delta)["weight"]
    torch.testing.assert_close(weight, torch.einsum("rto,rti->oi", delta, x.float()))
    assert weight.dtype == torch.float32


def test_a_layer_without_a_closed_form():
    with pytest.raises(TypeError, match="Embedding has no closed form"):
        layer_gradient(nn.Embedding(3, 4), normal(2, 4), normal(2, 4))


@given(rows=ROWS, tokens=st.lists(SIZE, max_size=2), i=SIZE, o=SIZE, bias=st.booleans())
def test_squared_norm_of_a_linear_gradient(rows, tokens, i, o, bias):
    x, delta = normal(rows, *tokens, i), normal(rows, *tokens, o)
    explicit = [layer_gradient(nn.Linear(i, o, bias=bias), x[r : r + 1], delta[r : r + 1]) for r in range(rows)]
    expected = torch.tensor(
        [sum(float(g.square().sum()) for g in gradients.values()) for gradients in explicit], dtype=torch.float64
    )
    torch.testing.assert_close(linear_gradient_sq_norm(x, delta, bias=bias), expected)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(1, 1, 3, padding="same"),
        nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"),
        timm.layers.Conv2dSame(1, 1, 3),
        timm.layers.StdConv2d(1, 1, 3, padding=1),
        timm.layers.LayerNorm2d(1),
        Doubled(4, 4),
        parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.Upsample(scale_factor=1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_compute_something_else_are_refused(layer):
    """A subclass may pad, standardise or permute in its own forward: its closed form would be silently wrong."""
    assert has_row_directions(layer) == (type(layer) is nn.Conv2d and layer.padding == "same")
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(16, 2))
    assert net(torch.zeros(2, 1, 4, 4)).shape == (2, 2)
    with pytest.raises(SettingError, match=r"kind: (linear|block)|without a site"):
        bound(net, squared_error, [{"stages": ["0"], "kind": "linear"}, {"stages": ["2"], "kind": "linear"}])
