"""Run one chunk of queries: add noise at a site, run the suffix, return one loss per row."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.network.calls import uncompiled
from flops_lightning.network.rows import Rows, gather, value_of, with_value
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.noise.keys import NoiseKey
from flops_lightning.noise.kinds import NoiseSpec, draw_noise
from flops_lightning.phases import phase
from flops_lightning.queries import Chunk, CleanPass, LossFunction, row_losses
from flops_lightning.strategies.drawn_again import DrawnAgain, drawn_again
from flops_lightning.strategies.sites import LayerTarget, Site
from flops_lightning.strategies.widths import SiteWidth


@dataclass(eq=False)
class Perturbation:
    """Noise that entered at one place in one chunk.

    Attributes:
        layer: The perturbed layer, None at the output of a block or group.
        z: ``(r, ...)`` noise, ``E z z^T = I`` (the activation moved by ``sigma z``). With relative widths ``r_t`` of
            tokens it is the noise over ``r_t`` (the activation moved by ``sigma r_t^2 z``), so that weights times it
            estimate the gradient.
        x: ``(r, ..., i)`` each row's own input of the layer at the active tokens; None without a layer.
        again: The noise where it is not stored: ``z`` then is one row of zeros, which tells its shape.
    """

    layer: LayerTarget | None
    z: Tensor
    x: Tensor | None = None
    again: DrawnAgain | None = None


DRAWN_AGAIN = 2**23
"""Bytes of a chunk's noise from which a CPU draws it again after the suffix instead of keeping it through it: it takes
about a percent of the suffix's time and as much memory as an activation. A GPU is slow to draw (a launch a row)."""

DrawNoise = Callable[[str, tuple[int, ...], Tensor], Tensor]
"""``(name of the layer or "", shape of a row, tensor with the device and dtype) -> (r, *shape)``."""


