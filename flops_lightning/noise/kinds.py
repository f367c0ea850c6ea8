"""Kinds of noise: its distribution, its layout over tokens and features, and how directions of a sample relate.

Every kind has ``E z = 0`` and ``E z z^T = I``, so the likelihood-ratio estimate is unbiased as sigma -> 0 with all of
them, and every row is a function of its key alone (:mod:`flops_lightning.noise.keys`).
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.errors import SettingError, check_choice
from flops_lightning.noise.generators import generator_on, philox_normals, philox_signs
from flops_lightning.noise.keys import NoiseKey, normal_rows, row_keys, row_seeds
from flops_lightning.transfers import to_device

Distribution = Literal["gaussian", "rademacher"]
Layout = Literal["dense", "factored"]

ORTHOGONAL_BLOCK = 32  # most directions in a block of orthogonal noise
FRAME_ENTRIES = 2**22  # numbers in the blocks of orthogonal noise that are drawn at a time: 16 MiB in float32


@dataclass(frozen=True)
class NoiseSpec:
    """Setting: the noise with which queries perturb activations.

    Attributes:
        distribution: ``gaussian``: for every sigma, an unbiased estimate of the gradient of the loss smoothed by
            ``N(0, sigma^2 I)``. ``rademacher``: entries +1 and -1, cheaper to draw and all of the same length; unbiased
            only as sigma -> 0.
        layout: ``dense``: independent entries. ``factored``: ``z = u v^T`` over (token, feature), with signs +1 and -1
            in ``u`` and ``distribution`` in ``v``; several times cheaper to draw, unbiased only as sigma -> 0. Its
            trace equals that of dense noise if tokens are unrelated, and is up to 3 times as large if both their inputs
            and their gradients are aligned. Single tokens and single features always get dense noise.
        orthogonal: Makes the dense Gaussian directions of a sample orthogonal, with length ``sqrt(dim)``, in blocks of
            ``min(dim, 32)`` queries. This estimates the gradient of the loss smoothed over the ball of radius ``sigma
            sqrt(dim)``. For a linear loss, ``A`` queries of one block have ``(dim - A) / (dim + 1)`` times the variance
            of Gaussian ones: zero if there are as many queries as dimensions, hardly less if there are many more
            dimensions. Queries of a block are dependent, so quantities that assume independent queries, such as
            ``trace / queries``, do not hold.

    Example:
        >>> key, rows = NoiseKey(seed=0, draw=0, site="head"), (np.array([0, 0]), np.array([0, 1]))
        >>> where = {"device": torch.device("cpu"), "dtype": torch.float64}
        >>> z = draw_noise(NoiseSpec(orthogonal=True), key, *rows, (2,), **where)
        >>> (z @ z.T).round(decimals=6).abs()
        tensor([[2., 0.],
                [0., 2.]], dtype=torch.float64)
    """

    distribution: Distribution = "gaussian"
    layout: Layout = "dense"
    orthogonal: bool = False

    def check(self) -> None:
        """Check the settings."""
        setting = "model.strategy.noise"
        check_choice(f"{setting}.distribution", self.distribution, get_args(Distribution))
        check_choice(f"{setting}.layout", self.layout, get_args(Layout))
        for name, needed in (("distribution", "gaussian"), ("layout", "dense")):
            value = getattr(self, name)
            if self.orthogonal and value != needed:
                raise SettingError(
                    f"{setting}.orthogonal", True, f"needs {name}: {needed}, not {value}.",
                    f"Write {name}: {needed}, or orthogonal: false.",
                )  # fmt: skip


def tokens_and_features(shape: tuple[int, ...]) -> tuple[int, int]:
    """``(tokens, features)`` of a row of this shape: ``(t, d)``, a feature map ``(c, h, w)`` or larger, or ``(d,)``.

    Factored noise gives the tokens one direction up to its sign; with one token or one feature it is dense.
    """
    *before, features = (1, *shape) if len(shape) < 3 else (*shape[1:], shape[0])
    return math.prod(before), features


def draw_noise(
    spec: NoiseSpec, key: NoiseKey, samples: NDArray[np.int64], directions: NDArray[np.int64], shape: tuple[int, ...],
    *, device: torch.device, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``(r, *shape)`` noise of the rows ``(sample, direction)``, each a function of its key, whatever the other rows.

    A row is the same to the last bit; orthogonal noise to rounding, since it goes through a matrix factorisation.
    Half-precision activations get float32 noise. With Philox (``key.generator``) devices have the same noise, to
    rounding.

    Args:
        spec: Kind of noise, checked.
        key: Shared part of the rows' keys.
        samples: See :func:`row_seeds`.
        directions: See :func:`row_seeds`.
        shape: Shape of a row.
        device: Where to draw.
        dtype: Dtype of the activation.
    """
    dtype = torch.promote_types(dtype, torch.float32)
    if spec.orthogonal:
        noise = _orthogonal(key, samples, directions, math.prod(shape), device=device, dtype=dtype)
        return noise.view(len(samples), *shape)
    factored = spec.layout == "factored" and min(tokens_and_features(shape)) > 1
    if spec.distribution == "gaussian" and not factored:
        return normal_rows(key, samples, directions, shape, device=device, dtype=dtype)
    size = math.prod(shape)
    if generator_on(device, key.generator) == "philox":
        keys = to_device(row_keys(key, samples, directions), device)
        if factored:
            return _factored_by_philox(spec.distribution, keys, shape, dtype)
        return philox_signs(keys, size, dtype).view(len(keys), *shape)
    seeds = row_seeds(key, samples, directions)
    if factored:
        return _factored(spec.distribution, seeds, shape, device=device, dtype=dtype)
    bits, generator = _room_for_bits(len(seeds), size, device), torch.Generator(device=device)
    for row, seed in zip(bits, seeds, strict=True):
        row.random_(generator=generator.manual_seed(seed))
    return _signs(bits, size, dtype).view(len(seeds), *shape)


