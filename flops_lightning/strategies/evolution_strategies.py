"""``EvolutionStrategies``: FLOPS (Ren et al., ICLR 2025), eq. 2; Salimans et al., 2017.

With noise ``z ~ N(0, I)`` and width ``sigma`` on the parameters of a site, for sample ``b`` with ``A_b`` queries::

    g_b = 1 / A_b  sum_q (L_b(theta + sigma z_q) - c_bq) z_q / sigma        grad = 1 / B  sum_b g_b

``c_bq`` is 0 (``plain``, the paper's), the clean loss (``baseline``) or the mean of the sample's other queries
(``leave_one_out``). The weights are in ``delta.py``, the sums in ``parameter_queries.py``, directions in
``shared_directions.py`` and ``factored_directions.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

from flops_lightning.errors import SettingError
from flops_lightning.strategies.base import Exchange
from flops_lightning.strategies.chunk_rows import RowsSetting
from flops_lightning.strategies.delta import Variant
from flops_lightning.strategies.parameter_perturbation import Layout, ParameterPerturbation
from flops_lightning.strategies.pilots import PilotSpec
from flops_lightning.strategies.query_strategy import UpdateOrder
from flops_lightning.strategies.site_specs import SiteSpec


class EvolutionStrategies(ParameterPerturbation):
    """One-sided estimates with noise in the parameters; no autograd anywhere."""

    def __init__(
        self,
        *,
        sites: Sequence[SiteSpec] = (),
        sigma: float = 0.0,
        variant: Variant = "baseline",
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
            variant: The control variate: ``plain`` (none), ``baseline`` (clean loss), ``leave_one_out``.
            layout: ``shared``: one dense direction for each query index, used by all samples. ``factored``: a low-rank
                direction of its own for every row on every linear and convolution.
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
        if variant == "antithetic":
            raise SettingError("strategy.variant", variant, "is SPSA.", "Use strategy SPSA, or variant: baseline.")
        super().__init__(
            sites=sites, sigma=sigma, variant=variant, layout=layout, rank=rank, activation_guided=activation_guided,
            span=span, update=update, pilots=pilots, exchange=exchange, chunk_rows=chunk_rows,
            compile_suffixes=compile_suffixes, seed=seed,
        )  # fmt: skip
