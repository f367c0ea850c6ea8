"""Philox-4x32-10, a counter-based generator: a word is a function of a key and of its place, on every device the same.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Here a row has a key of 64 bits
(:func:`flops_lightning.noise.keys.row_keys`), and entry ``e`` of the row is made of word ``e % 4`` of the counter
``(e // 4, 0, stream, 0)``. So any entry of any row can be drawn alone, again, and in any order.

This is the reference, in torch's integer arithmetic; the kernels in ``philox_triton.py`` compute the same.
"""

import math

import torch
from torch import Tensor

ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF
Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Ten rounds: four words of 32 bits from a counter of four and a key of two, lowest first; all in int64."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for _ in range(ROUNDS):
        # A product of two words has 64 bits: int64 keeps all of them, the sign included.
        p0, p1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = ((p1 >> 32) & _MASK) ^ x1 ^ k0, p1 & _MASK, ((p0 >> 32) & _MASK) ^ x3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return x0, x1, x2, x3


def random_words(keys: Tensor, size: int, stream: int = 0) -> Words:
    """``(r, ceil(size / 4))`` words each: entry ``e`` of a row is in place ``e // 4`` of number ``e % 4``.

    Args:
        keys: ``(r,)`` int64 keys of the rows, whose 64 bits count.
        size: Entries of a row.
        stream: Rows of the same key and different streams are independent.
    """
    index = torch.arange(-(-size // 4), device=keys.device)
    zero = torch.zeros_like(index)
    column = keys[:, None]
    return philox4x32((index, zero, zero + stream, zero), (column & _MASK, (column >> 32) & _MASK))


def normals(keys: Tensor, size: int, dtype: torch.dtype, stream: int = 0) -> Tensor:
    """``(r, size)`` standard normals by Box and Muller's transform, two of each pair of words.

    ``sqrt(-2 log u) (cos v, sin v)`` with ``u = (x_0 + 1/2) / 2^32`` and ``v = 2 pi x_1 / 2^32``; the largest is 6.8.
    In float64 the words are the same, and the numbers those of float32 to rounding.
    """
    x = random_words(keys, size, stream)
    parts = [part for pair in (x[:2], x[2:]) for part in _box_muller(*pair, dtype)]
    return torch.stack(parts, dim=2).flatten(1)[:, :size]


def _box_muller(first: Tensor, second: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    radius = (first.to(dtype) * 2.0**-32 + 2.0**-33).log().mul_(-2.0).sqrt_()
    angle = second.to(dtype) * (math.tau * 2.0**-32)
    return radius * angle.cos(), radius * angle.sin()


def signs(keys: Tensor, size: int, dtype: torch.dtype, stream: int = 0) -> Tensor:
    """``(r, size)`` +1 and -1, by the highest bit of each entry's word."""
    words = torch.stack(random_words(keys, size, stream), dim=2).flatten(1)[:, :size]
    return ((words >> 31) * 2 - 1).to(dtype)
