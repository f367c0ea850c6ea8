"""``pairing: crossed``: every query at one site beside every query at another above it, not beside the clean other.

With ``l_b(T, I)`` the loss of sample ``b`` for text features ``T`` and image features ``I``, ``M`` text draws that all
samples share and ``K_b`` image draws of each sample's own::

    w_bm = 1/K_b sum_k l_b(T(z_T + s_T u_m), I_b(z_I + s_I v_bk))        at the upper site
    w_bk = 1/M   sum_m l_b(T(z_T + s_T u_m), I_b(z_I + s_I v_bk))        at the lower one

take the place of losses, centred on the mean of the others (``leave_one_out``) or in pairs. Where the loss is linear
within sigma this is ``split`` with the same variant, since all draws of the other site are the same in each of the
means. It averages where losses are rounded and noise is wide. The clean loss is not needed. A step costs the passes of
split, and a product for each pair.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.network.rows import gather
from flops_lightning.queries import CleanPass, LossFunction, plan_rows
from flops_lightning.strategies.delta import Variant
from flops_lightning.strategies.parameter_queries import ParameterQueries, ParameterQueryResult, RowResponses
from flops_lightning.strategies.sites import Site
from flops_lightning.suffix_loss import SuffixLoss
from flops_lightning.transfers import to_device

Pairing = Literal["split", "crossed"]
CENTRED = ("leave_one_out", "antithetic")
"""Variants that compare queries with each other."""


def check_crossed(sites: Sequence[Site], loss: LossFunction, *, variant: Variant, update: str, pilots: int) -> None:
    """Raise a :class:`SettingError` where queries cannot be crossed."""

    def refusal(problem: str, remedy: str) -> SettingError:
        return SettingError("model.strategy.pairing", "crossed", problem, f"{remedy}, or pairing: split.")

    if variant not in CENTRED:
        problem = f"compares queries with each other, which variant: {variant} does not."
        raise refusal(problem, "Write variant: leave_one_out")
    if isinstance(loss, SuffixLoss):
        raise refusal(f"would run {loss.part} for every pair of queries.", "Train one site at a time")
    if len(sites) != 2 or not sites[1].per_batch or sites[0].last >= sites[1].first:
        problem = f"needs two sites, the upper with draws that are made once for the batch; here are {len(sites)}."
        raise refusal(problem, "Give a text and an image prompt a site each, the text's with directions: shared")
    if update != "simultaneous":
        raise refusal(f"moves both sites at once (update: {update}).", "Write update: simultaneous")
    if pilots:
        raise refusal(f"does not cross pilots (pilots.queries: {pilots}).", "Write 0")


def crossed_results(
    engine: ParameterQueries, sites: Sequence[Site], clean: CleanPass, counts: NDArray[np.int64], *, traces: bool
) -> Mapping[str, ParameterQueryResult]:
    """Results by site of ``(2, b)`` counts of queries; without queries at one site, those of the other are split."""
    below, above = sites
    if not counts.any(axis=1).all():
        found = (
            (site, engine.query(site, clean, line, traces=traces)) for site, line in zip(sites, counts, strict=True)
        )
        return {site.name: result for site, result in found if result is not None}
    lower, upper = engine.layouts(below), engine.layouts(above)
    plan, once = (plan_rows(line, lower.chunk_rows, multiple=lower.unit) for line in counts)
    features = replace(lower, stop=above.first)
    with features.network.rows_of(replace(lower.key, draw=clean.draw, site=below.name)):
        rows = features.run(below, clean, plan, traces=traces)
    # Clean rows stand in for samples without queries.
    samples = np.concatenate([plan.samples, np.arange(clean.batch_size)])
    sample = to_device(samples, clean.loss.device)
    entering = torch.cat([rows.values, clean.activations[above.first]])
    every = replace(clean, activations={above.first: entering}, targets=gather(clean.targets, sample, samples))
    draws = np.full(len(entering), counts[1].max())
    with upper.network.rows_of(replace(upper.key, draw=clean.draw, site=above.name)):
        pairs = upper.run(above, every, plan_rows(draws, upper.chunk_rows, multiple=upper.unit), traces=False)
    of_rows, of_draws = pair_means(pairs.values.view(len(entering), -1), sample, clean.batch_size)
    responses = replace(rows, values=of_rows), RowResponses(of_draws.flatten(), pairs.sq_norms, pairs.kept)
    return {
        below.name: engine.result(below, clean, plan, lower, responses[0]),
        above.name: engine.result(above, clean, once, upper, responses[1]),
    }


def pair_means(losses: Tensor, sample: Tensor, samples: int) -> tuple[Tensor, Tensor]:
    """Means of the losses of pairs over either side; NaN where they are lost.

    A draw that has no finite loss is lost for all rows, and a row that lacks the loss of another draw is lost: what is
    averaged is the same for all that are compared.

    Args:
        losses: ``(r + b, m)`` losses of rows beside draws, the last ``b`` rows clean ones.
        sample: ``(r + b,)`` samples of the rows.
        samples: ``b``.

    Returns:
        ``(r,)`` means over draws, and ``(b, m)`` means over a sample's rows, or that of its clean row alone if it has
        no other.
    """
    finite = losses.isfinite()
    drawn = finite.any(0)
    whole = (finite | ~drawn).all(1) & drawn.any()
    kept = torch.where(whole[:, None] & drawn, losses, 0.0)
    of_rows = torch.where(whole, kept.sum(1) / drawn.sum().clamp(min=1), torch.nan)[:-samples]
    used = whole.to(losses.dtype)
    used[-samples:] *= losses.new_zeros(samples).index_add(0, sample[:-samples], used[:-samples]) == 0
    number = losses.new_zeros(samples).index_add(0, sample, used)[:, None]
    total = losses.new_zeros(samples, losses.shape[1]).index_add(0, sample, kept * used[:, None])
    return of_rows, torch.where((number > 0) & drawn, total / number.clamp(min=1), torch.nan)
