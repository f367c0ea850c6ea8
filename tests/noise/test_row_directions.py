"""Row directions against a slow reference that builds every row's parameters and runs every row alone."""

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from flops_lightning.noise.activation_guided import input_basis
from flops_lightning.noise.row_directions import (
    RowDirection,
    accumulate,
    direction_size,
    has_row_directions,
    row_direction,
    sq_norm,
)
from flops_lightning.strategies.row_layers import moved_output
from tests.reference.layouts import CONVOLUTIONS
from tests.reference.networks import normal, shaken

BOTH = frozenset({"weight", "bias"})
ROWS = st.integers(1, 3)
SIZE = st.integers(1, 5)
RANK = st.integers(1, 6)
TRAINED = st.sampled_from([BOTH, frozenset({"weight"}), frozenset({"bias"}), frozenset()])


def drawn(
    module: nn.Module, trained: frozenset[str], rank: int, rows: int, basis: Tensor | None = None
) -> RowDirection:
    size = direction_size(module, trained, rank, basis_size=0 if basis is None else basis.shape[1])
    return row_direction(module, trained, rank, normal(rows, size, seed=1), basis)


def built(module: nn.Module, direction: RowDirection) -> dict[str, Tensor]:
    """``(r, *shape)`` directions by parameter name."""
    dense = {name: getattr(direction, name) for name in ("weight", "bias") if getattr(direction, name) is not None}
    if direction.a is not None:
        matrices = torch.einsum("rko,rki->roi", direction.a, direction.b) / direction.a.shape[1] ** 0.5
        dense["weight"] = matrices.view(-1, *module.weight.shape)
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
def check(module: nn.Module, x: Tensor, trained: frozenset[str] = BOTH, rank: int = 2, *, guided: bool = False) -> None:
    trained = trained & {name for name, _ in module.named_parameters()}
    assert has_row_directions(module)
    direction = drawn(shaken(module), trained, rank, len(x), input_basis(module, x) if guided else None)
    assert set(built(module, direction)) == trained
    for sigma in (0.3, torch.linspace(-0.3, 0.5, len(x), dtype=torch.float64)):
        assert_equals_rows_alone(module, x, direction, sigma)


@given(rows=ROWS, tokens=st.lists(SIZE, max_size=3), i=SIZE, o=SIZE, bias=st.booleans(), trained=TRAINED, rank=RANK)
def test_linear(rows, tokens, i, o, bias, trained, rank):
    check(nn.Linear(i, o, bias=bias), normal(rows, *tokens, i), trained, rank)


