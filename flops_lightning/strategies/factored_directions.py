"""The ``factored`` noise layout: every row has its own low-rank direction on every linear and convolution.

Rows stay one plain batched forward pass with a small product beside each layer (:mod:`row_layers`), and directions
are independent across samples and queries, which is what FLOPS, theorem 1 (its eq. 20) assumes. Biases, the
parameters of norms and all others get a dense direction a row.

``guided`` draws the input factors in the span of the layer's own clean inputs (AGZO, arXiv 2601.17261), where the
sample's gradient lies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.noise.activation_guided import input_basis
from flops_lightning.noise.keys import NoiseKey, row_seeds, standard_normal
from flops_lightning.noise.row_directions import (
    RowDirection,
    accumulate,
    direction_size,
    has_row_directions,
    row_direction,
    sq_norm,
)
from flops_lightning.phases import phase
from flops_lightning.queries import Chunk, CleanPass, LossFunction, RowPlan, full_precision, row_losses
from flops_lightning.strategies.base import summed
from flops_lightning.strategies.forward_derivatives import plain_attention
from flops_lightning.strategies.parameter_queries import Evaluated
from flops_lightning.strategies.replaced_parameters import ReplacedParameters
from flops_lightning.strategies.row_layers import moved_output
from flops_lightning.strategies.sites import Site

Bases = dict[str, Tensor]
"""``(b, m, i)`` by name of the layer."""
Directions = dict[str, RowDirection]
"""By name of the layer, or of a parameter without one (its ``weight``)."""


@dataclass(eq=False)
class _Now:
    """What the hooks of the layers read while a stage runs."""

    directions: Directions = field(default_factory=dict)
    sigma: Tensor = field(default_factory=lambda: torch.zeros(()))
    overwrite: bool = False


@dataclass(frozen=True, eq=False)
class TrainedLayer:
    """A layer and which of its parameters a site teaches (leaf names)."""

    name: str
    module: nn.Module
    trained: frozenset[str]

    @property
    def has_matrix(self) -> bool:
        """Whether its weight gets a low-rank direction."""
        return "weight" in self.trained and isinstance(self.module, (nn.Linear, nn.Conv2d))


@dataclass(frozen=True, eq=False)
class SiteParts:
    """How a site's parameters are moved.

    Attributes:
        layers: In the order of the network.
        others: Names of the parameters that belong to no such layer (class token, position embedding, prompts, ...), by
            stage. They get a dense direction a row, and their stage is run row by row (``torch.func.vmap``).
    """

    layers: list[TrainedLayer]
    others: dict[int, list[str]]


def site_parts(network: StagedNetwork, site: Site) -> SiteParts:
    """The layers of a site with directions by row, and its other parameters.

    Raises:
        SettingError: a layer shares a parameter with another module.
    """
    layers: list[TrainedLayer] = []
    rest = list(site.parameters)
    holders = Counter(id(p) for module in network.module.modules() for p in module.parameters(recurse=False))
    for stage in range(site.first, site.last + 1):
        for name, module in network.modules_of(stage):
            own = dict(module.named_parameters(recurse=False))
            mine = {leaf: full for leaf, p in own.items() for full, q in site.parameters.items() if p is q}
            if not mine or not has_row_directions(module):
                continue
            tied = [full for leaf, full in mine.items() if holders[id(own[leaf])] > 1]
            if tied:
                raise SettingError(
                    "strategy.layout", "factored", f"moves layers one by one, and {tied[0]!r} belongs to two modules.",
                    f"Freeze it (freeze: {tied}), or write layout: shared.",
                )  # fmt: skip
            layers.append(TrainedLayer(name, module, frozenset(mine)))
            rest = [full for full in rest if full not in mine.values()]
    others: dict[int, list[str]] = {}
    for name in rest:
        stage = next(i for i in range(site.first, site.last + 1) if network.stages[i].owns(name))
        others.setdefault(stage, []).append(name)
    return SiteParts(layers, others)


@dataclass(frozen=True, eq=False)
class FactoredDirections:
    """Lays factored directions over rows; see :class:`DirectionLayout`.

    Attributes:
        network: The staged network.
        replaced: Runs its stages with other parameters.
        parts: The parts of each site, by its name.
        loss: One loss a row.
        key: Seed and rank of the noise.
        unit: 2: rows ``2p`` and ``2p + 1`` of a sample take ``+D_p`` and ``-D_p``.
        rank: Largest rank ``K`` of a direction.
        guided: Input factors in the span of the layer's inputs.
        span: Guided: only so many leading directions of the span (biased); 0: all of it.
        chunk_rows: Upper bound of samples in the pass that fetches the inputs.
        forward_mode: Derivatives along the directions instead of losses.
    """

    network: StagedNetwork
    replaced: ReplacedParameters
    parts: dict[str, SiteParts]
    loss: LossFunction
    key: NoiseKey
    unit: int
    rank: int
    guided: bool
    span: int
    chunk_rows: int
    forward_mode: bool = False

    def evaluate(self, site: Site, clean: CleanPass, plan: RowPlan, *, traces: bool) -> Evaluated:
        """Run chunk by chunk."""
        bases = self._bases(site, clean) if self.guided else {}
        losses, norms = [], []
        for chunk in plan:
            index = torch.from_numpy(chunk.samples).to(clean.loss.device)
            with phase("noise"):
                directions = self._directions(site, clean, chunk, index, bases)
            if traces:
                norms.append(torch.stack([sq_norm(d) for d in directions.values()]).sum(0)[: chunk.rows])
            with phase("suffix"):
                losses.append(self._run(site, clean, chunk, index, directions)[: chunk.rows])
        return Evaluated(torch.cat(losses), torch.cat(norms) if norms else 1.0, bases)

    def _run(self, site: Site, clean: CleanPass, chunk: Chunk, index: Tensor, directions: Directions) -> Tensor:
        """``(r,)`` losses of a chunk's rows (forward mode: derivatives); ``directions`` are used up."""
        targets, signs = clean.targets.index_select(0, index), self._signs(chunk, clean.loss)

        def moved(sigma: Tensor) -> Tensor:
            # A copy made here, since a stage may work in place, and only on what the derivative knows of.
            return self._moved(site, clean.activations[site.first].index_select(0, index), directions, sigma)

        if self.forward_mode:

            def losses(sigma: Tensor) -> Tensor:
                return row_losses(self.loss, self.network.run(moved(sigma), site.last + 1), targets)

            zero = torch.zeros_like(signs)
            with plain_attention():
                return torch.func.jvp(losses, (zero,), (signs,))[1]
        leaving = [moved(site.sigma * signs)]
        # Memory, while the suffix runs: directions are drawn again for the gradient, and it alone holds its input.
        directions.clear()
        return row_losses(self.loss, self.network.run_suffix(leaving.pop(), site.last + 1), targets)

    def _signs(self, chunk: Chunk, like: Tensor) -> Tensor:
        return torch.from_numpy(1.0 - 2.0 * (chunk.queries % self.unit)).to(like)

    def _moved(self, site: Site, h: Tensor, directions: Directions, sigma: Tensor) -> Tensor:
        """Output of the site at the rows' own parameters, ``sigma`` ``(r,)``."""
        others = self.parts[site.name].others
        with self._hooks(site) as now:
            for i in range(site.first, site.last + 1):
                if i in others:
                    h = self._row_by_row(i, h, directions, sigma, others[i], now)
                else:
                    # Transforms of torch.func (derivatives, rows one by one) know only what is not in place.
                    now.directions, now.sigma, now.overwrite = directions, sigma, not self.forward_mode
                    h = self.network.run(h, i, i + 1)
        return h

    def _row_by_row(
        self, stage: int, h: Tensor, directions: Directions, sigma: Tensor, names: list[str], now: _Now
    ) -> Tensor:
        def run(one: Tensor, own: dict[str, dict[str, Tensor]], width: Tensor) -> Tensor:
            now.directions = {
                name: RowDirection(**{leaf: part[None] for leaf, part in parts.items()}) for name, parts in own.items()
            }
            now.sigma, now.overwrite = width[None], False
            clean = {name: self.network.module.get_parameter(name) for name in names}
            values = {name: (p + width * own[name]["weight"]).to(p.dtype) for name, p in clean.items()}
            return self.replaced.run(stage, one[None], values)[0]

        parts = {name: {leaf: p for leaf, p in vars(d).items() if p is not None} for name, d in directions.items()}
        output: Tensor = torch.func.vmap(run)(h, parts, sigma)
        return output

    @contextmanager
    def _hooks(self, site: Site) -> Iterator[_Now]:
        """Layers answer with their moved outputs while the context lasts; each must run once."""
        ran: dict[str, int] = {}
        now = _Now()

        def hook_of(layer: TrainedLayer) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
                ran[layer.name] = ran.get(layer.name, 0) + 1
                x = _layer_input(layer.name, args, len(now.sigma))
                direction = now.directions[layer.name]
                return moved_output(module, x, output, direction, now.sigma, overwrite=now.overwrite)

            return hook

        layers = self.parts[site.name].layers
        handles = [layer.module.register_forward_hook(hook_of(layer)) for layer in layers]
        try:
            yield now
        finally:
            for handle in handles:
                handle.remove()
        wrong = [layer.name for layer in layers if ran.get(layer.name) != 1]
        if wrong:
            raise SettingError(
                "strategy.layout", "factored", f"{wrong[0]} did not run exactly once in the forward pass.",
                "Freeze it, or write layout: shared.",
            )  # fmt: skip

    def _directions(self, site: Site, clean: CleanPass, chunk: Chunk, index: Tensor, bases: Bases) -> Directions:
        """One drawing a row for the whole site; the rows of an antithetic pair share it."""
        layers = self.parts[site.name].layers
        others = [name for names in self.parts[site.name].others.values() for name in names]
        sizes = [
            direction_size(each.module, each.trained, self.rank, basis_size=bases[each.name].shape[1])
            if each.name in bases
            else direction_size(each.module, each.trained, self.rank)
            for each in layers
        ]
        key = replace(self.key, draw=clean.draw, site=site.name)
        first = slice(None, None, self.unit)
        seeds = row_seeds(key, chunk.samples[first], chunk.queries[first] // self.unit)
        sizes += [site.parameters[name].numel() for name in others]
        like = next(iter(site.parameters.values()))
        flat = standard_normal(seeds, (sum(sizes),), device=like.device, dtype=like.dtype)
        flat = flat.repeat_interleave(self.unit, 0) if self.unit > 1 else flat
        directions, parts = {}, flat.split(sizes, 1)
        for layer, part in zip(layers, parts, strict=False):
            basis = bases[layer.name].index_select(0, index) if layer.name in bases else None
            directions[layer.name] = row_direction(layer.module, layer.trained, self.rank, part, basis)
        for name, part in zip(others, parts[len(layers) :], strict=True):
            directions[name] = RowDirection(weight=part.view(-1, *site.parameters[name].shape))
        return directions

    def gradient(
        self, site: Site, clean: CleanPass, plan: RowPlan, coefficients: Tensor, kept: Any
    ) -> dict[str, Tensor]:
        """``sum_r c_r D_r`` by parameter name, one product a layer and chunk."""
        total: dict[str, Tensor] = {}
        start = 0
        for chunk in plan:
            index = torch.from_numpy(chunk.samples).to(coefficients.device)
            signed = coefficients[start : start + chunk.rows] * self._signs(chunk, coefficients)[: chunk.rows]
            signed = torch.nn.functional.pad(signed, (0, len(chunk.samples) - chunk.rows))
            with phase("noise"):
                directions = self._directions(site, clean, chunk, index, kept)
            sums = {
                f"{layer.name}.{leaf}": gradient
                for layer in self.parts[site.name].layers
                for leaf, gradient in accumulate(layer.module, directions[layer.name], signed).items()
            }
            for name in (name for names in self.parts[site.name].others.values() for name in names):
                dense = directions[name].dense()
                with full_precision(dense):
                    sums[name] = torch.tensordot(signed.to(dense.dtype), dense, dims=1)
            total = summed([total, sums])
            start += chunk.rows
        return total

    @torch.no_grad()
    def _bases(self, site: Site, clean: CleanPass) -> Bases:
        """Bases of the spans of all samples' inputs; costs one clean pass through the site."""
        found: dict[str, list[Tensor]] = {}

        def hook_of(layer: TrainedLayer) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
                x = _layer_input(layer.name, args, len(index))
                found.setdefault(layer.name, []).append(_oriented(input_basis(module, x, self.span)))

            return hook

        layers = [layer for layer in self.parts[site.name].layers if layer.has_matrix]
        handles = [layer.module.register_forward_pre_hook(hook_of(layer)) for layer in layers]
        try:
            for index in clean.stand_ins().split(self.chunk_rows):
                self.network.run(clean.activations[site.first].index_select(0, index), site.first, site.last + 1)
        finally:
            for handle in handles:
                handle.remove()
        return {name: torch.cat(parts) for name, parts in found.items()}


def _layer_input(layer: str, args: tuple[Any, ...], rows: int) -> Tensor:
    """The input of a layer, one line a row.

    Raises:
        SettingError: the layer is called by keyword, or its first dimension is not that of the rows.
    """
    if not args or len(args[0]) != rows:
        raise SettingError(
            "strategy.layout", "factored", f"{layer} is called by keyword, or its first dimension is not the batch.",
            "Freeze it, or write layout: shared.",
        )  # fmt: skip
    x: Tensor = args[0]
    return x


def _oriented(basis: Tensor) -> Tensor:
    """The basis ``(b, m, i)`` with signs of its own: an eigenvector has either, and rounding chooses.

    The last bits of a layer's input depend on how many samples ran beside it; directions must not.
    """
    compass = torch.arange(1, basis.shape[2] + 1, dtype=basis.dtype, device=basis.device).sin()
    with full_precision(basis):
        return torch.where((basis @ compass < 0)[:, :, None], -basis, basis)
