"""``LikelihoodRatio``: the estimator of FLOPS (Ren et al., ICLR 2025), eq. 1, as a strategy.

At a site with activation ``h_b``, noise ``z ~ N(0, I)`` and noise width ``sigma``, for sample ``b`` with ``A_b``
queries::

    delta_b = 1 / A_b  sum_q (L_b(h_b + sigma z_q) - c_bq) z_q / sigma        grad = 1 / B  sum_b J_b^T delta_b

The weights ``(L - c) / sigma`` and the sums over queries are in ``delta.py``, the loop over chunks in
``site_queries.py``, ``J^T delta`` in ``closed_form.py`` and ``local_vjp.py``.

Forward only through everything between a site and the loss. ``linear`` sites use no autograd at all; ``block`` and
``group`` sites use a local VJP inside the site, never through its suffix.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.queries import CleanPass
from flops_lightning.strategies.engine import SiteGradient
from flops_lightning.strategies.query_strategy import QueryStrategy
from flops_lightning.strategies.seen_traces import SeenTraces
from flops_lightning.strategies.site_queries import QueriedOutput, SiteQueries
from flops_lightning.strategies.site_scales import site_scales
from flops_lightning.strategies.sites import Site


class LikelihoodRatio(QueryStrategy[QueriedOutput]):
    """Likelihood-ratio gradient estimates from forward passes with noise at the output of sites.

    Traces are those of the parameter gradient at a single ``nn.Linear`` (FLOPS, theorem 1), those of the gradient with
    respect to the activation (a proxy) elsewhere, and not known where layers are perturbed together.
    """

    @property
    def engine(self) -> SiteQueries:
        """What runs the queries of a site, with these settings."""
        return self.site_queries

    @property
    def site_queries(self) -> SiteQueries:
        """The same, by its own name."""
        return SiteQueries(self.network, self.loss, self.variant, self.chunk_rows, self.seed, self.rank)

    def site_scales(self, clean: CleanPass, metric: Mapping[str, Tensor] | None) -> list[float]:
        """By one local VJP of a random direction at each site (Hutchinson's estimator)."""
        return site_scales(self.site_queries, self.sites, clean, metric).tolist()

    def estimate_site(
        self,
        place: int,
        clean: CleanPass,
        counts: NDArray[np.int64],
        pilot_weight: Tensor | None,
        seen: SeenTraces | None,
    ) -> SiteGradient:
        """Layers that are perturbed together have no sums by sample, pilots and traces."""
        if self.sites[place].together:
            return self.site_queries.joint(self.sites[place], clean, counts)
        return super().estimate_site(place, clean, counts, pilot_weight, seen)

    def spend(self, site: Site, clean: CleanPass, counts: NDArray[np.int64]) -> None:
        """Run queries of a site, to time them."""
        if site.together:
            self.site_queries.joint(site, clean, counts)
        else:
            super().spend(site, clean, counts)
