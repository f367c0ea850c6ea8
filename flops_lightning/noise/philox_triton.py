"""Triton kernels for a chunk of rows: noise is drawn where it is used and never stored.

Two launches a chunk take the place of two a row. :func:`draw_and_add` gathers the samples' activations and moves them;
:func:`draw_and_accumulate` draws the same noise again and sums it by sample. :func:`draw` writes the noise itself, for
sites whose gradient needs the rows one by one. The numbers are those of :mod:`flops_lightning.noise.philox`.

Triton is imported with this module alone; ``noise/generators.py`` decides whether it is. With ``TRITON_INTERPRET=1``
in the environment Triton interprets the kernels on a CPU, which is how the tests compare them with the reference.
"""
# Triton reads the kernels' source and knows no annotation but its own.

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
"""Entries of a row for one program."""
_TAU = tl.constexpr(math.tau * 2.0**-32)


@triton.jit
def _box_muller(first, second):
    radius = tl.sqrt(tl.log(first.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10) * -2.0)
    angle = second.to(tl.float32) * _TAU
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def _sign(word):
    return (word >> 31).to(tl.float32) * 2.0 - 1.0


@triton.jit
def _entries(key, stream, SIGNS: tl.constexpr, BLOCK: tl.constexpr):
    """The entries of this program's block of a row, from the counters that belong to them."""
    counter = tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    zero = counter * 0
    x0, x1, x2, x3 = tl.philox(key, counter, zero, zero + stream, zero)
    if SIGNS:
        z0, z1, z2, z3 = _sign(x0), _sign(x1), _sign(x2), _sign(x3)
    else:
        z0, z1 = _box_muller(x0, x1)
        z2, z3 = _box_muller(x2, x3)
    return tl.interleave(tl.interleave(z0, z2), tl.interleave(z1, z3))


@triton.jit
def _words_kernel(out, keys, stream, size, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    counter = tl.program_id(1) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    zero = counter * 0
    x0, x1, x2, x3 = tl.philox(tl.load(keys + row), counter, zero, zero + stream, zero)
    words = tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + row.to(tl.int64) * size + entry, words.to(tl.int64), mask=entry < size)


@triton.jit
def _draw_kernel(out, keys, stream, size, SIGNS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    z = _entries(tl.load(keys + row), stream, SIGNS, BLOCK)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + row.to(tl.int64) * size + entry, z, mask=entry < size)


