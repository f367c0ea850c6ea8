"""From relative shares to queries: continuous (water-filling) and integer (largest remainder)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from flops_lightning.errors import SettingError


def water_fill(shares: Tensor, total: float, *, floor: float = 0.0) -> Tensor:
    """Continuous allocation in proportion to the shares, with a floor.

    Returns ``(..., b)`` float64 ``A_b = max(c * share_b, floor)`` with the one ``c`` for which ``sum_b A_b = total``:
    samples whose part would be below the floor get the floor, the others split what is left in proportion. Shares are
    relative; negative ones count as zero, and if none is positive, all are equal.

    Raises:
        ValueError: A share is not finite, there is no sample, or ``total`` is below ``b * floor``.
    """
    batch_size = shares.shape[-1] if shares.ndim else 0
    if batch_size == 0 or not bool(torch.isfinite(shares).all()):
        raise ValueError("Shares must be finite numbers, one for each sample of a batch of at least one.")
    if total < batch_size * floor:
        raise ValueError(f"A total of {total} cannot give {floor} to each of {batch_size} samples.")
    # In numpy: on the numbers of one batch, an operation of torch takes several times as long to begin.
    positive = shares.double().numpy().clip(min=0.0)
    largest = positive.max(axis=-1, keepdims=True)
    # Dividing by the largest first keeps the sums below from overflowing.
    positive = np.where(largest > 0, positive / np.where(largest > 0, largest, 1.0), 1.0)
    ordered = -np.sort(-positive, axis=-1)
    sums = ordered.cumsum(axis=-1)
    # The scale shared by the `above` largest, if just they are above the floor: true up to one place in the order.
    above = np.arange(1, batch_size + 1)
    scales = (total - (batch_size - above) * floor) / sums
    last = (scales * ordered > floor).sum(axis=-1, keepdims=True) - 1
    scale = np.where(last < 0, 0.0, np.take_along_axis(scales, last.clip(min=0), axis=-1))
    return torch.from_numpy((scale * positive).clip(min=floor))


def next_multiple(number: int, multiple: int) -> int:
    """``number`` raised to the next multiple."""
    return -(-number // multiple) * multiple


def check_budget(total: int, batch_size: int, *, minimum: int, multiple: int) -> None:
    """Raise a :class:`SettingError` if ``total`` cannot be split in multiples, ``minimum`` or more for every sample."""
    if total % multiple:
        problem = f"{total} queries for {batch_size} samples cannot be split in multiples of {multiple}."
        remedy = f"Make it a multiple of {multiple}."
        raise SettingError("queries_per_sample", total / max(batch_size, 1), problem, remedy)
    least = next_multiple(minimum, multiple)
    if total < batch_size * least:
        problem = f"{total} queries cannot give {least} to each of {batch_size} samples."
        remedy = f"Lower `min_queries`, or raise `queries_per_sample` to {least} or more."
        raise SettingError("min_queries", minimum, problem, remedy)


def largest_remainder(shares: Tensor, total: int, *, minimum: int, multiple: int) -> Tensor:
    """Integer allocation closest to the shares: the largest-remainder (Hamilton) method above a floor.

    The continuous allocation of :func:`water_fill` is rounded down to multiples; what is left goes, one multiple each,
    to the samples that lost most by the rounding (ties: the lower index first).

    Takes ``(b,)`` shares as :func:`water_fill`. Returns ``(b,)`` int64 counts with the sum ``total``, all multiples of
    ``multiple`` and none below ``minimum``.
    """
    check_budget(total, len(shares), minimum=minimum, multiple=multiple)
    units, floor = total // multiple, next_multiple(minimum, multiple) // multiple
    parts = water_fill(shares, units, floor=floor).numpy()
    counts = parts.astype(np.int64)
    order = (counts - parts).argsort(kind="stable")
    counts[order[: units - counts.sum()]] += 1
    return torch.from_numpy(counts * multiple)


def round_at_sites(shares: Tensor, totals: Sequence[int], least: Sequence[float], *, multiple: int) -> Tensor:
    """``(s, b)`` :func:`largest_remainder` of ``(s, b)`` shares, with a total and a minimum for each site."""
    lines = zip(shares, totals, least, strict=True)
    return torch.stack([largest_remainder(line, n, minimum=int(m), multiple=multiple) for line, n, m in lines])
