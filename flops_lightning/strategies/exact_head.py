"""The exact gradient at the network's output, without a query, for differentiable losses: ``p - y`` for cross-entropy.

A site that ends the network has noise at the logits, and its suffix is the loss alone. The derivative that queries
would estimate there is that of the loss function in the logits: nothing of the network is differentiated. The
parameters' gradient follows as from any estimate: ``(p - y) x^T`` at a linear layer, a local VJP at a block or group.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.queries import CleanPass, LossFunction, row_losses
from flops_lightning.strategies.pilots import PilotSpec
from flops_lightning.strategies.sites import Site


def find_exact_head(network: StagedNetwork, sites: Sequence[Site], pilots: PilotSpec, *, one_update: bool) -> Site:
    """The site at the network's output."""
    last = len(network) - 1
    for site in sites:
        if site.together and site.last == last:
            raise SettingError(
                "model.strategy.exact_head", True, f"site {site.name!r} perturbs the last layer together with others.",
                "Give the last stage a site of its own, or write exact_head: false.",
            )  # fmt: skip
    ending = [site for site in sites if site.last == last and _ends(network, site)]
    if not ending:
        raise SettingError(
            "model.strategy.exact_head", True, "no site has its noise at the network's output.",
            f"Let a site end at the stage {network.stages[last].name!r} (one with linear layers must have a last layer "
            "that is this whole stage), or write exact_head: false.",
        )  # fmt: skip
    if len(sites) == 1:
        raise SettingError(
            "model.strategy.exact_head", True, "leaves no site for queries: the head alone would be trained.",
            "Use strategy Backprop, which costs the same here, or write exact_head: false.",
        )  # fmt: skip
    head = ending[0]
    if pilots.queries and head.name in ([pilots.sites] if isinstance(pilots.sites, str) else pilots.sites):
        raise SettingError(
            "model.strategy.pilots.sites", head.name, "spends no queries, its gradient is exact.",
            f"Choose from {[site.name for site in sites if site is not head]}.",
        )  # fmt: skip
    if pilots.queries and pilots.reuse and not one_update:
        raise SettingError(
            "model.strategy.pilots.reuse", True, "pilots are stale once the exact head above them was updated.",
            "Set reuse: false, or update: simultaneous.",
        )  # fmt: skip
    return head


def _ends(network: StagedNetwork, site: Site) -> bool:
    # A layer's output is the network's where the last stage is this layer and nothing else.
    return not site.layers or network.stages[-1].members == (site.layers[0].name,)


@torch.no_grad()
def check_exact_head(network: StagedNetwork, loss: LossFunction, head: Site, clean: CleanPass) -> None:
    """Check on the first batch that the head's gradient is that of the output."""
    output_gradient(loss, clean)
    if not head.layers:
        return
    outputs: list[Tensor] = []
    handle = head.layers[0].module.register_forward_hook(lambda _, __, output: outputs.append(output.clone()))
    try:
        with network.evaluating():
            h = clean.activations[head.first].index_select(0, clean.stand_ins()[:1])
            final = network.run(h, head.first)
    finally:
        handle.remove()
    if len(outputs) != 1 or not torch.equal(outputs[0], final):
        raise SettingError(
            "model.strategy.exact_head", True, f"the output of {head.layers[0].name!r} is not that of the network.",
            "Train its stage with kind: block, or write exact_head: false.",
        )  # fmt: skip


def output_gradient(loss: LossFunction, clean: CleanPass) -> Tensor:
    """``(b, ...)`` derivative of each sample's loss in the network's output; zero where the loss is not finite."""
    output = clean.output.detach().requires_grad_(True)
    try:
        with torch.enable_grad():
            total = row_losses(loss, output, clean.targets).sum()
        (gradient,) = torch.autograd.grad(total, output)
    except RuntimeError as error:
        raise SettingError(
            "loss", getattr(loss, "__name__", type(loss).__name__), f"has no derivative ({error}).",
            "Write exact_head: false, or take a loss such as cross-entropy.",
        ) from error  # fmt: skip
    finite = torch.isfinite(clean.loss).view(-1, *(1,) * (gradient.dim() - 1))
    return torch.where(finite, gradient, 0.0)