@triton.jit
def _add_kernel(
    out, h, index, keys, relative, sigma, row_size, h_stride, size, inner, tokens,
    UNIT: tl.constexpr, RELATIVE: tl.constexpr, SIGNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    z = _entries(tl.load(keys + row // UNIT), 0, SIGNS, BLOCK)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < size
    if RELATIVE:
        z = z * tl.load(relative + (entry // inner) % tokens, mask=inside, other=1.0)
    if UNIT == 2:
        z = tl.where(row % 2 == 1, -z, z)
    value = tl.load(h + tl.load(index + row) * h_stride + entry, mask=inside, other=0.0).to(tl.float32)
    moved = value + sigma * z
    tl.store(out + row.to(tl.int64) * row_size + entry, moved.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _accumulate_kernel(
    total, squares, keys, weights, square_weights, bounds, relative, size, inner, tokens,
    SUM: tl.constexpr, SQUARES: tl.constexpr, RELATIVE: tl.constexpr, SIGNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(0)
    entry = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = entry < size
    share = tl.full([BLOCK], 1.0, tl.float32)
    if RELATIVE:
        share = 1.0 / tl.load(relative + (entry // inner) % tokens, mask=inside, other=1.0)
    place = sample.to(tl.int64) * size + entry
    summed, squared = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    # One after the other: the sum has one order, whatever the device does first.
    for unit in range(tl.load(bounds + sample), tl.load(bounds + sample + 1)):
        z = _entries(tl.load(keys + unit), 0, SIGNS, BLOCK) * share
        if SUM:
            summed += tl.load(weights + unit) * z
        if SQUARES:
            squared += tl.load(square_weights + unit) * z * z
    if SUM:
        tl.store(total + place, tl.load(total + place, mask=inside, other=0.0) + summed, mask=inside)
    if SQUARES:
        tl.store(squares + place, squared, mask=inside)


def words(keys: Tensor, size: int, stream: int = 0) -> Tensor:
    """``(r, size)`` random words in int64, for comparison with the reference."""
    out = torch.empty((len(keys), size), dtype=torch.int64, device=keys.device)
    if out.numel():
        _words_kernel[_grid(len(keys), size)](out, keys, stream, size, BLOCK=BLOCK)
    return out


def draw(keys: Tensor, size: int, *, signs: bool = False, stream: int = 0) -> Tensor:
    """``(r, size)`` float32 noise of rows with these ``(r,)`` keys: standard normals, or signs."""
    out = torch.empty((len(keys), size), dtype=torch.float32, device=keys.device)
    if out.numel():
        _draw_kernel[_grid(len(keys), size)](out, keys, stream, size, SIGNS=signs, BLOCK=BLOCK)
    return out


def draw_and_add(
    h: Tensor, index: Tensor, keys: Tensor, *, sigma: float, tokens: slice | None = None,
    relative: Tensor | None = None, unit: int = 1, signs: bool = False,
) -> Tensor:  # fmt: skip
    """``(r, ...)``: ``h[index] + sigma z`` in the dtype of ``h``, computed in float32 and rounded once.

    Args:
        h: ``(b, ...)`` activation, each sample's entries contiguous.
        index: ``(r,)`` int64 samples of the rows.
        keys: ``(r / unit,)`` int64 keys; with ``unit`` 2, rows ``2p`` and ``2p + 1`` get ``+z_p`` and ``-z_p``.
        sigma: Width of the noise.
        tokens: The tokens of ``(b, t, d)`` that move, without a step; None: all.
        relative: ``(t,)`` float32 relative widths of the tokens that move, or of a feature map's positions.
        unit: Rows of a key, 1 or 2.
        signs: Noise of +1 and -1 instead of normals.
    """
    shape, rows = tuple(h.shape[1:]), len(index)
    start, moved, row_size = 0, shape, math.prod(shape)
    if tokens is not None:
        first, last, _ = tokens.indices(shape[0])
        start, moved = first * math.prod(shape[1:]), (last - first, *shape[1:])
    size = math.prod(moved)
    # Rows that noise covers whole are written by the kernel alone.
    out = h.new_empty((rows, *shape)) if size == row_size else h.index_select(0, index)
    if rows and size:
        _add_kernel[_grid(rows, size)](
            out.view(rows, -1)[:, start:], h[:, tokens] if tokens is not None else h, index, keys,
            h if relative is None else relative, sigma, row_size, h.stride(0), size, *_layout(moved),
            UNIT=unit, RELATIVE=relative is not None, SIGNS=signs, BLOCK=BLOCK,
        )  # fmt: skip
    return out


def draw_and_accumulate(
    keys: Tensor, bounds: Tensor, shape: tuple[int, ...], *, total: Tensor | None = None,
    weights: Tensor | None = None, square_weights: Tensor | None = None, relative: Tensor | None = None,
    signs: bool = False,
) -> Tensor | None:  # fmt: skip
    """Add ``sum_u w_u z_u`` to the sums of the samples, and return ``sum_u s_u z_u^2``, with the noise drawn again.

    Args:
        keys: ``(u,)`` int64 keys, those of a sample side by side.
        bounds: ``(n + 1,)`` int64: sample ``i`` has the keys from ``bounds[i]`` to ``bounds[i + 1]``.
        shape: Shape of a row's noise.
        total: ``(n, *shape)`` contiguous float32 sums to add to; None: none.
        weights: ``(u,)`` float32 ``w``.
        square_weights: ``(u,)`` float32 ``s``; None: return None.
        relative: ``(t,)`` float32 relative widths; ``z`` is divided by them.
        signs: Noise of +1 and -1 instead of normals.

    Returns:
        ``(n, *shape)`` float32, entry by entry.
    """
    samples, size = len(bounds) - 1, math.prod(shape)
    squares = None
    if square_weights is not None:
        squares = torch.empty((samples, *shape), dtype=torch.float32, device=keys.device)
    if samples and size:
        _accumulate_kernel[_grid(samples, size)](
            keys if total is None else total, keys if squares is None else squares, keys,
            keys if weights is None else weights, keys if square_weights is None else square_weights, bounds,
            keys if relative is None else relative, size, *_layout(shape),
            SUM=total is not None, SQUARES=squares is not None, RELATIVE=relative is not None, SIGNS=signs,
            BLOCK=BLOCK,
        )  # fmt: skip
    return squares


def _grid(rows: int, size: int) -> tuple[int, int]:
    return rows, triton.cdiv(size, BLOCK)


def _layout(shape: tuple[int, ...]) -> tuple[int, int]:
    """How far apart the entries of neighbouring tokens lie, and how many tokens there are."""
    if len(shape) == 2:
        return shape[1], shape[0]
    return 1, math.prod(shape[1:]) if len(shape) > 2 else 1
