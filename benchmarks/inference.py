"""The yardsticks: plain batched inference of as many rows as a step has queries.

Rows are repeated beforehand, nothing is perturbed, no loss is computed, and chunks are as large as the step's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from flops_lightning.network.staging import StagedNetwork
from flops_lightning.queries import CleanPass, plan_rows
from flops_lightning.strategies.perturbation import boundary_activation
from flops_lightning.strategies.sites import Site


def full_inference(
    network: StagedNetwork, sites: Sequence[Site], inputs: Tensor, *, chunk_rows: int
) -> Callable[[], None]:
    """Every query of every site as one row through the whole network.

    Args:
        network: The staged network.
        sites: Their ``queries_per_sample`` gives the number of rows.
        inputs: ``(b, ...)`` inputs.
        chunk_rows: Upper bound of rows in one forward pass.
    """
    queries = [site.queries_per_sample for site in sites]
    expanded = {q: inputs.repeat_interleave(q, dim=0) for q in set(queries)}

    @torch.inference_mode()
    def run() -> None:
        with network.evaluating():
            for q in queries:
                for x in expanded[q].split(_even_rows(len(inputs), q, chunk_rows)):
                    network.run_suffix(network.run(x, 0, 1), 1)

    return run


def suffix_inference(
    network: StagedNetwork, sites: Sequence[Site], clean: CleanPass, *, chunk_rows: int
) -> Callable[[], None]:
    """Every query of every ``block`` or ``group`` site as one row through the site's suffix.

    Args:
        network: The staged network.
        sites: The sites; where parameters are perturbed, a suffix begins at the site's own first stage.
        clean: A clean pass that kept the sites' activations.
        chunk_rows: Upper bound of rows in one forward pass.
    """
    begins = [clean.activations[s.start] if s.in_parameters else boundary_activation(s, clean) for s in sites]
    expanded = [h.repeat_interleave(s.queries_per_sample, dim=0) for h, s in zip(begins, sites, strict=True)]

    @torch.inference_mode()
    def run() -> None:
        with network.evaluating():
            for site, rows in zip(sites, expanded, strict=True):
                for h in rows.split(_even_rows(clean.batch_size, site.queries_per_sample, chunk_rows)):
                    network.run_suffix(h, site.start)

    return run


def _even_rows(batch: int, queries: int, chunk_rows: int) -> int:
    return plan_rows(np.full(batch, queries), chunk_rows).chunk_rows
