"""Numbers of the clean pass that tell how noisy each sample's gradient will be, without a query.

The trace of a query's gradient is about ``d ||dL/dh||^2`` at a site with ``d`` active features, and the derivative at a
deep site is the one at the loss pulled back through what lies between. So the squared norm of the derivative at the top
of the network says much about every site below. It is taken through the trailing stages alone, the head and what
little comes before it; never through the blocks.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.queries import CleanPass, LossFunction, at_least_float32, full_precision, row_losses
from flops_lightning.strategies.precision import differentiable
from flops_lightning.strategies.sites import Site

PREDICTORS = ("activation", "head_gradient", "output_gradient", "top_gradient")


def head_start(network: StagedNetwork) -> int:
    """Index of the first of the trailing stages that are the head: the final norm and pooling belong to it."""
    names = [stage.name for stage in network.stages]
    return len(names) - 2 if names[-2:] == ["pool", "head"] else len(names) - 1


def trace_predictors(
    network: StagedNetwork, loss: LossFunction, sites: Sequence[Site], clean: CleanPass, names: Collection[str]
) -> dict[str, Tensor]:
    """Those of :data:`PREDICTORS` that are in ``names``.

    Args:
        network: The staged network.
        loss: One loss a row.
        sites: The sites, from bottom to top.
        clean: The batch's clean pass, with the activations that enter the head.
        names: Which to compute.

    Returns:
        ``output_gradient`` ``(b,)``: squared norm of the loss's derivative in the network's output (``p - y`` under
        cross-entropy). ``head_gradient`` ``(b,)``: the same in the input of the last stage. ``top_gradient`` ``(b,)``:
        the same in the input of the final norm and pooling. ``activation.<stage>`` ``(b,)``: mean square of the clean
        activation that enters a stage at which a site begins or ends, at the tokens that the head reads; and
        ``activation.<stage>.all`` ``(b,)`` over all tokens, where these are not all. With normalisation layers the
        derivative falls as the activation grows.

    Raises:
        SettingError: a gradient is wanted, and loss or head are not differentiable.
    """
    last, found = len(network) - 1, dict[str, Tensor]()
    starts = {"output_gradient": last + 1, "head_gradient": last, "top_gradient": head_start(network)}
    for name, start in starts.items():
        if name in names and start > 0:  # through the whole network it would be backpropagation by another name
            found[name] = _gradient_sq_norm(network, loss, clean, start)
    if "activation" in names:
        tokens = network.stages[head_start(network)].reads
        for i in sorted({site.start for site in sites} - {0, len(network)}):
            h, name = clean.activations[i], f"activation.{network.stages[i].name}"
            found[name] = _mean_square(h, tokens)
            if tokens is not None and h.dim() > 2:
                found[f"{name}.all"] = _mean_square(h, None)
    return found


def kept_for_predictors(network: StagedNetwork, names: Collection[str]) -> set[int]:
    """Indices of the activations that :func:`trace_predictors` reads."""
    starts = {"head_gradient": len(network) - 1, "top_gradient": head_start(network)}
    return {start for name, start in starts.items() if name in names}


def _gradient_sq_norm(network: StagedNetwork, loss: LossFunction, clean: CleanPass, start: int) -> Tensor:
    h = clean.activations[start].detach()
    # Copies of the weights that autocast made without a graph would cut the gradient off.
    torch.clear_autocast_cache()
    with network.evaluating(), torch.enable_grad(), differentiable(h) as entering:
        h = entering.clone().requires_grad_(True)
        # A clone of it is run: a stage may work in place, and a leaf may not be changed.
        try:
            losses = row_losses(loss, network.run(h.clone(), start), clean.targets)
            with full_precision(h):
                (gradient,) = torch.autograd.grad(losses.sum(), h)
        except RuntimeError as error:  # the loss, or the head, is a black box
            raise SettingError(
                "traces.predictors", "*_gradient", f"cannot be had, the loss is not differentiable: {error}.",
                "Write predictors: [loss, activation].",
            ) from error  # fmt: skip
    return at_least_float32(gradient).flatten(1).square().sum(1)


def _mean_square(h: Tensor, tokens: slice | None) -> Tensor:
    # The pooled feature has no tokens any more.
    h = h if tokens is None or h.dim() < 3 else h[:, tokens]
    return at_least_float32(h).flatten(1).square().mean(1)
