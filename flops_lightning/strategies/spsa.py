"""``SPSA``: simultaneous perturbation, FLOPS (Ren et al., ICLR 2025), eq. 3; Spall, 1992.

With pairs of queries ``+z_p`` and ``-z_p``, ``z ~ N(0, I)``, on the parameters of a site, ``n_b = A_b / 2``::

    g_b = 1 / n_b  sum_p [L_b(theta + sigma z_p) - L_b(theta - sigma z_p)] z_p / (2 sigma)
    grad = 1 / B  sum_b g_b

The paper's eq. 3, with ``z ~ N(0, sigma^2)``, is off by a factor sigma. Sums are in ``parameter_queries.py``,
directions in ``shared_directions.py`` and ``factored_directions.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from flops_lightning.strategies.base import Exchange
from flops_lightning.strategies.chunk_rows import RowsSetting
from flops_lightning.strategies.parameter_perturbation import Layout, ParameterPerturbation
from flops_lightning.strategies.pilots import PilotSpec
from flops_lightning.strategies.query_strategy import UpdateOrder
from flops_lightning.strategies.site_specs import SiteSpec


class SPSA(ParameterPerturbation):
    """Two-sided estimates with noise in the parameters; no autograd anywhere."""

    def __init__(
        self,
        *,
        sites: Sequence[SiteSpec] = (),
        sigma: float = 0.0,
        layout: Layout = "shared",
        rank: int = 1,
        activation_guided: bool = False,
        span: int = 0,
        update: UpdateOrder = "simultaneous",
        pilots: PilotSpec | None = None,
        exchange: Exchange = "gradients",
        chunk_rows: RowsSetting = 256,
        compile_suffixes: bool = False,
        seed: int | None = None,
    ) -> None:
        """Keep the settings; they meet the network in :meth:`bind`.

        Args:
            sites: Stages whose parameters are perturbed together (``kind: block`` or ``group``); empty: the paper's
                layout, three groups and the head.
            sigma: Standard deviation of the noise at all sites, in place of their own; 0: their own.
            layout: ``shared``: one dense direction for each pair index, used by all samples. ``factored``: a low-rank
                direction of its own for every pair on every linear and convolution.
            rank: Rank of the factored directions.
            activation_guided: Draw the input factors in the span of the layer's own inputs (``factored`` only).
            span: So many leading directions of that span (biased); 0: all of it.
            update: See :class:`QueryStrategy`.
            pilots: Queries spent before the allocation.
            exchange: What several processes tell each other: ``gradients``, or ``losses`` (``shared`` only): a scalar
                a direction, and every process draws the directions of all. Bytes do not depend on the parameters.
            chunk_rows: Upper bound of the rows in one forward pass; never changes the estimate.
                ``auto``: as many as suit the device, chosen at the first batch.
            compile_suffixes: Run what lies above a site through ``torch.compile``: seconds to minutes at the first
                step, and again for each other number of rows. Hooks added to the network later are not seen there.
            seed: Seed of all noise; None: the seed of ``seed_everything``.

        Raises:
            SettingError: an unknown word, or a setting without effect.
        """
        super().__init__(
            sites=sites, sigma=sigma, variant="antithetic", layout=layout, rank=rank,
            activation_guided=activation_guided, span=span, update=update, pilots=pilots, exchange=exchange,
            chunk_rows=chunk_rows, compile_suffixes=compile_suffixes, seed=seed,
        )  # fmt: skip