@given(
    rows=ROWS,
    groups=st.integers(1, 3),
    i=st.integers(1, 2),
    o=st.integers(1, 3),
    **CONVOLUTIONS,
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


def test_timms_layer_norm_images_with_channels_last_and_norms_without_parameters():
    check(timm.layers.LayerNorm(4), normal(2, 3, 4))
    check(nn.Conv2d(3, 4, 3), normal(2, 3, 5, 5).contiguous(memory_format=torch.channels_last))
    assert has_row_directions(nn.LayerNorm(4, elementwise_affine=False))


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize(
    ("module", "shape"),
    [(nn.Linear(6, 5), (3, 3, 6)), (nn.Linear(6, 2), (3, 3, 6)), (nn.Conv2d(2, 5, 3), (3, 2, 3, 4))],
)
def test_directions_in_the_span_of_the_inputs(module, shape, rank):
    check(module, normal(*shape), rank=rank, guided=True)


def test_a_basis_leaves_norms_alone():
    norm, flat = nn.LayerNorm(6), normal(2, 12)
    found = row_direction(norm, BOTH, 2, flat, normal(2, 3, 6))
    torch.testing.assert_close((found.weight, found.bias), (flat[:, :6], flat[:, 6:]))


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


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", ["linear", "conv", "layer norm"])
def test_the_output_may_be_overwritten(name, rank):
    module, x = layer_and_input(name)
    direction = drawn(module, BOTH, rank, len(x))
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


@pytest.mark.parametrize(
    ("module", "trained", "rank", "basis", "size"),
    [
        (nn.Linear(7, 9), BOTH, 2, 0, 2 * (7 + 9) + 9),
        (nn.Linear(7, 9), BOTH, 2, 4, 2 * (4 + 9) + 9),
        (nn.Linear(7, 9), BOTH, 2, 1, 9 + 9),
        (nn.Linear(7, 9), frozenset({"bias"}), 2, 0, 9),
        (nn.Linear(7, 9), BOTH, 7, 0, 7 * 9 + 9),  # the rank of the inputs: an ordinary dense direction
        (nn.Linear(7, 3), BOTH, 4, 0, 7 * 3 + 3),  # of the outputs
        (nn.Conv2d(4, 6, 3, groups=2), BOTH, 2, 0, 2 * (6 + 2 * 3 * 3) + 6),
        (nn.LayerNorm(5), BOTH, 2, 0, 10),
        (nn.LayerNorm(5), BOTH, 2, 4, 10),
        (nn.GroupNorm(2, 6), frozenset({"weight"}), 2, 0, 6),
        (nn.Linear(7, 9), frozenset(), 2, 0, 0),
    ],
)
def test_numbers_that_a_row_takes(module, trained, rank, basis, size):
    assert direction_size(module, trained, rank, basis_size=basis) == size


@pytest.mark.parametrize("name", LAYERS)
def test_directions_are_views_of_the_normals(name):
    module, _ = layer_and_input(name)
    flat = normal(3, direction_size(module, BOTH, 2))
    direction = row_direction(module, BOTH, 2, flat)
    parts = [p for p in (direction.a, direction.b, direction.weight, direction.bias) if p is not None]
    storage = flat.untyped_storage().data_ptr()
    assert [p.untyped_storage().data_ptr() for p in parts] == [storage] * len(parts)
    assert sum(p[0].numel() for p in parts) == flat.shape[1]


DRAWS = 100_000


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize(
    ("module", "guided"),
    [
        (nn.Linear(3, 4), False),
        (nn.Linear(3, 4), True),
        (nn.Conv2d(2, 4, (1, 2), groups=2), False),
        (nn.LayerNorm(3), False),
    ],
)
def test_directions_are_isotropic(module, rank, guided):
    """In the span, if guided: ``E[vec(D) vec(D)^T]`` is the projection onto it."""
    draws, basis = 40_000, input_basis(module, normal(1, 2, 3)) if guided else None
    expected = torch.eye(sum(p.numel() for p in module.parameters()), dtype=torch.float64)
    if basis is not None:
        expected[:12, :12] = torch.kron(torch.eye(4, dtype=basis.dtype), basis[0].T @ basis[0])
        basis = basis.expand(draws, -1, -1)
    dense = built(module, drawn(module, BOTH, rank, draws, basis))
    d = torch.cat([dense["weight"].flatten(1), dense["bias"]], 1)
    products = d[:, :, None] * d[:, None, :]
    error = (products.mean(0) - expected) / (products.std(0) / draws**0.5 + 1e-12)
    assert error.abs().max() < 4.5  # standard errors; at most 256 products
    assert error.square().mean() < 1.5
    assert (products.std(0) / draws**0.5).max() < 0.03


@pytest.mark.parametrize(("guided", "cap", "span"), [(False, 0, 3), (True, 0, 2), (True, 1, 1)])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_linear_loss_gives_back_its_gradient_with_the_trace_that_the_docstring_says(rank, guided, cap, span):
    """With a cap the gradient projected onto the leading directions; the variance shrinks with the span."""
    o, module, x = 4, nn.Linear(3, 4, bias=False), normal(1, 2, 3)
    gradient = normal(o, 2, seed=3) @ x[0]
    basis = input_basis(module, x, cap).expand(DRAWS, -1, -1) if guided else None
    expected = gradient if basis is None else gradient @ basis[0].T @ basis[0]
    assert ((expected - gradient).norm() > 0.1) == (cap == 1)
    direction = drawn(module, frozenset({"weight"}), rank, DRAWS, basis)
    slopes = torch.einsum("rko,oi,rki->r", direction.a, gradient, direction.b) / direction.a.shape[1] ** 0.5
    mean = accumulate(module, direction, slopes / DRAWS)["weight"]

    # trace of the covariance of one estimate; at the full rank the noise is dense
    size, s = min(rank, span), float(expected.square().sum())
    dense = o * span + 1
    law = s * (dense if rank >= span else ((o + 2) * (span + 2) + (size - 1) * (o * span + 2)) / size - 1)
    assert float((mean - expected).square().sum()) < 2 * law / DRAWS
    assert (law / DRAWS / s) ** 0.5 < 0.02
    squares = slopes.square() * sq_norm(direction)
    assert abs(float(squares.mean()) - s - law) < 4 * float(squares.std()) / DRAWS**0.5
    assert float(squares.std()) / DRAWS**0.5 < 0.05 * law


def test_half_precision_outputs_take_directions_in_full_precision():
    module, x = nn.Linear(8, 6).bfloat16(), normal(3, 4, 8).bfloat16()
    flat = normal(3, direction_size(module, BOTH, 2), seed=1).float()
    direction, output = row_direction(module, BOTH, 2, flat), module(x)
    found = moved_output(module, x, output, direction, 0.5)
    dense = {name: d.double() for name, d in built(module, direction).items()}
    moved = 0.5 * (torch.einsum("rti,roi->rto", x.double(), dense["weight"]) + dense["bias"][:, None])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), output.double() + moved, rtol=0.02, atol=0.05)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norms = sq_norm(direction)
    expected = sum(d.flatten(1).square().sum(1) for d in dense.values())
    torch.testing.assert_close(norms.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_norm_without_row_directions_is_refused():
    x = normal(2, 4, 3, 3)
    with pytest.raises(TypeError, match="BatchNorm2d has no row directions"):
        moved_output(nn.BatchNorm2d(4), x, x, RowDirection(weight=normal(2, 4)), 0.1)
