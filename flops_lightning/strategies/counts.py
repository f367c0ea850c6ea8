"""Counts as an allocator or a user gives them: checked, and spread over sites."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.strategies.sites import Site


def equal_counts(sites: Sequence[Site], batch_size: int, *, taken: Sequence[int]) -> NDArray[np.int64]:
    """``(s, b)`` counts that give every sample a site's average, less what pilots have ``taken`` there."""
    rest = [[site.queries_per_sample - spent] for site, spent in zip(sites, taken, strict=True)]
    return np.repeat(np.array(rest, dtype=np.int64), batch_size, axis=1)


def check_counts(
    counts: Tensor, sites: Sequence[Site], batch_size: int, *, multiple: int, least: int
) -> NDArray[np.int64]:
    """``(s, b)`` counts on the host.

    Args:
        counts: ``(s, b)``, or ``(b,)`` for the same at every site.
        sites: The sites.
        batch_size: Number of samples ``b``.
        multiple: 2 for antithetic pairs.
        least: Fewest queries of a sample that has any.

    Raises:
        SettingError: another shape or dtype, negative counts, or counts that the estimator cannot use.
    """
    shape = (len(sites), batch_size)
    if counts.is_floating_point() or counts.is_complex():
        raise SettingError(
            "counts", str(counts.dtype), "are not integers.", "Round with allocators.rounding.largest_remainder."
        )
    table = counts.cpu().numpy().astype(np.int64)
    if table.shape not in (shape, shape[1:]):
        raise SettingError(
            "counts", tuple(table.shape), f"does not fit {shape[0]} sites and {shape[1]} samples.",
            f"Give integer counts of shape {shape} or {shape[1:]}.",
        )  # fmt: skip
    if (table < 0).any() or (table % multiple).any():
        raise SettingError(
            "counts", table.tolist(), f"must be non-negative multiples of {multiple}.",
            "Round with allocators.rounding.largest_remainder.",
        )  # fmt: skip
    if ((table > 0) & (table < least)).any():
        raise SettingError(
            "counts", table.tolist(), "a single query has no others to be compared with.",
            "Give every sample 0, 2 or more (min_queries: 2), or use variant: baseline.",
        )  # fmt: skip
    return np.broadcast_to(table, shape).copy()
