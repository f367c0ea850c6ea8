"""One chunk of queries: noise enters at a site, the suffix runs, one loss a row comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.noise import NoiseKey, row_seeds, standard_normal
from flops_lightning.queries import Chunk, CleanPass, LossFunction, row_losses
from flops_lightning.staging import StagedNetwork
from flops_lightning.strategies.sites import LayerTarget, Site


@dataclass(eq=False)
class Perturbation:
    """Noise that entered at one place in one chunk.

    Attributes:
        layer: The perturbed layer, None at the output of a block or group.
        z: ``(r, ...)`` noise, ``z ~ N(0, I)`` (the activation moved by ``sigma z``).
        x: ``(r, ..., i)`` each row's own input of the layer at the active tokens; None without a layer.
    """

    layer: LayerTarget | None
    z: Tensor
    x: Tensor | None = None


DrawNoise = Callable[[str, tuple[int, ...], Tensor], Tensor]
"""``(name of the layer or "", shape of a row, tensor with the device and dtype) -> (r, *shape)``."""


def chunk_noise(key: NoiseKey, chunk: Chunk, *, antithetic: bool) -> DrawNoise:
    """Noise of a chunk's rows; antithetic: rows ``2p`` and ``2p + 1`` of a sample get ``+z_p`` and ``-z_p``."""

    def draw(layer: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        placed = replace(key, site=f"{key.site}/{layer}") if layer else key
        if not antithetic:
            return standard_normal(
                row_seeds(placed, chunk.samples, chunk.queries), shape, device=like.device, dtype=like.dtype
            )
        seeds = row_seeds(placed, chunk.samples[::2], chunk.queries[::2] // 2)
        z = standard_normal(seeds, shape, device=like.device, dtype=like.dtype)
        return torch.stack((z, -z), dim=1).flatten(0, 1)

    return draw


def boundary_activation(site: Site, clean: CleanPass) -> Tensor:
    """The clean activation at a block or group site, cut to its tokens where the suffix takes them alone."""
    h = clean.activations[site.last + 1]
    return h[:, site.tokens] if site.narrow else h


def perturbed_losses(
    network: StagedNetwork, loss: LossFunction, site: Site, clean: CleanPass, index: Tensor, draw: DrawNoise
) -> tuple[Tensor, list[Perturbation]]:
    """``(r,)`` losses of a chunk's rows, ``index`` ``(r,)`` their samples, and the noise that made them.

    Call it in eval mode and without autograd.
    """
    if site.layers:
        with injected(site.layers, site.sigma, draw) as perturbations:
            output = network.run(clean.activations[site.start].index_select(0, index), site.start)
        for target in site.layers:
            if sum(p.layer is target for p in perturbations) != 1:
                raise SettingError(
                    "strategy.sites", target.name, "did not run exactly once as a module in the forward pass.",
                    "Teach its stage with kind: block or group.",
                )  # fmt: skip
    else:
        h = boundary_activation(site, clean).index_select(0, index)
        active = h if site.tokens is None or site.narrow else h[:, site.tokens]
        z = draw("", tuple(active.shape[1:]), active)
        perturbations = [Perturbation(None, z)]
        active.add_(z, alpha=site.sigma)
        output = network.run(h, site.start)
    return row_losses(loss, output, clean.targets.index_select(0, index)), perturbations


@contextmanager
def injected(layers: Sequence[LayerTarget], sigma: float, draw: DrawNoise) -> Iterator[list[Perturbation]]:
    """Add ``sigma z`` to the outputs of ``layers`` while the context lasts; the hooks are gone afterwards."""
    perturbations: list[Perturbation] = []

    def hook_of(target: LayerTarget) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not args:
                raise SettingError(
                    "strategy.sites", target.name, "is called by keyword in the forward pass.",
                    "Teach its stage with kind: block.",
                )  # fmt: skip
            tokens = slice(None) if target.tokens is None else target.tokens
            z = draw(target.name, tuple(output[:, tokens].shape[1:]), output)
            perturbations.append(Perturbation(target, z, args[0][:, tokens].clone()))  # may be overwritten later
            output = output.clone()
            output[:, tokens] += sigma * z
            return output

        return hook

    handles = [target.module.register_forward_hook(hook_of(target)) for target in layers]
    try:
        yield perturbations
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def clean_layer_input(network: StagedNetwork, site: Site, clean: CleanPass, *, rows: int) -> Tensor:
    """``(b, ..., i)`` unperturbed input of a single-layer site at its active tokens."""
    (target,) = site.layers
    inputs: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if target.tokens is None else args[0][:, target.tokens]
        inputs.append(x.clone())

    handle = target.module.register_forward_pre_hook(keep)
    try:
        with network.evaluating():
            for index in clean.stand_ins().split(rows):
                network.run(clean.activations[site.first].index_select(0, index), site.first, site.first + 1)
    finally:
        handle.remove()
    return torch.cat(inputs)
