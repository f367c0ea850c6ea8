"""The ``factored`` noise layout: every row has its own low-rank direction on every linear and convolution.

Rows stay one plain batched forward pass with a small product beside each layer (:mod:`row_layers`), and directions are
independent across samples and queries, as FLOPS, theorem 1 (its eq. 20) assumes. Biases, the parameters of norms and
all others get a dense direction a row.

``guided`` draws the input factors in the span of the layer's own clean inputs (AGZO, arXiv 2601.17261), where the
sample's gradient lies.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.network.calls import replaced, uncompiled
from flops_lightning.network.rows import gather
from flops_lightning.noise.activation_guided import input_basis
from flops_lightning.noise.kinds import NoiseSpec, draw_noise
from flops_lightning.noise.row_directions import RowDirection, accumulate, direction_size, row_direction, sq_norm
from flops_lightning.phases import phase
from flops_lightning.queries import Chunk, CleanPass, RowPlan, full_precision
from flops_lightning.strategies.engine import summed
from flops_lightning.strategies.parameter_queries import DirectionLayout, RowResponses
from flops_lightning.strategies.row_layers import RowLayer, SiteParts, moved_output, row_remedy, times
from flops_lightning.strategies.sites import Site
from flops_lightning.transfers import to_device

Bases = dict[str, Tensor]
"""``(b, m, i)`` by name of the layer."""
Directions = dict[str, RowDirection]
"""By name of the layer, or of a parameter without one (its ``weight``)."""


@dataclass(eq=False)
class _Move:
    """What the layers read while a stage runs."""

    directions: Directions = field(default_factory=dict)
    sigma: Tensor = field(default_factory=lambda: torch.zeros(()))
    overwrite: bool = False


@dataclass(frozen=True, eq=False)
class FactoredDirections(DirectionLayout):
    """Lays factored directions over rows.

    Attributes:
        parts: The parts of each site, by its name.
        rank: Largest rank ``K`` of a direction.
        guided: Draw input factors in the span of the layer's inputs.
        span: Number of leading directions of that span to keep (biased); 0: all.
        layout: The setting, for errors: ``shared`` where a site alone has directions of its own.
    """

    parts: dict[str, SiteParts]
    rank: int
    guided: bool
    span: int
    layout: str
    noise: ClassVar[NoiseSpec] = NoiseSpec()

    def chunks(self, plan: RowPlan) -> Iterator[tuple[NDArray[np.int64], Chunk]]:
        """Chunks, and the places of their rows in the plan."""
        start = 0
        for chunk in plan:
            yield np.arange(start, start + chunk.rows), chunk
            start += chunk.rows

    def run(self, site: Site, clean: CleanPass, plan: RowPlan, *, traces: bool) -> RowResponses:
        """Run chunk by chunk."""
        bases = self._bases(site, clean) if self.guided else {}
        values, norms, places = [], [], []
        for at, chunk in self.chunks(plan):
            places.append(to_device(at, clean.loss.device))
            index = to_device(chunk.samples, clean.loss.device)
            with phase("noise"):
                directions = self._directions(site, clean, chunk, index, bases)
            if traces:
                norms.append(torch.stack([sq_norm(d) for d in directions.values()]).sum(0)[: chunk.rows])
            losses = partial(self._losses, site, clean, index, chunk.samples, directions)
            with phase("suffix"):
                signs = self.signs(chunk.queries, clean.loss)
                values.append(self.response.values(losses, site.sigma, signs)[: chunk.rows])
        order = torch.cat(places)

        def in_order(parts: list[Tensor]) -> Tensor:
            found = torch.cat(parts)
            return torch.empty_like(found).index_copy_(0, order, found)

        return RowResponses(in_order(values), in_order(norms) if norms else 1.0, bases)

    def _losses(
        self, site: Site, clean: CleanPass, index: Tensor, samples: NDArray[np.int64], directions: Directions,
        sigma: Tensor,
    ) -> Tensor:  # fmt: skip
        """``(r,)`` losses of rows at their sigmas ``(r,)``, or what else they give; ``directions`` are used up.

        ``index`` ``(r,)`` are the places of the rows' samples, ``samples`` the same on the host.
        """
        # A copy made here, since a stage may work in place, and only on what a derivative knows of.
        leaving = [self._moved(site, clean.activations[site.first].index_select(0, index), directions, sigma)]
        # Memory, while the suffix runs: directions are drawn again for the gradient, and it alone holds its input.
        directions.clear()
        return self.read(leaving.pop(), site.last + 1, gather(clean.targets, index, samples))

    def _moved(self, site: Site, h: Tensor, directions: Directions, sigma: Tensor) -> Tensor:
        """Output of the site at the rows' own parameters, ``sigma`` ``(r,)``."""
        others = self.parts[site.name].others
        with self._moving(site) as move:
            for i in range(site.first, site.last + 1):
                if i in others:
                    h = self._row_by_row(i, h, directions, sigma, others[i], move)
                else:
                    # Transforms of torch.func (derivatives, rows one by one) know only what is not in place.
                    move.directions, move.sigma, move.overwrite = directions, sigma, self.response.in_place
                    h = self.network.run(h, i, i + 1)
        return h

    def _row_by_row(
        self, stage: int, h: Tensor, directions: Directions, sigma: Tensor, names: Sequence[str], move: _Move
    ) -> Tensor:
        clean = {name: self.network.module.get_parameter(name) for name in names}
        if self.network.stages[stage].by_row:
            moves = {name: times(cast("Tensor", directions[name].weight), sigma) for name in names}
            return self.stages.run(stage, h, {name: (p + moves[name]).to(p.dtype) for name, p in clean.items()})

        def run(one: Tensor, own: dict[str, dict[str, Tensor]], width: Tensor) -> Tensor:
            move.directions = {
                name: RowDirection(**{leaf: part[None] for leaf, part in parts.items()}, shared=directions[name].shared)
                for name, parts in own.items()
            }
            move.sigma, move.overwrite = width[None], False
            values = {name: (p + width * own[name]["weight"]).to(p.dtype) for name, p in clean.items()}
            return self.stages.run(stage, one[None], values)[0]

        of_rows = {name: replace(d, shared=None) for name, d in directions.items()}
        parts = {name: {leaf: p for leaf, p in vars(d).items() if p is not None} for name, d in of_rows.items()}
        output: Tensor = torch.func.vmap(run)(h, parts, sigma)
        return output

    @contextmanager
    def _moving(self, site: Site) -> Iterator[_Move]:
        """Layers return their moved outputs while the context lasts; each must run exactly once."""
        layers = self.parts[site.name].layers
        runs = dict.fromkeys((layer.name for layer in layers), 0)
        move = _Move()

        def moved_forward(layer: RowLayer) -> Any:
            forward = layer.module.forward

            def run(*args: Any, **kwargs: Any) -> Tensor:
                output = forward(*args, **kwargs)
                runs[layer.name] += 1
                x = self._layer_input(layer.name, args, len(move.sigma))
                direction = move.directions[layer.name]
                return moved_output(layer.module, x, output, direction, move.sigma, overwrite=move.overwrite)

            return run

        forwards = ((layer.module, moved_forward(layer)) for layer in layers)
        with replaced(forwards), uncompiled(self.network.module):
            yield move
        for name, number in runs.items():
            if number != 1:
                raise self._unsuitable(f"{name} did not run exactly once in the forward pass.")

    def _directions(self, site: Site, clean: CleanPass, chunk: Chunk, index: Tensor, bases: Bases) -> Directions:
        """One drawing a row for the whole site; the rows of an antithetic pair share it."""
        layers, others = self.parts[site.name].layers, self.parts[site.name].names
        own_bases = {name: basis.index_select(0, index) for name, basis in bases.items()}
        spans = {name: basis.shape[1] for name, basis in own_bases.items()}
        sizes = [direction_size(x.module, x.trained, self.rank, basis_size=spans.get(x.name, 0)) for x in layers]
        sizes += [site.parameters[name].numel() for name in others]
        key = replace(self.key, draw=clean.draw, site=site.name)
        first = slice(None, None, self.unit)
        rows, like = (chunk.samples[first], chunk.queries[first] // self.unit), next(iter(site.parameters.values()))
        flat = draw_noise(self.noise, key, *rows, (sum(sizes),), device=like.device, dtype=like.dtype)
        flat = flat.repeat_interleave(self.unit, 0) if self.unit > 1 else flat
        parts = flat.split(sizes, 1)
        directions = {
            layer.name: row_direction(layer.module, layer.trained, self.rank, part, own_bases.get(layer.name))
            for layer, part in zip(layers, parts, strict=False)
        }
        for name, part in zip(others, parts[len(layers) :], strict=True):
            directions[name] = RowDirection(weight=part.view(-1, *site.parameters[name].shape))
        return directions

    def gradient(
        self, site: Site, clean: CleanPass, plan: RowPlan, coefficients: Tensor, kept: Any
    ) -> dict[str, Tensor]:
        """``sum_r c_r D_r`` by parameter name, one product a layer and chunk."""
        total: dict[str, Tensor] = {}
        for at, chunk in self.chunks(plan):
            index = to_device(chunk.samples, coefficients.device)
            signs = self.signs(chunk.queries, coefficients)[: chunk.rows]
            signed = coefficients[to_device(at, coefficients.device)] * signs
            signed = torch.nn.functional.pad(signed, (0, len(chunk.samples) - chunk.rows))
            with phase("noise"):
                directions = self._directions(site, clean, chunk, index, kept)
            sums = {
                f"{layer.name}.{leaf}": gradient
                for layer in self.parts[site.name].layers
                for leaf, gradient in accumulate(layer.module, directions[layer.name], signed).items()
            }
            for name in self.parts[site.name].names:
                dense = cast("Tensor", directions[name].weight)
                with full_precision(dense):
                    sums[name] = torch.tensordot(signed.to(dense.dtype), dense, dims=1)
            total = summed([total, sums])
        return total

    @torch.no_grad()
    def _bases(self, site: Site, clean: CleanPass) -> Bases:
        """Bases of the spans of all samples' inputs; costs one clean pass through the site."""
        found: dict[str, list[Tensor]] = {}

        def hook_of(layer: RowLayer) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                x = self._layer_input(layer.name, args, len(index))
                found.setdefault(layer.name, []).append(_oriented(input_basis(module, x, self.span)))

            return hook

        with ExitStack() as handles:
            handles.enter_context(uncompiled(self.network.module))
            for layer in self.parts[site.name].layers:
                if layer.has_matrix:
                    handles.callback(layer.module.register_forward_pre_hook(hook_of(layer)).remove)
            for index in clean.stand_ins().split(self.chunk_rows):
                self.network.run(clean.activations[site.first].index_select(0, index), site.first, site.last + 1)
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _layer_input(self, layer: str, args: tuple[Any, ...], rows: int) -> Tensor:
        """The input of a layer, one line a row."""
        if not args or len(args[0]) != rows:
            raise self._unsuitable(f"{layer} is called by keyword, or its first dimension is not the batch.")
        x: Tensor = args[0]
        return x

    def _unsuitable(self, problem: str) -> SettingError:
        remedy = f"Freeze it, or {row_remedy(self.layout)}"
        return SettingError("model.strategy.layout", self.layout, problem, remedy)


def _oriented(basis: Tensor) -> Tensor:
    """The basis ``(b, m, i)`` with signs of its own: an eigenvector has either, and rounding chooses.

    The last bits of a layer's input depend on how many samples ran beside it; directions must not.
    """
    compass = torch.arange(1, basis.shape[2] + 1, dtype=basis.dtype, device=basis.device).sin()
    with full_precision(basis):
        return torch.where((basis @ compass < 0)[:, :, None], -basis, basis)
