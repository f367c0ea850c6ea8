"""Who shares a direction at the sites of strategies that perturb parameters."""

from dataclasses import replace
from typing import Literal, cast

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.strategies.site_specs import Directions
from flops_lightning.strategies.sites import Site

Layout = Literal["shared", "factored", "subspace", "flipout"]
BY_ROW = ("factored", "flipout")  # layouts that move layers one by one, each row its own way
BY_SITE = {"shared": "shared", "factored": "own"}  # what `directions` of sites can say otherwise


def with_directions(network: StagedNetwork, site: Site, layout: Layout) -> Site:
    """The site with ``directions`` filled in, where the layout leaves a choice.

    Raises:
        SettingError: it leaves none, and the site has made one.
    """
    if layout not in BY_SITE:
        if site.directions:
            problem = f"cannot be chosen at {site.name!r} with layout: {layout}."
            remedy = "Leave it out, or write layout: shared or factored."
            raise SettingError("model.strategy.sites.directions", site.directions, problem, remedy)
        return site
    stages = network.stages[site.first : site.last + 1]
    owners = [stage for stage in stages if any(map(stage.owns, site.parameters))]
    once = len(stages) == 1 and stages[0].context is not None
    default = BY_SITE[layout]
    if layout == "shared" and all(stage.by_row for stage in owners):
        default = "shared" if once else "own"
    directions = site.directions or cast("Directions", default)
    return replace(site, directions=directions, per_batch=once and directions == "shared")
