"""From relative shares to queries: continuous (water-filling) and integer (largest remainder)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flops_lightning.errors import SettingError


def water_fill(shares: Tensor, total: float, *, floor: float = 0.0) -> Tensor:
    """Continuous allocation in proportion to the shares, with a floor.

    Returns ``A_b = max(c * share_b, floor)`` with the one ``c`` for which ``sum_b A_b = total``: samples whose part
    would be below the floor get the floor, the others split what is left in proportion. A common factor in ``shares``
    changes nothing.

    Args:
        shares: ``(..., b)`` finite relative shares. Negative ones count as zero; if none is positive, all are equal.
        total: Sum of each allocation, in queries.
        floor: Least part of a sample, in queries.

    Returns:
        ``(..., b)`` float64 allocations.

    Raises:
        ValueError: A share is not finite, there is no sample, or ``total`` is below ``b * floor``.
    """
    batch_size = shares.shape[-1] if shares.ndim else 0
    if batch_size == 0 or not bool(torch.isfinite(shares).all()):
        raise ValueError("Shares must be finite numbers, one for each sample of a batch of at least one.")
    if total < batch_size * floor:
        raise ValueError(f"A total of {total} cannot give {floor} to each of {batch_size} samples.")
    positive = shares.double().clamp_min(0.0)
    largest = positive.amax(dim=-1, keepdim=True)
    # Dividing by the largest first keeps the sums below from overflowing.
    positive = torch.where(largest > 0, positive / largest, torch.ones_like(positive))
    ordered = positive.sort(dim=-1, descending=True).values
    sums = ordered.cumsum(dim=-1)
    above = torch.arange(1, batch_size + 1, dtype=torch.float64)
    # If the `above` largest are the ones above the floor, this is the scale they share. It holds as long as the
    # smallest of them really is above it, which is true up to one place in the order and false from there on.
    scales = (total - (batch_size - above) * floor) / sums
    last = (scales * ordered > floor).sum(dim=-1, keepdim=True) - 1
    scale = torch.where(last < 0, 0.0, scales.gather(-1, last.clamp_min(0)))
    return (scale * positive).clamp_min(floor)


def next_multiple(number: int, multiple: int) -> int:
    """``number`` raised to the next multiple."""
    return -(-number // multiple) * multiple


def check_budget(total: int, batch_size: int, *, minimum: int, multiple: int) -> None:
    """Refuse a budget that no allocation can meet.

    Raises:
        SettingError: ``total`` is no multiple of ``multiple``, or too small to give every sample ``minimum`` raised to
            the next multiple.
    """
    if total % multiple:
        raise SettingError(
            "queries_per_sample",
            total / max(batch_size, 1),
            f"{total} queries for {batch_size} samples cannot be split in multiples of {multiple}.",
            f"Make it a multiple of {multiple}.",
        )
    least = next_multiple(minimum, multiple)
    if total < batch_size * least:
        raise SettingError(
            "min_queries",
            minimum,
            f"{total} queries cannot give {least} to each of {batch_size} samples.",
            f"Lower `min_queries`, or raise `queries_per_sample` to {least} or more.",
        )


def largest_remainder(shares: Tensor, total: int, *, minimum: int, multiple: int) -> Tensor:
    """Integer allocation closest to the shares: the largest-remainder (Hamilton) method above a floor.

    The continuous allocation of :func:`water_fill` is rounded down to multiples; what is left goes, one multiple each,
    to the samples that lost most by the rounding (ties: the lower index first).

    Args:
        shares: ``(b,)`` finite relative shares. Negative ones count as zero; if none is positive, all are equal.
        total: Sum of the counts.
        minimum: Least count of a sample; raised to the next multiple of ``multiple``.
        multiple: Every count is a multiple of this (2 where queries come in antithetic pairs).

    Returns:
        ``(b,)`` int64 counts that sum exactly to ``total``.

    Raises:
        ValueError: A share is not finite, or there is no sample.
        SettingError: As :func:`check_budget`.
    """
    check_budget(total, len(shares), minimum=minimum, multiple=multiple)
    units, floor = total // multiple, next_multiple(minimum, multiple) // multiple
    parts = water_fill(shares, units, floor=floor)
    counts = parts.floor().long()
    left = units - int(counts.sum())
    order = (parts - counts).argsort(descending=True, stable=True)
    counts[order[:left]] += 1
    return counts * multiple


def round_at_sites(shares: Tensor, totals: Sequence[int], *, minimum: int, multiple: int) -> Tensor:
    """:func:`largest_remainder` at each site.

    Args:
        shares: ``(s, b)`` finite relative shares.
        totals: Sum of each site's counts.
        minimum: Least count of a sample; raised to the next multiple of ``multiple``.
        multiple: Every count is a multiple of this.

    Returns:
        ``(s, b)`` int64 counts, line ``s`` with the sum ``totals[s]``.
    """
    lines = zip(shares, totals, strict=True)
    return torch.stack([largest_remainder(share, n, minimum=minimum, multiple=multiple) for share, n in lines])
