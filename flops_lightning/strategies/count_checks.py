"""Checks of the counts and probabilities that an allocator hands to a strategy."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.queries import check_counts
from flops_lightning.strategies.sites import Site


def checked_table(
    counts: Tensor, sites: Sequence[Site], samples: int, *, multiple: int, least: int
) -> NDArray[np.int64]:
    """``(s, b)`` counts on the host, the same for all samples where a query is made once for the batch."""
    table = check_counts(counts, len(sites), samples, multiple=multiple, least=least)
    for site, line in zip(sites, table, strict=True):
        if site.per_batch and (line != line[:1]).any():
            problem = f"differ between samples at {site.name!r}, where a query is made once for the batch."
            remedy = "Give all samples the same count there, or write directions: own at this site."
            raise SettingError("counts", line.tolist()[:8], problem, remedy)
    return table


def equal_table(sites: Sequence[Site], spent: Sequence[int], samples: int) -> NDArray[np.int64]:
    """``(s, b)`` counts: each site's budget in equal parts, less what pilots ``spent``."""
    for site in sites:
        if not isinstance(site.queries_per_sample, int):
            problem = f"is not a whole number, so not every sample can have as many queries at {site.name!r}."
            remedy = "Add QueryAllocatorCallback, which draws the samples, or write an int."
            raise SettingError("model.strategy.sites.queries_per_sample", site.queries_per_sample, problem, remedy)
    rest = [[int(site.queries_per_sample) - n] for site, n in zip(sites, spent, strict=True)]
    return np.repeat(np.array(rest, dtype=np.int64), samples, axis=1)


def checked_inclusion(inclusion: Tensor, sites: Sequence[Site], reused: Sequence[bool]) -> Tensor:
    """``(s, b)`` probabilities; ``reused``: sites that reuse pilots of all samples."""
    for site, pilots in zip(sites, reused, strict=True):
        if site.together or pilots:
            problem = "perturbs its layers together" if site.together else "reuses pilots of all samples"
            raise SettingError(
                "inclusion", site.name, f"{problem}, and only some samples have queries.",
                "Give every sample a query (min_queries: 1), or write together: false, pilots: {reuse: false}.",
            )  # fmt: skip
    return inclusion.expand(len(sites), -1)