@dataclass(frozen=True, eq=False)
class ChunkNoise:
    """Noise of a chunk's rows; ``unit`` 2: rows ``2p`` and ``2p + 1`` of a sample get ``+z_p`` and ``-z_p``."""

    key: NoiseKey
    chunk: Chunk
    spec: NoiseSpec
    unit: int

    def __call__(self, layer: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """``(r, *shape)`` noise, see :data:`DrawNoise`."""
        placed = replace(self.key, site=f"{self.key.site}/{layer}") if layer else self.key
        samples, queries = self.chunk.samples[:: self.unit], self.chunk.queries[:: self.unit] // self.unit
        z = draw_noise(self.spec, placed, samples, queries, shape, device=like.device, dtype=like.dtype)
        return z if self.unit == 1 else torch.stack((z, -z), dim=1).flatten(0, 1)

    def again(self, h: Tensor, tokens: slice | None, width: SiteWidth) -> DrawnAgain | None:
        """The noise of rows of ``h`` at a boundary where it need not be stored, see :func:`drawn_again`."""
        return drawn_again(self.key, self.chunk, self.spec, h, tokens, width, unit=self.unit)


def boundary_activation(site: Site, clean: CleanPass) -> Tensor | Rows:
    """The clean activation at a block or group site, cut to its tokens where the suffix takes them alone."""
    h = clean.activations[site.last + 1]
    return h[:, site.tokens] if site.narrow else h


def perturbed_losses(
    network: StagedNetwork, loss: LossFunction, site: Site, clean: CleanPass, index: Tensor, draw: DrawNoise,
    width: SiteWidth, samples: NDArray[np.int64] | None = None,
) -> tuple[Tensor, list[Perturbation]]:  # fmt: skip
    """``(r,)`` losses of a chunk's rows, ``index`` ``(r,)`` their samples, and the noise that made them.

    ``samples`` is the index on the host; None: it is asked of the device where it is needed. Call it in eval mode and
    without autograd. The width's ``sigma`` may be a tensor that carries a tangent.
    """
    if site.layers:
        with phase("suffix"), uncompiled(network.module), injected(site.layers, width, draw) as perturbations:
            output = network.run(clean.activations[site.start].index_select(0, index), site.start)
        for target in site.layers:
            if sum(p.layer is target for p in perturbations) != 1:
                raise SettingError(
                    "model.strategy.sites", target.name, "did not run exactly once in the forward pass.",
                    "Train its stage with kind: block or group.",
                )  # fmt: skip
    else:
        boundary, tokens = boundary_activation(site, clean), None if site.narrow else site.tokens
        again = draw.again(value_of(boundary), tokens, width) if isinstance(draw, ChunkNoise) else None
        if again is not None:
            return _without_storing(network, loss, site, clean, index, boundary, again, samples)
        with phase("noise"):
            rows = boundary.index_select(0, index)
            h = value_of(rows)
            active = h if site.tokens is None or site.narrow else h[:, site.tokens]
            shape, like = tuple(active.shape[1:]), active.new_empty(0)
            step, z = width.scaled(draw("", shape, active))
            entering = [with_value(rows, moved(h, step, tokens, width.sigma))]
        long = len(network) - site.start > 2  # more than a pool and a head, beside which drawing would take its time
        kept = None if z.device.type == "cpu" and z.nbytes >= DRAWN_AGAIN and long else z
        del rows, h, active, step, z
        with phase("suffix"):
            # Popped, so that nothing else holds it while the suffix runs.
            output = network.run_suffix(entering.pop(), site.start)
        if kept is None:
            with phase("noise"):
                _, kept = width.scaled(draw("", shape, like))
        perturbations = [Perturbation(None, kept)]
    return row_losses(loss, output, gather(clean.targets, index, samples)), perturbations


def _without_storing(
    network: StagedNetwork, loss: LossFunction, site: Site, clean: CleanPass, index: Tensor, boundary: Tensor | Rows,
    again: DrawnAgain, samples: NDArray[np.int64] | None,
) -> tuple[Tensor, list[Perturbation]]:  # fmt: skip
    """As :func:`perturbed_losses`, where kernels draw the noise of a block or group."""
    with phase("noise"):
        h = value_of(boundary)
        value = again.added_to(h, index, None if site.narrow else site.tokens)
        # Gathered beside it: what else the rows consist of, without the activation itself.
        others = boundary if isinstance(boundary, Tensor) else with_value(boundary, h[:, :0]).index_select(0, index)
        entering = [with_value(others, value)]
    del value, others
    with phase("suffix"):
        output = network.run_suffix(entering.pop(), site.start)
    losses = row_losses(loss, output, gather(clean.targets, index, samples))
    return losses, [Perturbation(None, again.like, again=again)]


def moved(h: Tensor, z: Tensor, tokens: slice | None, sigma: float | Tensor) -> Tensor:
    """``h + sigma z`` at ``tokens`` (None: all); overwrites ``h`` where sigma is a number."""
    if isinstance(sigma, Tensor):
        noise = z if tokens is None else torch.zeros_like(h)
        if tokens is not None:
            noise[:, tokens] = z
        return h + (sigma * noise).to(h.dtype)
    (h if tokens is None else h[:, tokens]).add_(z, alpha=sigma)
    return h


@contextmanager
def injected(layers: Sequence[LayerTarget], width: SiteWidth, draw: DrawNoise) -> Iterator[list[Perturbation]]:
    """Add noise of this width to the outputs of ``layers`` while the context lasts; the hooks are gone afterwards."""
    perturbations: list[Perturbation] = []

    def hook_of(target: LayerTarget) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            if not args:
                raise SettingError(
                    "model.strategy.sites", target.name, "is called by keyword in the forward pass.",
                    "Train its stage with kind: block.",
                )  # fmt: skip
            tokens = slice(None) if target.tokens is None else target.tokens
            with phase("noise"):
                step, z = width.scaled(draw(target.name, tuple(output[:, tokens].shape[1:]), output))
                if len(step) != len(output):
                    raise SettingError(
                        "model.strategy.sites", target.name, f"has an output of the shape {tuple(output.shape)}, whose "
                        f"first axis is not that of the {len(step)} rows.", "Train its stage with kind: block.",
                    )  # fmt: skip
                perturbations.append(Perturbation(target, z, args[0][:, tokens].clone()))  # may be overwritten later
                return moved(output.clone(), step, target.tokens, width.sigma)

        return hook

    handles = [target.module.register_forward_hook(hook_of(target)) for target in layers]
    try:
        yield perturbations
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def noise_shapes(network: StagedNetwork, loss: LossFunction, site: Site, clean: CleanPass) -> list[tuple[int, ...]]:
    """Shapes of a row of noise at a site, one for each of its layers; runs one row through the network."""
    shapes: list[tuple[int, ...]] = []

    def silent(_: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        shapes.append(shape)
        return like.new_zeros(len(like), *shape)

    with network.evaluating():
        perturbed_losses(network, loss, site, clean, clean.stand_ins()[:1], silent, SiteWidth(1.0))
    return shapes


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
        with network.evaluating(), uncompiled(network.module):
            for index in clean.stand_ins().split(rows):
                network.run(clean.activations[site.first].index_select(0, index), site.first, site.first + 1)
    finally:
        handle.remove()
    return torch.cat(inputs)
