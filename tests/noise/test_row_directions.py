"""Row directions against a slow reference that builds every row's parameters and runs every row alone."""

from __future__ import annotations

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

from flops_lightning.noise.row_directions import (
    RowDirection,
    accumulate,
    direction_size,
    has_row_directions,
    row_direction,
    sq_norm,
)
from flops_lightning.strategies.row_layers import moved_output
from tests.reference.networks import shaken

BOTH = frozenset({"weight", "bias"})
ROWS = st.integers(1, 3)
SIZE = st.integers(1, 5)
RANK = st.integers(1, 6)
TRAINED = st.sampled_from([BOTH, frozenset({"weight"}), frozenset({"bias"}), frozenset()])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(module: nn.Module, trained: frozenset[str], rank: int, rows: int) -> RowDirection:
    flat = normal(rows, direction_size(module, trained, rank), seed=1)
    return row_direction(module, trained, rank, flat)


def built(module: nn.Module, direction: RowDirection) -> dict[str, Tensor]:
    """``(r, *shape)`` directions by parameter name, one outer product at a time."""
    dense = {name: getattr(direction, name) for name in ("weight", "bias") if getattr(direction, name) is not None}
    if direction.a is not None:
        rows, size, _ = direction.a.shape
        matrices = [
            sum(torch.outer(direction.a[r, k], direction.b[r, k]) for k in range(size)) / size**0.5
            for r in range(rows)
        ]  # fmt: skip
        dense["weight"] = torch.stack(matrices).view(rows, *module.weight.shape)
    return dense


def assert_equals_rows_alone(module: nn.Module, x: Tensor, direction: RowDirection, sigma: float | Tensor) -> None:
    """Outputs, weighted sums and norms are those of parameters that are built and run one row at a time."""
    dense, rows = built(module, direction), len(x)
    sigmas = sigma if isinstance(sigma, Tensor) else [sigma] * rows
    named = dict(module.named_parameters())
    alone = [
        functional_call(module, {n: p + sigmas[r] * dense[n][r] for n, p in named.items() if n in dense}, x[r : r + 1])
        for r in range(rows)
    ]
    output = module(x)
    before = output.clone()
    found = moved_output(module, x, output, direction, sigma)
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-10, atol=1e-10)
    assert torch.equal(output, before)

    weights = normal(rows, seed=2)
    expected = {n: sum(weights[r] * d[r] for r in range(rows)) for n, d in dense.items()}
    torch.testing.assert_close(accumulate(module, direction, weights), expected, rtol=1e-10, atol=1e-10)
    if dense:
        norms = sum(d.flatten(1).square().sum(1) for d in dense.values())
        torch.testing.assert_close(sq_norm(direction), norms, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def check(module: nn.Module, x: Tensor, trained: frozenset[str] = BOTH, rank: int = 2, sigma: float = 0.3) -> None:
    trained = trained & {name for name, _ in module.named_parameters()}
    assert has_row_directions(module)
    direction = drawn(shaken(module), trained, rank, len(x))
    assert set(built(module, direction)) == trained
    assert_equals_rows_alone(module, x, direction, sigma)


@given(rows=ROWS, tokens=st.lists(SIZE, max_size=3), i=SIZE, o=SIZE, bias=st.booleans(), trained=TRAINED, rank=RANK)
def test_linear(rows, tokens, i, o, bias, trained, rank):
    check(nn.Linear(i, o, bias=bias), normal(rows, *tokens, i), trained, rank)


@given(
    rows=ROWS,
    groups=st.integers(1, 3),
    i=st.integers(1, 2),
    o=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    size=st.tuples(st.integers(5, 7), st.integers(5, 7)),
    bias=st.booleans(),
    trained=TRAINED,
    rank=RANK,
)
def test_conv2d(rows, groups, i, o, kernel, stride, padding, dilation, size, bias, trained, rank):
    conv = nn.Conv2d(groups * i, groups * o, kernel, stride, padding, dilation, groups, bias)
    check(conv, normal(rows, groups * i, *size), trained, rank)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # the side with one zero more
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_convolution_with_padding_by_name(padding):
    check(nn.Conv2d(2, 3, (2, 3), padding=padding, dilation=(1, 2)), normal(3, 2, 6, 7))


def test_convolution_of_images_with_channels_last():
    x = normal(2, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    check(nn.Conv2d(3, 4, 3), x)


@given(
    rows=ROWS,
    tokens=st.lists(SIZE, max_size=2),
    shape=st.lists(st.integers(2, 4), min_size=1, max_size=2),
    eps=st.sampled_from([1e-5, 0.1]),
    bias=st.booleans(),
    trained=TRAINED,
)
def test_layer_norm(rows, tokens, shape, eps, bias, trained):
    check(nn.LayerNorm(shape, eps=eps, bias=bias), normal(rows, *tokens, *shape), trained)


def test_timm_s_layer_norm():
    check(timm.layers.LayerNorm(4), normal(2, 3, 4))


@given(
    rows=ROWS,
    groups=st.integers(1, 3),
    channels=st.integers(1, 2),
    space=st.lists(st.integers(2, 4), min_size=1, max_size=2),
    eps=st.sampled_from([1e-5, 0.1]),
    trained=TRAINED,
)
def test_group_norm(rows, groups, channels, space, eps, trained):
    check(nn.GroupNorm(groups, groups * channels, eps=eps), normal(rows, groups * channels, *space), trained)


LAYERS = {
    "linear": (lambda: nn.Linear(4, 5), (3, 2, 4)),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), (3, 4, 5, 5)),
    "layer norm": (lambda: nn.LayerNorm(4), (3, 2, 4)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (3, 4, 3, 3)),
}


