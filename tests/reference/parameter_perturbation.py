"""Noise in the parameters (ES, SPSA, MeZO, forward gradients in the weights), as slowly and obviously as possible.

One sample and one query at a time, the whole network for each of them, with a whole set of moved parameters: every
direction is a full matrix. Only the normal numbers are shared with the library: they are drawn from the same keys.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from flops_lightning.network.staging import stage_network
from flops_lightning.noise.keys import NoiseKey, row_seeds, standard_normal
from flops_lightning.noise.kinds import NoiseSpec, draw_noise
from flops_lightning.strategies import SPSA, EvolutionStrategies, MeZO, Site, WeightForwardMode
from tests.reference import likelihood_ratio
from tests.reference.likelihood_ratio import mixed
from tests.reference.networks import Loss, call
from tests.reference.smoothed import flat

STRATEGIES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    **{variant: (EvolutionStrategies, {"variant": variant}) for variant in ("plain", "baseline", "leave_one_out")},
    "spsa": (SPSA, {}),
    "forward": (WeightForwardMode, {}),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "shared": {},
    "factored": {"layout": "factored"},
    "guided": {"layout": "factored", "activation_guided": True},
    "flipout": {"layout": "flipout"},
}
RANKS: dict[str, dict[str, Any]] = {
    "factored, rank 2": {**LAYOUTS["factored"], "rank": 2},
    "guided, rank 2": {**LAYOUTS["guided"], "rank": 2},
    "guided, a span of 2": {**LAYOUTS["guided"], "span": 2},
}

Direction = dict[str, Tensor]
"""By parameter name, shaped like the parameter."""


class Query(NamedTuple):
    """A loss (its derivative in forward mode) and the direction in one vector, ``-D`` in the minus row of a pair."""

    loss: float
    direction: Tensor


# Directions


def direction_of(module: nn.Module, strategy: Any, site: Site, x: Tensor, b: int, index: int, draw: int) -> Direction:
    """The direction with an index (of a query, or of an antithetic pair) of sample ``b``."""
    if getattr(strategy, "layout", "shared") in ("factored", "flipout"):
        return _factored(module, strategy, site, one(x, b), b, index, draw)
    found = {}
    for stage in strategy.network.stages:
        own = {name: p for name, p in site.parameters.items() if stage.owns(name)}
        bases = {name: basis_of(strategy, name, p, draw) for name, p in own.items()}
        sizes = [p.numel() // len(p) * bases[name].shape[1] for name, p in own.items()]
        flat = _normals(strategy, f"{site.name}/{stage.name}", 0, index, sum(sizes), draw) if own else torch.empty(0)
        for (name, p), part in zip(own.items(), flat.split(sizes), strict=True):
            found[name] = (bases[name] @ part.view(-1, p.numel() // len(p))).view(p.shape)
    return {name: found[name] for name in site.parameters}


def basis_of(strategy: Any, name: str, p: Tensor, draw: int) -> Tensor:
    """Orthonormal columns ``(m, rank)`` by Gram-Schmidt; the identity where the directions of a parameter are dense."""
    rank = strategy.rank_of_directions if getattr(strategy, "layout", "") == "subspace" else len(p)
    if p.ndim < 2 or rank >= len(p):
        return torch.eye(len(p), dtype=torch.float64)
    key = NoiseKey(strategy.seed, draw // strategy.refresh_every, f"{name}/basis")
    seeds = row_seeds(key, np.array([0]), np.array([0]))
    columns: list[Tensor] = []
    for column in standard_normal(seeds, (len(p), rank), device=torch.device("cpu"), dtype=torch.float64)[0].mT:
        rest = column - sum((column @ other) * other for other in columns)
        columns.append(rest / rest.norm())
    return torch.stack(columns, dim=1)


def _normals(strategy: Any, site: str, sample: int, index: int, size: int, draw: int) -> Tensor:
    flipout = getattr(strategy, "layout", "") == "flipout"
    noise = NoiseSpec("rademacher" if flipout else getattr(strategy, "distribution", "gaussian"))
    key, row = NoiseKey(strategy.seed, draw, site, strategy.rank), (np.array([sample]), np.array([index]))
    return draw_noise(noise, key, *row, (size,), device=torch.device("cpu"), dtype=torch.float64)[0]


def _factored(module: nn.Module, strategy: Any, site: Site, x: Tensor, b: int, index: int, draw: int) -> Direction:
    numbers = numbers_of(module, strategy, site, x)
    flat = _normals(strategy, site.name, b, index, numbers.size, draw)
    found = {name: part.matrix() for name, part in numbers.directions(flat).items()}
    if strategy.layout == "flipout":  # signs of the outputs times those of the inputs, times a matrix of all samples
        linears = [x for x in _layers(module, strategy, site) if type(module.get_submodule(x)) is nn.Linear]
        names = [f"{layer}.weight" for layer in linears if f"{layer}.weight" in found]
        sizes = [found[name].numel() for name in names]
        shared = _normals(strategy, f"{site.name}/shared", 0, index, sum(sizes), draw).split(sizes)
        found |= {name: found[name] * z.view(found[name].shape) for name, z in zip(names, shared, strict=True)}
    return found


@dataclass(frozen=True)
class Factors:
    """A factored direction of one parameter, ``sum_k a_k b_k^T / sqrt(K)``, or a dense one."""

    shape: torch.Size
    a: Tensor | None = None
    b: Tensor | None = None
    dense: Tensor | None = None

    def matrix(self) -> Tensor:
        if self.dense is not None:
            return self.dense.view(self.shape)
        terms = [torch.outer(a_k, b_k) for a_k, b_k in zip(self.a, self.b, strict=True)]
        return (sum(terms) / math.sqrt(len(terms))).view(self.shape)


@dataclass(frozen=True)
class Numbers:
    """How the normal numbers of a row of a site, in one line, make its directions.

    ``shapes`` of what is drawn, in order, by parameter and part (``b``, ``a``, or nothing for a dense direction), and
    ``(m, i)`` ``bases`` by layer, where input factors are drawn in the span of one sample's inputs.
    """

    shapes: dict[tuple[str, str], tuple[int, ...]]
    bases: dict[str, Tensor]
    parameters: dict[str, nn.Parameter]

    @property
    def size(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def directions(self, flat: Tensor) -> dict[str, Factors]:
        parts = flat.split([math.prod(shape) for shape in self.shapes.values()])
        drawn = {key: part.view(shape) for (key, shape), part in zip(self.shapes.items(), parts, strict=True)}
        return {name: self._factors(name, p, drawn) for name, p in self.parameters.items()}

    def _factors(self, name: str, p: Tensor, drawn: dict[tuple[str, str], Tensor]) -> Factors:
        if (name, "") in drawn:
            return Factors(p.shape, dense=drawn[name, ""])
        basis = self.bases.get(name.rpartition(".")[0], torch.eye(p[0].numel(), dtype=p.dtype))
        # A side that is not drawn has as many factors as entries: each factor is one of them, of length sqrt(K).
        a, b = drawn.get((name, "a")), drawn.get((name, "b"))
        b = math.sqrt(len(basis)) * torch.eye(len(basis), dtype=p.dtype) if b is None else b
        a = math.sqrt(len(p)) * torch.eye(len(p), dtype=p.dtype) if a is None else a
        return Factors(p.shape, a, b @ basis)


def numbers_of(module: nn.Module, strategy: Any, site: Site, x: Tensor) -> Numbers:
    """For one sample ``(1, ...)``: layer by layer input factors, output factors and bias, then what is no layer's."""
    layers = _layers(module, strategy, site)
    bases = _bases(module, layers, x, strategy.span) if strategy.activation_guided else {}
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    for layer in layers:
        shapes |= _shapes_of_layer(module.get_submodule(layer), layer, site, strategy.rank_of_directions, bases)
    for name in _parameters_of_no_layer(strategy, site, layers):
        shapes[name, ""] = tuple(site.parameters[name].shape)
    return Numbers(shapes, bases, site.parameters)


