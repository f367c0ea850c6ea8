"""Kinds of noise: second moments, purity, structure, and what each does to the variance of a linear loss."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.noise import kinds as noise_kinds
from flops_lightning.noise.keys import NoiseKey, row_seeds, standard_normal
from flops_lightning.noise.kinds import NoiseSpec, draw_noise, tokens_and_features
from tests.reference.footprint import random_states
from tests.reference.layouts import NOISES as KINDS

KEY = NoiseKey(seed=3, draw=5, site="blocks.1", rank=0)
CPU = torch.device("cpu")
every_kind = pytest.mark.parametrize("kind", KINDS)


def noise(kind, samples, directions, shape, dtype=torch.float64, key=KEY) -> Tensor:
    rows = np.array(samples, dtype=np.int64), np.array(directions, dtype=np.int64)
    return draw_noise(KINDS[kind], key, *rows, shape, device=CPU, dtype=dtype)


def noise_of_one_sample_each(kind: str, rows: int, shape: tuple[int, ...]) -> Tensor:
    """Independent rows whatever the kind, at changing places within their blocks."""
    return noise(kind, range(rows), [r % 7 for r in range(rows)], shape)


def assert_mean(draws: Tensor, expected: Tensor | float, errors: float = 5) -> None:
    """``draws`` ``(n, ...)`` average to ``expected`` within so many standard errors (to rounding, if constant)."""
    error = draws.std(0) / len(draws) ** 0.5
    assert bool(((draws.mean(0) - expected).abs() <= errors * error + 1e-12).all())


@every_kind
@pytest.mark.parametrize("shape", [(1,), (2,), (5,), (1, 6), (6, 1), (3, 4), (2, 2, 3)])
def test_isotropic(kind, shape):
    z = noise_of_one_sample_each(kind, 8000, shape).flatten(1)
    assert_mean(z, 0.0)
    assert_mean(z[:, :, None] * z[:, None], torch.eye(z.shape[1], dtype=z.dtype))


@given(
    kind=st.sampled_from(list(KINDS)),
    shape=st.sampled_from([(1,), (2,), (9,), (40,), (3, 5), (2, 3, 3)]),
    rows=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 100000)), min_size=1, max_size=12),
    order=st.randoms(use_true_random=False),
)
def test_a_row_depends_on_its_key_and_not_on_the_other_rows(kind, shape, rows, order):
    alone = {row: noise(kind, [row[0]], [row[1]], shape) for row in rows}
    shuffled = order.sample(rows, len(rows))
    together = noise(kind, [b for b, _ in shuffled], [q for _, q in shuffled], shape)
    for row, z in zip(shuffled, together, strict=True):
        torch.testing.assert_close(z, alone[row][0], rtol=0, atol=1e-11 if kind == "orthogonal" else 0)


@every_kind
@pytest.mark.parametrize(("chunk", "dtype"), [(1, torch.float64), (7, torch.float32), (32, torch.float64)])
def test_chunks_may_be_cut_anywhere(kind, chunk, dtype, monkeypatch):
    counts = [5, 40, 0, 1, 70]
    samples = [b for b, n in enumerate(counts) for _ in range(n)]
    directions = [q for n in counts for q in range(n)]
    whole = noise(kind, samples, directions, (5, 8), dtype)
    monkeypatch.setattr(noise_kinds, "FRAME_ENTRIES", 3000)  # two blocks of orthogonal noise at a time
    cuts = range(0, len(samples), chunk)
    pieces = [noise(kind, samples[i : i + chunk], directions[i : i + chunk], (5, 8), dtype) for i in cuts]
    rounding = {torch.float32: 1e-4, torch.float64: 1e-12}[dtype] if kind == "orthogonal" else 0
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=0, atol=rounding)


@every_kind
def test_rows_of_other_samples_blocks_and_keys_are_independent(kind):
    """Products of independent isotropic rows have mean 0 and mean square ``dim``."""
    samples, directions = [0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 32, 64] * 3  # blocks of their own, where there are blocks
    keys = [NoiseKey(*key) for key in itertools.product((0, 1), (0, 1, 2), ("blocks.0", "blocks.1/fc1"))]
    z = torch.cat([noise(kind, samples, directions, (20, 30), key=key) for key in keys]).flatten(1)
    products = (z @ z.T / 600**0.5)[tuple(torch.triu_indices(len(z), len(z), 1))]
    assert_mean(products, 0.0, errors=4)
    assert_mean(products.square(), 1.0, errors=4)
    assert float(products.abs().max()) < (10 if "factored" in kind else 5.5)  # products of products have longer tails


@every_kind
def test_no_other_generator_is_touched(kind):
    before = random_states()
    noise(kind, [0, 1], [0, 0], (3, 4))
    assert random_states() == before


@pytest.mark.parametrize("shape", [(), (10,), (3, 4), (2, 3, 3)])
def test_the_default_is_the_noise_that_always_was(shape):
    seeds = row_seeds(KEY, np.array([0, 3]), np.array([1, 7]))
    expected = standard_normal(seeds, shape, device=CPU, dtype=torch.float32)
    torch.testing.assert_close(noise("gaussian", [0, 3], [1, 7], shape, torch.float32), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 5)])
def test_rademacher_entries_are_signs(shape):
    for kind in ("rademacher", "factored_rademacher"):
        z = noise(kind, range(300), [0] * 300, shape)
        torch.testing.assert_close(z.abs(), torch.ones_like(z), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "tokens", "features"),
    [((), 1, 1), ((6,), 1, 6), ((5, 6), 5, 6), ((3, 2, 5), 10, 3), ((3, 2, 2, 2), 8, 3)],
)
def test_tokens_and_features(shape, tokens, features):
    assert tokens_and_features(shape) == (tokens, features)


@pytest.mark.parametrize("kind", ["factored", "factored_rademacher"])
@pytest.mark.parametrize("shape", [(5, 6), (3, 2, 5), (3, 2, 2, 2)])
def test_factored_tokens_share_one_direction_up_to_its_sign(kind, shape):
    z = noise(kind, range(2000), [0] * 2000, shape)
    by_token = z if len(shape) == 2 else z.flatten(2).mT
    signs = by_token[:, :, 0] / by_token[:, :1, 0]
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs))
    torch.testing.assert_close(by_token, signs[:, :, None] * by_token[:, :1])
    assert_mean(signs[:, 1:], 0.0)
    if kind == "factored":  # the first token's direction is standard normal, fourth moment included
        assert_mean(by_token[:, 0] ** 4, 3.0)


@pytest.mark.parametrize("shape", [(), (6,), (1, 6), (6, 1), (1, 2, 3), (6, 1, 1)])
@pytest.mark.parametrize("dense", ["gaussian", "rademacher"])
def test_factored_noise_is_dense_where_every_direction_has_rank_one(dense, shape):
    factored = "factored" if dense == "gaussian" else "factored_rademacher"
    z, expected = (noise(kind, range(4), [0] * 4, shape) for kind in (factored, dense))
    torch.testing.assert_close(z, expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1,), (2,), (10,), (4, 8), (33,), (3, 5, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_directions_of_a_block_are_orthogonal(shape, dtype):
    dim = math.prod(shape)
    m = min(dim, 32)
    z = noise("orthogonal", [0] * m + [4] * m, [*range(m), *range(3 * m, 4 * m)], shape, dtype).view(2, m, dim)
    expected = dim * torch.eye(m, dtype=dtype).expand(2, m, m)
    torch.testing.assert_close(z @ z.mT, expected, rtol=1e-5, atol=1e-5 * dim)
    alone = noise("orthogonal", [0] * m, range(m, 2 * m), shape, dtype).view(m, dim)
    assert float((z[0] @ alone.T).abs().max()) > 1e-2  # the next block is not the same again, nor orthogonal to it


@pytest.mark.parametrize("dim", [2, 3, 5])
def test_orthogonal_frames_are_uniform(dim):
    """Moments that a frame keeps under rotations and reflections alone, of every vector and between two of them."""
    frames = noise("orthogonal", np.repeat(range(6000), dim), [*range(dim)] * 6000, (dim,)).view(-1, dim, dim)
    assert_mean(frames, 0.0)
    assert_mean(torch.linalg.det(frames), 0.0)
    assert_mean(frames**4, 3 * dim / (dim + 2))  # of a uniform point on the sphere of radius sqrt(dim)
    # On the same sphere with the second vector on the first one's equator (Haar: E o_11^2 o_21^2 = 1 / (dim (dim + 2)).
    assert_mean(frames[:, 0] ** 2 * frames[:, 1] ** 2, dim / (dim + 2))
    assert_mean(frames[:, 0, 0] ** 2 * frames[:, 1, 1] ** 2, dim * (dim + 1) / ((dim - 1) * (dim + 2)))


@pytest.mark.parametrize(("shape", "queries"), [((1,), 1), ((2,), 4), ((10,), 10), ((10,), 30), ((4, 8), 32)])
def test_as_many_orthogonal_queries_as_dimensions_leave_no_variance(shape, queries):
    """The estimate of a linear loss with the gradient g, ``mean_q (g . z_q) z_q``, is g: blocks are complete bases."""
    z = noise("orthogonal", [2] * queries, range(queries), shape).flatten(1)
    g = torch.randn(z.shape[1], dtype=torch.float64)
    torch.testing.assert_close((z @ g) @ z / queries, g)


@pytest.mark.parametrize("queries", [1, 20, 32, 64])
def test_variance_of_fewer_orthogonal_queries(queries):
    """``A`` of a block: ``estimate = dim / A * (projection of g)``, hence the variance ``(dim / A - 1) |g|^2``."""
    dim, samples = 64, 500
    z = noise("orthogonal", np.repeat(range(samples), queries), [*range(queries)] * samples, (dim,))
    z = z.view(samples, queries, dim)
    g = torch.randn(dim, dtype=torch.float64)
    estimate = (z @ g)[:, None] @ z / queries
    blocks = max(1, queries // 32)
    assert_mean((estimate[:, 0] - g).square().sum(1), (dim / (queries / blocks) - 1) / blocks * g.square().sum(), 4)


def second_moment(kind: str, a: Tensor, k: Tensor, features: int) -> float:
    """``E |(G . z) z^T X|^2``: one query's squared gradient of a linear layer's weight, the loss linear in its output.

    ``G`` ``(t, d)`` is the gradient at the output and ``X`` ``(t, i)`` the input; ``a = G G^T``, ``k = X X^T``. Over
    tokens, with Tr the trace and ``s = sum_t a_tt k_tt``:

    - dense Gaussian: ``E (g . z)^2 z^T M z = |g|^2 Tr M + 2 g^T M g``, ``M = k (x) 1_d``: ``d Tr a Tr k + 2 Tr a k``.
    - dense Rademacher: the fourth moment is 1 instead of 3, which takes ``2 sum_i g_i^2 M_ii = 2 s`` away.
    - factored ``z = u v^T``: ``(u^T G v)^2 |v|^2 u^T k u``. Over ``v`` Gaussian it is ``(d + 2) u^T a u u^T k u``
      (Rademacher ``d``), and over the signs ``u``: ``(d + 2) (Tr a Tr k + 2 Tr a k - 2 s)``.

    Hence factored over dense is 1 + 2 / d where a or k is close to diagonal, and (1 + 2 / d)(3 - 2 / t) at most, where
    all tokens have the same input and the same gradient.
    """
    traces, cross, same = float(a.trace() * k.trace()), float((a * k).sum()), float(a.diagonal() @ k.diagonal())
    return {
        "gaussian": features * traces + 2 * cross,
        "rademacher": features * traces + 2 * cross - 2 * same,
        "factored": (features + 2) * (traces + 2 * cross - 2 * same),
        "factored_rademacher": features * (traces + 2 * cross - 2 * same),
    }[kind]


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "factored", "factored_rademacher"])
@pytest.mark.parametrize("layout", ["tokens", "map"])
def test_trace_in_the_parameters_of_a_linear_layer(kind, layout):
    t, d, rows = 6, 8, 60000
    z = noise(kind, range(rows), [0] * rows, (t, d) if layout == "tokens" else (d, 2, 3))
    z = z if layout == "tokens" else z.flatten(2).mT
    apart = torch.randn(t, d, dtype=torch.float64), torch.randn(t, 5, dtype=torch.float64)
    aligned = [each[0] + 0.2 * each for each in apart]
    for (g, x), some in ((apart, z[:20000]), (aligned, z)):
        squares = ((some * g).sum((1, 2))[:, None, None] * (some.mT @ x)).square().sum((1, 2))
        expected = second_moment(kind, g @ g.T, x @ x.T, d)
        assert_mean(squares, expected, errors=4)
        # Sharp enough to see every term: where tokens are aligned, those beside the first make up 60 % of the sum.
        assert float(squares.std()) / len(some) ** 0.5 < 0.03 * expected


@every_kind
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_gets_float32_noise(kind, half):
    found, expected = (noise(kind, [1, 2], [3, 4], (3, 4), dtype) for dtype in (half, torch.float32))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every_kind
def test_no_rows_and_no_tokens(kind):
    assert noise(kind, [], [], (3, 4), torch.bfloat16).shape == (0, 3, 4)
    assert noise(kind, [1, 2], [0, 0], (0, 4)).shape == (2, 0, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distribution": "normal"}, "distribution = 'normal': .* Choose from gaussian, rademacher."),
        ({"layout": "rank1"}, "layout = 'rank1': is not one of the choices. Choose from dense, factored."),
        ({"orthogonal": True, "layout": "factored"}, "orthogonal = True: needs layout: dense, not factored. Write lay"),
        ({"orthogonal": True, "distribution": "rademacher"}, "orthogonal = True: needs distribution: gaussian, not ra"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(SettingError, match=r"model\.strategy\.noise\." + message):
        NoiseSpec(**settings).check()
