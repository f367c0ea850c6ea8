"""Pilots: a few queries spent before the allocation, to estimate how noisy each sample's gradient is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.strategies.delta import DeltaSums
from flops_lightning.strategies.sites import Site


@dataclass
class PilotSpec:
    """Setting: where pilots are spent and how many.

    Attributes:
        site: Name of the site at which they are spent.
        queries: Pilots of each sample, taken from that site's budget; 0: none.
        reuse: Let them enter the gradient, with the weight ``queries / queries_per_sample`` fixed before they are seen
            (an adaptive weight would bias the estimate).
    """

    site: str = ""
    queries: int = 0
    reuse: bool = True


def check_pilots(pilots: PilotSpec, sites: Sequence[Site], *, unit: int, one_update: bool) -> None:
    """Check pilots against the sites.

    Args:
        pilots: The setting.
        sites: Sites from bottom to top.
        unit: Rows in an independent unit (2 for antithetic pairs).
        one_update: All sites are updated from the same losses.

    Raises:
        SettingError: an unknown site, one that perturbs several layers together, a number of pilots that gives no
            variance or leaves too little, or pilots that would be stale when reused.
    """
    names = [site.name for site in sites]
    if pilots.site not in names:
        raise SettingError("strategy.pilots.site", pilots.site, "is not a site.", f"Choose from {names}.")
    site = sites[names.index(pilots.site)]
    if len(site.layers) > 1:
        raise SettingError(
            "strategy.pilots.site", pilots.site, "perturbs several layers together.",
            "Choose a block or group site, or a single layer.",
        )  # fmt: skip
    least, most = 2 * unit, site.queries_per_sample - 2
    if not least <= pilots.queries <= most or pilots.queries % unit:
        raise SettingError(
            "strategy.pilots.queries", pilots.queries,
            f"must be a multiple of {unit} from {least} to {most} (the site's budget is {site.queries_per_sample}).",
            f"Write for example {least}, or 0 for none.",
        )  # fmt: skip
    if not one_update and pilots.reuse and site is not sites[-1]:
        raise SettingError(
            "strategy.pilots.reuse", True, "pilots of a lower site are stale once the sites above it were updated.",
            f"Set reuse: false, or take the pilots at {names[-1]!r}.",
        )  # fmt: skip


def combine(pilots: DeltaSums, rest: DeltaSums, share: float) -> Tensor:
    """``alpha mean(pilots) + (1 - alpha) mean(rest)``, ``(b, ...)``: unbiased although the counts saw the pilots.

    ``alpha = share`` for every sample; one of the two takes all the weight where a sample lost all queries of the
    other.
    """
    alpha = torch.full_like(rest.survivors, share)
    alpha = torch.where(pilots.survivors > 0, alpha, 0.0)
    alpha = torch.where(rest.survivors > 0, alpha, 1.0).view(-1, *(1,) * (rest.weighted.dim() - 1))
    return alpha * pilots.delta() + (1 - alpha) * rest.delta()