def _layers(module: nn.Module, strategy: Any, site: Site) -> list[str]:
    """Names of the layers whose parameters the site owns, stage by stage."""
    kinds = ("Linear", "Conv2d", "LayerNorm", "GroupNorm")
    return [
        name
        for stage in strategy.network.stages[site.first : site.last + 1]
        for name, layer in module.named_modules()
        if type(layer).__name__ in kinds and stage.owns(name) and _trained(site, name)
    ]


def _trained(site: Site, layer: str) -> list[str]:
    return [leaf for leaf in ("weight", "bias") if f"{layer}.{leaf}" in site.parameters]


def _parameters_of_no_layer(strategy: Any, site: Site, layers: Sequence[str]) -> list[str]:
    """Names in the order of the network's parameters, but those of one stage next to each other."""
    rest = [name for name in site.parameters if name.rpartition(".")[0] not in layers]
    stages = {name: next(i for i, stage in enumerate(strategy.network.stages) if stage.owns(name)) for name in rest}
    return [name for stage in dict.fromkeys(stages.values()) for name in rest if stages[name] == stage]


def _shapes_of_layer(
    layer: nn.Module, name: str, site: Site, rank: int, bases: dict[str, Tensor]
) -> dict[tuple[str, str], tuple[int, ...]]:
    shapes: dict[tuple[str, str], tuple[int, ...]] = {}
    for leaf in _trained(site, name):
        full, parameter = f"{name}.{leaf}", site.parameters[f"{name}.{leaf}"]
        if leaf == "bias" or not isinstance(layer, (nn.Linear, nn.Conv2d)):
            shapes[full, ""] = tuple(parameter.shape)
            continue
        outputs, inputs = parameter.flatten(1).shape
        inputs = len(bases[name]) if name in bases else inputs
        factors = min(rank, outputs, inputs)
        if factors < inputs:
            shapes[full, "b"] = (factors, inputs)
        if factors < outputs or factors == inputs:
            shapes[full, "a"] = (factors, outputs)
    return shapes


