"""Answers that are rounded more coarsely than queries differ."""

import math
import warnings
from collections import Counter

import torch
from torch import Tensor

LOOKS = 8
"""Answers of a kind that are looked at; how a service rounds does not change."""
LEAST = 16
"""Numbers from which rounding can be told."""
MOST = 4096
"""Numbers that are looked at; of a row, for its spread."""
DECIMALS = (0, 1, 2, 3, 4)
HALF = (torch.bfloat16, torch.float16)


def rounding_step(values: Tensor) -> float:
    """The step between neighbours of ``(n,)`` numbers that were rounded to decimals or to half precision; else 0.

    Example:
        >>> round(rounding_step(torch.linspace(0.3, 2.9, 30).mul(100).round().div(100)), 6)
        0.01
        >>> rounding_step(torch.linspace(0.3, 2.9, 30))
        0.0
    """
    values = values[values.isfinite() & (values != 0)][:MOST].double()
    if len(values) < LEAST:
        return 0.0
    exact = torch.finfo(torch.float32).eps * values.abs()  # twice what float32 itself rounds
    for decimals in DECIMALS:
        if bool(((values - values.round(decimals=decimals)).abs() <= exact).all()):
            return 10.0**-decimals
    for dtype in HALF:
        if torch.equal(values.to(dtype).double(), values):
            return torch.finfo(dtype).eps * float(values.square().mean().sqrt())
    return 0.0


def spread(names: Tensor | None, values: Tensor) -> float:
    """Standard deviation of ``(r, ...)`` values among rows of the same image ``(r, 4)``; nan without such rows.

    Without names all rows are of the same.
    """
    rows = (values.flatten(1)[:, :MOST] if values.dim() > 1 else values[:, None]).double()
    of = torch.zeros(len(rows), dtype=torch.long)
    if names is not None:
        of = names.unique(dim=0, return_inverse=True)[1]
    kept = rows.isfinite().all(1)
    rows, of = rows[kept], of[kept]
    number = torch.bincount(of)
    freedom = int((number - 1).clamp(min=0).sum())
    if not freedom:
        return math.nan
    means = rows.new_zeros(len(number), rows.shape[1]).index_add(0, of, rows) / number.clamp(min=1)[:, None]
    return float(((rows - means[of]).square().sum() / freedom / rows.shape[1]).sqrt())


class RoundingWatch:
    """Warns once if a scorer rounds its answers to steps wider than queries differ.

    Rounding is then noise that is larger than what is measured. Queries of one image (or text draws) are compared with
    each other, so clean passes and validation tell nothing.
    """

    def __init__(self) -> None:
        self._looks, self._warned = Counter[str](), False

    def see(self, kind: str, names: Tensor | None, values: Tensor) -> None:
        """Look at an answer: ``(r, ...)`` values of the images ``names`` ``(r, 4)``."""
        if self._warned or self._looks[kind] >= LOOKS:
            return
        apart = spread(names, values)
        if math.isnan(apart):
            return
        self._looks[kind] += 1
        step = rounding_step(values.flatten())
        if step > apart:
            self._warned = True
            other = ", write pairing: crossed" if kind in ("text", "image") else ""
            warnings.warn(
                f"service: the answers to {kind!r} are rounded to steps of {step:.2g}, and those to queries of one "
                f"input differ by {apart:.2g}. Have it answer in float32{other}, or write a larger sigma.",
                RuntimeWarning, stacklevel=4,
            )  # fmt: skip