def layer_and_input(name: str) -> tuple[nn.Module, Tensor]:
    make, shape = LAYERS[name]
    return shaken(make()), normal(*shape)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_every_row_may_have_a_sigma_of_its_own(name):
    module, x = layer_and_input(name)
    direction = drawn(module, BOTH, 2, len(x))
    assert_equals_rows_alone(module, x, direction, torch.tensor([0.3, -0.3, 0.1], dtype=torch.float64))


# ---- planted faults


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", ["linear", "conv", "layer norm"])
def test_the_output_may_be_overwritten(name, rank):
    if name == "layer norm":
        module, x = shaken(nn.LayerNorm(4)), normal(3, 2, 4)
    else:
        module, x = layer_and_input(name)
    direction = row_direction(module, BOTH, rank, normal(len(x), direction_size(module, BOTH, rank), seed=1))
    output = module(x).detach()
    kept = output.clone()
    expected = moved_output(module, x, output, direction, 0.3)
    assert torch.equal(output, kept)
    found = moved_output(module, x, output, direction, 0.3, overwrite=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (found.data_ptr() == output.data_ptr()) == (name != "conv")


def test_a_negative_sigma_is_the_antithetic_partner_and_negated_normals_are_not():
    module, x = shaken(nn.Linear(4, 5)), normal(3, 2, 4)
    flat = normal(3, direction_size(module, BOTH, 2), seed=1)
    output = module(x)
    direction = row_direction(module, BOTH, 2, flat)
    plus, minus = (moved_output(module, x, output, direction, sigma) for sigma in (0.3, -0.3))
    torch.testing.assert_close((plus + minus) / 2, output, rtol=1e-12, atol=1e-12)
    negated = built(module, row_direction(module, BOTH, 2, -flat))
    torch.testing.assert_close(negated["weight"], built(module, direction)["weight"])


# ---- sizes and memory


@pytest.mark.parametrize(
    ("module", "trained", "rank", "size"),
    [
        (nn.Linear(7, 9), BOTH, 2, 2 * (7 + 9) + 9),
        (nn.Linear(7, 9), frozenset({"bias"}), 2, 9),
        (nn.Linear(7, 9), BOTH, 7, 7 * 9 + 9),  # the rank of the inputs: an ordinary dense direction
        (nn.Linear(7, 3), BOTH, 4, 7 * 3 + 3),  # of the outputs
        (nn.Conv2d(4, 6, 3, groups=2), BOTH, 2, 2 * (6 + 2 * 3 * 3) + 6),
        (nn.LayerNorm(5), BOTH, 2, 10),
        (nn.GroupNorm(2, 6), frozenset({"weight"}), 2, 6),
        (nn.Linear(7, 9), frozenset(), 2, 0),
    ],
)
def test_numbers_that_a_row_takes(module, trained, rank, size):
    assert direction_size(module, trained, rank) == size


def test_numbers_that_a_row_takes_in_a_basis():
    linear = nn.Linear(7, 9)
    assert direction_size(linear, BOTH, 2, basis_size=4) == 2 * (4 + 9) + 9
    assert direction_size(linear, BOTH, 2, basis_size=1) == 9 + 9
    assert direction_size(nn.LayerNorm(5), BOTH, 2, basis_size=4) == 10


@pytest.mark.parametrize("name", LAYERS)
def test_directions_are_views_of_the_normals(name):
    module, _ = layer_and_input(name)
    flat = normal(3, direction_size(module, BOTH, 2))
    direction = row_direction(module, BOTH, 2, flat)
    parts = [p for p in (direction.a, direction.b, direction.weight, direction.bias) if p is not None]
    storage = flat.untyped_storage().data_ptr()
    assert [p.untyped_storage().data_ptr() for p in parts] == [storage] * len(parts)
    assert sum(p[0].numel() for p in parts) == flat.shape[1]


@pytest.mark.parametrize(("i", "o"), [(2, 5), (5, 2), (3, 3)])
def test_at_full_rank_the_direction_is_the_normals_themselves(i, o):
    module = nn.Linear(i, o, bias=False)
    flat = normal(4, direction_size(module, frozenset({"weight"}), 3))
    matrix = built(module, row_direction(module, frozenset({"weight"}), 3, flat))["weight"]
    expected = flat.view(4, i, o).mT if i <= o else flat.view(4, o, i)
    torch.testing.assert_close(matrix, expected, rtol=1e-12, atol=1e-12)


# ---- laws of chance

DRAWS = 100_000
SQUARE_DRAWS = 40_000


def samples(module: nn.Module, rank: int) -> Tensor:
    """``(draws, n)`` directions on all parameters of a module, flattened."""
    dense = drawn(module, BOTH, rank, SQUARE_DRAWS)
    parts = [dense.weight, dense.bias]
    if dense.a is not None:
        parts[0] = torch.einsum("rko,rki->roi", dense.a, dense.b) / dense.a.shape[1] ** 0.5
    return torch.cat([part.flatten(1) for part in parts], 1)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("name", ["linear", "conv", "layer norm"])
def test_directions_are_isotropic(name, rank):
    module = {"linear": nn.Linear(3, 4), "conv": nn.Conv2d(2, 4, (1, 2), groups=2), "layer norm": nn.LayerNorm(3)}[name]
    d = samples(module, rank)
    products = d[:, :, None] * d[:, None, :]
    error = (products.mean(0) - torch.eye(d.shape[1], dtype=d.dtype)) / (products.std(0) / SQUARE_DRAWS**0.5)
    assert error.abs().max() < 4.5  # standard errors; at most 256 products
    assert error.square().mean() < 1.5
    assert (products.std(0) / SQUARE_DRAWS**0.5).max() < 0.02


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_linear_loss_gives_back_its_gradient_with_the_trace_that_the_docstring_says(rank):
    i, o = 3, 4
    module = nn.Linear(i, o, bias=False)
    gradient = normal(o, i, seed=3)
    direction = drawn(module, frozenset({"weight"}), rank, DRAWS)
    slopes = torch.einsum("rko,oi,rki->r", direction.a, gradient, direction.b) / direction.a.shape[1] ** 0.5
    mean = accumulate(module, direction, slopes / DRAWS)["weight"]

    # trace of the covariance of one estimate; at the full rank, 3, the noise is dense
    size, s = min(rank, i), float(gradient.square().sum())
    dense = s * (o * i + 1)
    law = dense if rank == i else s * (((o + 2) * (i + 2) + (size - 1) * (o * i + 2)) / size - 1)
    assert float((mean - gradient).square().sum()) < 2 * law / DRAWS
    assert (law / DRAWS / s) ** 0.5 < 0.02
    squares = slopes.square() * sq_norm(direction)
    assert abs(float(squares.mean()) - s - law) < 4 * float(squares.std()) / DRAWS**0.5
    assert float(squares.std()) / DRAWS**0.5 < 0.05 * law


# ---- precision


def test_half_precision_outputs_take_directions_in_full_precision():
    module, x = nn.Linear(8, 6).bfloat16(), normal(3, 4, 8).bfloat16()
    flat = normal(3, direction_size(module, BOTH, 2), seed=1).float()
    direction, output = row_direction(module, BOTH, 2, flat), module(x)
    found = moved_output(module, x, output, direction, 0.5)
    dense = {name: d.double() for name, d in built(module, direction).items()}
    moved = 0.5 * (torch.einsum("rti,roi->rto", x.double(), dense["weight"]) + dense["bias"][:, None])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), output.double() + moved, rtol=0.02, atol=0.05)

    weights = normal(3, seed=2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        sums, norms = accumulate(module, direction, weights), sq_norm(direction)
    for name, d in dense.items():
        assert sums[name].dtype == torch.float32
        torch.testing.assert_close(sums[name].double(), torch.tensordot(weights.double(), d, 1), rtol=1e-5, atol=1e-5)
    expected = sum(d.flatten(1).square().sum(1) for d in dense.values())
    torch.testing.assert_close(norms.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_under_autocast_the_output_keeps_its_dtype(name):
    module, x = (part.float() for part in layer_and_input(name))
    direction = row_direction(module, BOTH, 2, normal(len(x), direction_size(module, BOTH, 2), seed=1).float())
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(x)
        found = moved_output(module, x, output, direction, 0.5)
    assert found.dtype == output.dtype
    exact = moved_output(module, x, module(x), direction, 0.5)
    torch.testing.assert_close(found.float(), exact, rtol=0.03, atol=0.06)


# ---- which modules


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, stride=2, padding=1, dilation=2, groups=4),
        nn.LayerNorm(4, elementwise_affine=False),
        timm.layers.LayerNorm(4),
        nn.GroupNorm(2, 4),
    ],
    ids=["conv", "no parameters", "timm LayerNorm", "GroupNorm"],
)
def test_known_layers(layer):
    assert has_row_directions(layer)


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"),
        nn.Conv1d(1, 1, 3),
        nn.BatchNorm2d(4),
        timm.layers.StdConv2d(1, 1, 3, padding=1),
        timm.layers.LayerNorm2d(1),
        Doubled(4, 4),
        parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.Sequential(nn.Linear(4, 4)),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_that_compute_something_else_are_not_known(layer):
    assert not has_row_directions(layer)


def test_a_norm_without_row_directions_is_refused():
    x = normal(2, 4, 3, 3)
    with pytest.raises(TypeError, match="BatchNorm2d has no row directions"):
        moved_output(nn.BatchNorm2d(4), x, x, RowDirection(weight=normal(2, 4)), 0.1)