def _room_for_bits(rows: int, size: int, device: torch.device) -> Tensor:
    return torch.empty((rows, -(-size // 8)), dtype=torch.uint8, device=device)


def _signs(bits: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """``(r, size)`` +1 and -1 from ``(r, ceil(size / 8))`` random bytes."""
    # A table of the 256 bytes: eight signs for one memory access, and a draw for eight signs instead of one each.
    table = (torch.arange(256, device=bits.device)[:, None] >> torch.arange(8, device=bits.device) & 1) * 2 - 1
    signs = table.to(dtype).index_select(0, bits.flatten().int())
    return signs.view(len(bits), 8 * bits.shape[1])[:, :size].contiguous()


def _factored(
    distribution: Distribution, seeds: list[int], shape: tuple[int, ...], *, device: torch.device, dtype: torch.dtype
) -> Tensor:
    tokens, features = tokens_and_features(shape)
    generator = torch.Generator(device=device)
    u_bits, v_bits = (_room_for_bits(len(seeds), size, device) for size in (tokens, features))
    v = torch.empty((len(seeds), features), device=device, dtype=dtype)
    for r, seed in enumerate(seeds):
        u_bits[r].random_(generator=generator.manual_seed(seed))
        if distribution == "gaussian":
            v[r].normal_(generator=generator)
        else:
            v_bits[r].random_(generator=generator)
    u = _signs(u_bits, tokens, dtype)
    if distribution == "rademacher":
        v = _signs(v_bits, features, dtype)
    return _product(u, v, shape)


def _factored_by_philox(distribution: Distribution, keys: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    tokens, features = tokens_and_features(shape)
    draw = philox_normals if distribution == "gaussian" else philox_signs
    return _product(philox_signs(keys, tokens, dtype, stream=1), draw(keys, features, dtype), shape)


def _product(u: Tensor, v: Tensor, shape: tuple[int, ...]) -> Tensor:
    noise = u[:, :, None] * v[:, None] if len(shape) == 2 else v[:, :, None] * u[:, None]
    return noise.view(len(u), *shape)


def _orthogonal(
    key: NoiseKey, samples: NDArray[np.int64], directions: NDArray[np.int64], dim: int, *,
    device: torch.device, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``(r, dim)``: row ``q`` of a sample is vector ``q % m`` of the frame of its block ``q // m``."""
    noise = torch.empty((len(samples), dim), device=device, dtype=dtype)
    if not noise.numel():
        return noise
    size = min(dim, ORTHOGONAL_BLOCK)
    block, place = np.divmod(directions, size)
    blocks, frame = np.unique(np.stack((samples, block), axis=1), axis=0, return_inverse=True)
    frame = frame.reshape(-1)  # numpy 2.0 alone returns a column
    needed = np.zeros(len(blocks), dtype=np.int64)
    np.maximum.at(needed, frame, place + 1)
    step = max(1, FRAME_ENTRIES // (size * dim))
    for first in range(0, len(blocks), step):
        part = blocks[first : first + step]
        drawn = np.arange(size) < needed[first : first + step, None]
        of, nth = drawn.nonzero()
        normals = normal_rows(key, part[of, 0], part[of, 1] * size + nth, (dim,), device=device, dtype=dtype)
        frames = _frames(normals, drawn)
        rows = np.flatnonzero((frame >= first) & (frame < first + step))
        chosen = (to_device(index, device) for index in (frame[rows] - first, place[rows]))
        noise[to_device(rows, device)] = frames[tuple(chosen)]
    return noise


def _frames(gaussians: Tensor, drawn: NDArray[np.bool_]) -> Tensor:
    """Uniformly random orthogonal vectors of length ``sqrt(dim)``, each a function of the Gaussians up to its own.

    ``(g, dim)`` normals fill the ``g`` drawn of ``(n, m)`` places; returns ``(n, longest drawn, dim)``.
    """
    dim = gaussians.shape[1]
    raw = gaussians.new_zeros(*drawn.shape, dim)
    raw.flatten(0, 1).index_copy_(0, to_device(np.flatnonzero(drawn), raw.device), gaussians)
    q, r = torch.linalg.qr(raw[:, : int(drawn.sum(1).max())].mT)
    # With the diagonal of r positive the frame is uniform, Haar distributed (Mezzadri 2007); LAPACK's signs are not.
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(raw.dtype)
    return q.mT * (signs * math.sqrt(dim))[..., None]
