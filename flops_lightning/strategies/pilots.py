"""Pilots: a few queries spent before the allocation, to estimate how noisy each sample's gradient is."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.strategies.engine import QueryResult
from flops_lightning.strategies.sites import Site

LOWEST, DEEPEST = "lowest", "deepest"


@dataclass
class PilotSpec:
    """Setting: how many pilot queries are spent, and where.

    Attributes:
        sites: Sites at which they are spent, by name. ``lowest``: the site next to the input, as in the paper, whose
            gradient is noisiest and whose queries cost most. ``deepest``: the site next to the loss, almost free.
        queries: Pilots per sample at each of these sites, taken from the site's budget; 0: none.
        reuse: Let them enter the gradient, with a weight fixed before their losses are known (a weight that depends on
            them would bias the estimate): the allocator's ``pilot_weight``, or ``queries / queries_per_sample``.

    Example:
        >>> import torch
        >>> from flops_lightning import LikelihoodRatio, PilotSpec, stage_network
        >>> strategy = LikelihoodRatio(pilots=PilotSpec(sites="deepest", queries=4))
        >>> network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2))
        >>> strategy.bind(stage_network(network), torch.nn.CrossEntropyLoss(reduction="none"))
        >>> strategy.budget.queries_per_sample  # of 20 at each site
        (20, 16)
    """

    sites: str | list[str] = field(default_factory=list)
    queries: int = 0
    reuse: bool = True

    def names(self, sites: Sequence[Site]) -> list[str]:
        """Names of the sites that get pilots, ``lowest`` and ``deepest`` resolved."""
        if not self.queries:
            return []
        written = [self.sites] if isinstance(self.sites, str) else self.sites
        ends = {LOWEST: sites[0].name, DEEPEST: sites[-1].name} if sites else {}
        return list(dict.fromkeys(ends.get(name, name) for name in written))


def check_pilots(pilots: PilotSpec, sites: Sequence[Site], *, unit: int, one_update: bool) -> None:
    """Check pilots against the sites."""
    by_name = {site.name: site for site in sites}
    chosen = pilots.names(sites)
    for name in chosen or [""]:
        if name not in by_name:
            raise SettingError(
                "model.strategy.pilots.sites", name, "is not a site.", f"Choose from {[*by_name, LOWEST, DEEPEST]}."
            )
        site = by_name[name]
        if site.together:
            raise SettingError(
                "model.strategy.pilots.sites", name, "perturbs several layers together.",
                "Choose a block or group site, or a single layer.",
            )  # fmt: skip
        least, most = 2 * unit, site.queries_per_sample - 2
        if not least <= pilots.queries <= most or pilots.queries % unit:
            raise SettingError(
                "model.strategy.pilots.queries", pilots.queries,
                f"must be a multiple of {unit} from {least} to {most} (the budget of {name!r} is "
                f"{site.queries_per_sample}).", f"Write, for example, {least}, or 0 for none.",
            )  # fmt: skip
        if not one_update and pilots.reuse and site is not sites[-1]:
            raise SettingError(
                "model.strategy.pilots.reuse", True,
                "pilots of a lower site are stale once the sites above it were updated.",
                f"Set reuse: false, or take the pilots at {sites[-1].name!r} alone.",
            )  # fmt: skip


def pilot_share(pilots: QueryResult, rest: QueryResult, weight: Tensor | float) -> Tensor:
    """``(b,)`` share ``w`` of the pilots in ``w mean(pilots) + (1 - w) mean(rest)``.

    The sum is unbiased although the counts of the rest saw the pilots.

    ``weight`` is ``w``, one for all samples or ``(b,)``, chosen independently of the pilots' losses. Where one of the
    two gives a sample no estimate (no query survived; leave-one-out: fewer than two), the other has all the weight.
    """
    w = weight.to(rest.survivors) if isinstance(weight, Tensor) else torch.full_like(rest.survivors, weight)
    w = w.expand_as(rest.survivors)
    w = torch.where(pilots.found, w, 0.0)
    return torch.where(rest.found, w, 1.0)
