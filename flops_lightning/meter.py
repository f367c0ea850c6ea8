"""What has been paid: clean passes, pilots, queries and forward-equivalents, per site and in total."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

CLEAN = "clean"


@dataclass
class SiteCount:
    """Running totals of one site.

    Attributes:
        queries: Perturbed forward passes of one sample, pilots and lost ones included.
        pilots: Those of them that were pilots.
        lost: Those of them whose loss was not finite, together with their antithetic partners.
        clean_passes: Unperturbed passes of one sample.
        forward_equivalents: Compute, in units of one full forward pass of one sample (counted in FLOPs; local VJPs and
            backward passes at what they cost, padding of the last chunk left out).
    """

    queries: int = 0
    pilots: int = 0
    lost: int = 0
    clean_passes: int = 0
    forward_equivalents: float = 0.0


@dataclass
class QueryMeter:
    """Totals of a run, by site; clean passes stand under the name ``clean``."""

    sites: dict[str, SiteCount] = field(default_factory=dict)

    def add(self, site: str, **amounts: float) -> None:
        """Add to the totals of one site, by the names of :class:`SiteCount`."""
        count = self.sites.setdefault(site, SiteCount())
        for name, amount in amounts.items():
            setattr(count, name, getattr(count, name) + amount)

    def add_state(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Add the totals of another meter, as its :meth:`state_dict` returned them, site by site."""
        for site, count in state.items():
            self.add(site, **count)

    def total(self) -> SiteCount:
        """Totals over all sites."""
        total = QueryMeter()
        for count in self.sites.values():
            total.add("all", **asdict(count))
        return total.sites.get("all", SiteCount())

    def state_dict(self) -> dict[str, Any]:
        """Totals as plain numbers."""
        return {site: asdict(count) for site, count in self.sites.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.sites = {site: SiteCount(**count) for site, count in state.items()}
