"""How large a site's parameter gradient is for a given noise at its output: what makes traces of sites comparable.

Traces at block and group sites are taken in activation space. A query's parameter gradient is ``J_b^T delta``, so its
squared norm is on average that of ``delta`` times ``||J_b||_F^2 / d``. For independent ``z_b ~ N(0, I)`` the one vector
``g = sum_b J_b^T z_b`` has ``E ||g||^2 = sum_b ||J_b||_F^2`` (Hutchinson's estimator), which costs one local VJP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.noise.keys import NoiseKey, row_seeds, standard_normal
from flops_lightning.queries import CleanPass
from flops_lightning.strategies.perturbation import clean_layer_input
from flops_lightning.strategies.site_queries import SiteQueries, in_parameter_space, sq_norm
from flops_lightning.strategies.sites import Site


@torch.no_grad()
def site_scales(
    queries: SiteQueries, sites: Sequence[Site], clean: CleanPass, metric: Mapping[str, Tensor] | None = None
) -> Tensor:
    """``(s,)`` factors that take each site's traces to squared units of its parameters.

    Args:
        queries: Runs gradients at the sites.
        sites: From bottom to top.
        clean: A batch's clean pass.
        metric: Weights of the squared derivatives by parameter name (1 / v under Adam); None: 1.

    Raises:
        SettingError: a site perturbs several layers together, so it has no traces to be scaled.
    """
    scales = []
    for site in sites:
        if site.together:
            raise SettingError(
                "strategy.sites", site.name, "perturbs several layers together, whose traces are not known.",
                "Use together: false, or an allocator that does not compare sites.",
            )  # fmt: skip
        x = clean_layer_input(queries.network, site, clean, rows=queries.chunk_rows) if site.layers else None
        # As queries weight it: by the tokens' relative widths, where they differ.
        z = queries.width(site).scaled(_probe(queries, site, clean, x))[1]
        gradient = queries.gradient(site, clean, z, x)
        weighted = [g.square() * metric[name] if metric else g.square() for name, g in gradient.items()]
        norm = sq_norm(site, x if in_parameter_space(site) else None, z).sum()
        scales.append(torch.stack([w.sum() for w in weighted]).sum() / norm)
    return torch.stack(scales)


def _probe(queries: SiteQueries, site: Site, clean: CleanPass, layer_input: Tensor | None) -> Tensor:
    if layer_input is not None:
        like = site.layers[0].module(layer_input)
    else:
        like = clean.activations[site.last + 1]
        like = like if site.tokens is None else like[:, site.tokens]
    key = NoiseKey(queries.seed, clean.draw, f"{site.name}/scale", queries.rank)
    samples = np.arange(clean.batch_size)
    seeds = row_seeds(key, samples, np.zeros_like(samples))
    return standard_normal(seeds, tuple(like.shape[1:]), device=like.device, dtype=like.dtype)