def _bases(module: nn.Module, layers: Sequence[str], x: Tensor, span: int) -> dict[str, Tensor]:
    """``(m, i)`` basis of the span of one sample's clean inputs at each linear and convolution."""
    found: dict[str, Tensor] = {}

    def keeper(name: str) -> Any:
        def keep(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = _basis(_vectors(layer, args[0]), span)

        return keep

    matrices = [name for name in layers if isinstance(module.get_submodule(name), (nn.Linear, nn.Conv2d))]
    handles = [module.get_submodule(name).register_forward_pre_hook(keeper(name)) for name in matrices]
    with torch.no_grad():
        stage_network(module).run(x.clone())  # a layer's inputs are those that it is given there
    for handle in handles:
        handle.remove()
    return found


def _vectors(layer: nn.Module, x: Tensor) -> Tensor:
    """``(t, i)`` what the rows of the layer's weight are multiplied with, for a batch of one."""
    if isinstance(layer, nn.Conv2d):
        return F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0].mT
    return x.reshape(-1, x.shape[-1])


def _basis(vectors: Tensor, span: int) -> Tensor:
    """The right singular vectors, the largest first, zeros beyond the rank; turned so that ``sum_k v_k sin k > 0``."""
    if not vectors.isfinite().all():
        return torch.zeros_like(vectors[: min(span or len(vectors[0]), len(vectors[0]))])
    _, lengths, basis = torch.linalg.svd(vectors, full_matrices=False)
    lengths, basis = lengths[: span or None], basis[: span or None]
    basis = torch.where((lengths > 1e-5 * lengths[0])[:, None], basis, 0.0)
    signs = (basis @ torch.arange(1, basis.shape[1] + 1, dtype=basis.dtype).sin()).sign()
    return basis * signs[:, None]


