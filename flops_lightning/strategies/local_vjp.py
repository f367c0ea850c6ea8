"""``J^T delta`` of a block or a group of blocks: autograd inside the site, never through its suffix.

Under bfloat16 autocast the site runs in bfloat16 as in every mixed-precision training, and what it gives is summed in
float32. Under float16 autocast it runs in float32: see :func:`differentiable`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flops_lightning.network.staging import StagedNetwork
from flops_lightning.queries import CleanPass, at_least_float32, full_precision
from flops_lightning.strategies.precision import differentiable
from flops_lightning.strategies.sites import Site


def graph_rows(site: Site, chunk_rows: int) -> int:
    """Samples whose graph takes about the memory of a forward pass of ``chunk_rows`` rows.

    A graph keeps every stage's activations, about twice as many as one stage holds while it runs.
    """
    return max(1, chunk_rows // (2 * (site.last - site.first + 1)))


def local_vjp(network: StagedNetwork, site: Site, clean: CleanPass, delta: Tensor, *, rows: int) -> dict[str, Tensor]:
    """``sum_b J_b^T delta_b``, ``J_b`` the Jacobian of the site's output in its parameters at the clean input.

    Args:
        network: The staged network.
        site: A ``block`` or ``group`` site.
        clean: The batch's clean pass, with the activation that enters the site.
        delta: ``(b, ...)`` gradient with respect to the site's active output.
        rows: Samples whose graph is kept at a time (bounds the memory).

    Returns:
        Gradients by parameter name, in float32 at least; zeros for a parameter that the output does not depend on.
    """
    total = {name: torch.zeros_like(at_least_float32(p)) for name, p in site.parameters.items()}
    parameters = list(site.parameters.values())
    with network.evaluating():
        for index, d in zip(clean.stand_ins().split(rows), delta.split(rows), strict=True):
            h = clean.activations[site.first].index_select(0, index)
            # Copies of the weights that autocast made without a graph would cut the gradient off.
            torch.clear_autocast_cache()
            with torch.enable_grad(), differentiable(h) as entering:
                output = network.run(entering, site.first, site.last + 1)
                output = output if site.tokens is None else output[:, site.tokens]
            with full_precision(d):  # each derivative in the dtype of what it is the derivative of, no lower
                gradients = torch.autograd.grad(output, parameters, d.to(output.dtype), allow_unused=True)
            for name, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient
    return total