# Queries and their gradients


def one(batch: Any, b: int) -> Any:
    """Sample ``b`` of a tensor or of nested ones, as a batch."""
    return tree_map(lambda tensor: tensor[b : b + 1], batch)


def queries_of_sample(
    module: nn.Module, strategy: Any, site: Site, x: Tensor, y: Tensor, b: int, count: int, *, draw: int = 0
) -> list[Query]:
    """The first queries of one sample."""
    module.eval()
    unit, found = unit_of(strategy), []
    for q in range(count):
        d = direction_of(module, strategy, site, x, b, q // unit, draw)
        d = {name: -part for name, part in d.items()} if q % unit else d
        run = _derivative if isinstance(strategy, WeightForwardMode) else _loss
        found.append(Query(run(module, strategy.loss, one(x, b), one(y, b), d, site.sigma), flat([*d.values()])))
    return found


def unit_of(strategy: Any) -> int:
    """Queries that share a direction."""
    return int(strategy.unit)


def _loss(module: nn.Module, loss: Loss, x: Tensor, y: Tensor, d: Direction, sigma: float) -> float:
    """At ``theta + sigma D``."""
    moved = {name: p + sigma * d[name] if name in d else p for name, p in module.named_parameters()}
    with torch.no_grad():
        return loss(call(module, x, moved), y).item()


def _derivative(module: nn.Module, loss: Loss, x: Tensor, y: Tensor, d: Direction, _: float) -> float:
    """Along ``D``, from the whole gradient."""
    parameters = dict(module.named_parameters())
    with torch.enable_grad():
        value = loss(module(x.clone()), y).sum()
    found = torch.autograd.grad(value, [parameters[name] for name in d], allow_unused=True)
    return sum(float((g * d[name]).sum()) for name, g in zip(d, found, strict=True) if g is not None)


def reference_gradient(
    module: nn.Module, strategy: Any, site: Site, x: Tensor, y: Tensor, counts: Sequence[int], *,
    draw: int = 0, pilots: int = 0, pilot_weight: Sequence[float] | None = None,
) -> Direction:  # fmt: skip
    """``(1 / B) sum_b g_b`` at one site, by parameter name; arguments as in ``likelihood_ratio.reference_gradient``."""
    total = torch.zeros_like(flat([*site.parameters.values()]))
    for b, count in enumerate(counts):
        clean = _loss(module.eval(), strategy.loss, one(x, b), one(y, b), {}, 0.0)
        rows = queries_of_sample(module, strategy, site, x, y, b, pilots + count, draw=draw)
        gradient = _gradient_of_sample(rows[pilots:], clean, strategy, site)
        if pilots:
            early = _gradient_of_sample(rows[:pilots], clean, strategy, site)
            share = pilots / site.queries_per_sample if pilot_weight is None else pilot_weight[b]
            gradient = mixed(early, gradient, share)
        if gradient is not None:
            total += gradient / len(counts)
    parts = total.split([p.numel() for p in site.parameters.values()])
    return {name: part.view(p.shape) for (name, p), part in zip(site.parameters.items(), parts, strict=True)}


def reference_traces(
    module: nn.Module, strategy: Any, site: Site, x: Tensor, y: Tensor, counts: Sequence[int]
) -> Tensor:
    """``(b,)`` mean of ``w^2 (||D||^2 - 1)`` over the units that count, at least 0, times 2 for pairs; NaN without one.

    Leave-one-out weights are taken less the mean of all of the sample's, ``n`` of them, and their squares times
    ``n / (n - 1)``; a shared direction counts with the mean of its squared norm
    under its weight, ``d + 2``, ``d`` the normal numbers that it is made of.
    """
    unit, traces = unit_of(strategy), []
    for b, count in enumerate(counts):
        clean = _loss(module.eval(), strategy.loss, one(x, b), one(y, b), {}, 0.0)
        alive = _survivors(queries_of_sample(module, strategy, site, x, y, b, count), clean, strategy)
        terms = []
        for rows in (alive[i : i + unit] for i in range(0, len(alive), unit)):
            d = rows[0].direction
            shared = strategy.layout in ("shared", "subspace")
            norm = _numbers_drawn(strategy, site) + 2 if shared else float(d.square().sum())
            weight = _weight(rows, alive, clean, strategy, site)
            if _variant(strategy) == "leave_one_out":
                n = len(alive)
                weight *= (1 - 1 / n) * math.sqrt(n / max(n - 1, 1)) if n > 1 else math.nan
            terms.append(unit * weight**2 * (norm - 1))
        traces.append(max(sum(terms), 0.0) / len(terms) if terms else math.nan)
    return torch.tensor(traces, dtype=torch.float64)


def _numbers_drawn(strategy: Any, site: Site) -> int:
    """Normal numbers in a shared direction."""
    parameters = site.parameters.items()
    return sum(p.numel() // len(p) * basis_of(strategy, name, p, 0).shape[1] for name, p in parameters)


def surviving_queries(
    module: nn.Module, strategy: Any, site: Site, x: Tensor, y: Tensor, counts: Sequence[int]
) -> list[int]:
    """How many queries of each sample count, in a strategy's first draw."""
    found = []
    for b, count in enumerate(counts):
        clean = _loss(module.eval(), strategy.loss, one(x, b), one(y, b), {}, 0.0)
        found.append(len(_survivors(queries_of_sample(module, strategy, site, x, y, b, count), clean, strategy)))
    return found


assert_equals_reference = partial(likelihood_ratio.assert_equals_reference, slow=reference_gradient)
assert_gradients = partial(likelihood_ratio.assert_gradients, reference_gradient)


def _gradient_of_sample(rows: list[Query], clean: float, strategy: Any, site: Site) -> Tensor | None:
    """``g_b`` of one sample, or None if no query survived."""
    alive, unit = _survivors(rows, clean, strategy), unit_of(strategy)
    if _variant(strategy) == "leave_one_out" and len(alive) == 1:
        return None  # no other query to centre it with
    units = [alive[i : i + unit] for i in range(0, len(alive), unit)]
    terms = [_weight(pair, alive, clean, strategy, site) * pair[0].direction for pair in units]
    return torch.stack(terms).mean(0) if terms else None


def _weight(unit: list[Query], alive: list[Query], clean: float, strategy: Any, site: Site) -> float:
    """The scalar that a unit's direction is multiplied with."""
    if isinstance(strategy, WeightForwardMode):
        return unit[0].loss
    if len(unit) == 2:
        return (unit[0].loss - unit[1].loss) / (2 * site.sigma)
    others = [row.loss for row in alive if row is not unit[0]]
    control = {"plain": 0.0, "baseline": clean, "leave_one_out": sum(others) / len(others) if others else clean}
    return (unit[0].loss - control[_variant(strategy)]) / site.sigma


def _variant(strategy: Any) -> str:
    return str(getattr(strategy, "variant", "antithetic"))


def _survivors(rows: list[Query], clean: float, strategy: Any) -> list[Query]:
    lost = [not math.isfinite(row.loss) for row in rows]
    pairs = isinstance(strategy, MeZO) and unit_of(strategy) == 2
    if not pairs and _variant(strategy) != "leave_one_out":  # which know no clean loss
        lost = [gone or not math.isfinite(clean) for gone in lost]
    if unit_of(strategy) == 2:
        lost = [lost[q - q % 2] or lost[q - q % 2 + 1] for q in range(len(rows))]
    return [row for row, gone in zip(rows, lost, strict=True) if not gone]
