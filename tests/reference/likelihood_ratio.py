"""The likelihood-ratio estimator of FLOPS (Ren et al., ICLR 2025), eq. 1, as slowly and obviously as possible.

One sample and one query at a time, the whole network for each of them, losses kept in lists, the Jacobian by autograd.
Only the noise itself is shared with the library: it is drawn from the same keys.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flops_lightning.noise.keys import NoiseKey
from flops_lightning.noise.kinds import draw_noise
from flops_lightning.protocol import TraceObservation
from flops_lightning.strategies import LikelihoodRatio, Site
from tests.reference.networks import Loss, estimated, gradients, stage_output

SlowGradient = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True)
class Place:
    """A module whose output moves, the tokens that do (None: all), and its name in the noise keys."""

    name: str
    module: nn.Module
    tokens: slice | None

    def active(self, tensor: Tensor) -> Tensor:
        return tensor if self.tokens is None else tensor[:, self.tokens]


@dataclass(frozen=True)
class Query:
    """Loss of one perturbed forward pass (its derivative where sigma is 0), and by place the noise and the input."""

    loss: float
    noise: dict[str, Tensor]
    inputs: dict[str, Tensor]


def places_of(module: nn.Module, strategy: LikelihoodRatio, site: Site) -> list[Place]:
    """Where a site puts noise."""
    if site.layers:
        return [Place(target.name, target.module, target.tokens) for target in site.layers]
    stage = strategy.network.stages[site.last].name
    return [Place(site.name, stage_output(module, stage), site.tokens)]


def in_parameter_space(site: Site) -> bool:
    """Whether traces of the site are those of its parameters' gradient: one ``nn.Linear`` whose weight is trained."""
    linear = len(site.layers) == 1 and isinstance(site.layers[0].module, nn.Linear)
    return linear and any(name.endswith("weight") for name in site.parameters)


def reference_gradient(
    module: nn.Module, strategy: LikelihoodRatio, site: Site, x: Tensor, y: Tensor, counts: Sequence[int], *,
    draw: int = 0, pilots: int = 0, pilot_weight: Sequence[float] | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """``(1 / B) sum_b J_b^T delta_b`` at one site, by parameter name; settings alone are read from the strategy.

    ``counts`` are the queries of each sample after the ``pilots``, which share the mean with a fixed weight (None:
    their share of the site's budget).
    """
    places = places_of(module, strategy, site)
    sigma = strategy.widths[site.name].sigma
    module.eval()
    total = {name: torch.zeros_like(p) for name, p in site.parameters.items()}
    for b in range(len(x)):
        clean = _loss(module, strategy.loss, x[b : b + 1], y[b : b + 1])
        rows = queries_of_sample(module, strategy, site, x, y, b, pilots + counts[b], draw=draw)
        if len(places) > 1:
            _add_rows(total, site, places, rows, clean, strategy.variant)
            continue
        (place,) = places
        delta = _delta(rows[pilots:], clean, place, sigma, strategy.variant)
        if pilots:
            early = _delta(rows[:pilots], clean, place, sigma, strategy.variant)
            share = pilots / site.queries_per_sample if pilot_weight is None else pilot_weight[b]
            delta = mixed(early, delta, share)
        if delta is not None:
            _add_vjp(total, module, place, site.parameters, x[b : b + 1], delta)
    return {name: gradient / len(x) for name, gradient in total.items()}


def reference_traces(
    module: nn.Module, strategy: LikelihoodRatio, site: Site, x: Tensor, y: Tensor, counts: Sequence[int], *,
    in_parameters: bool, draw: int = 0, pilots: int = 0,
) -> Tensor:  # fmt: skip
    """``(b,)`` traces of the covariance of one query's gradient at one site, NaN without queries.

    The gradient of every query (under antithetic: of every pair, whose trace counts twice) is built, and the sample
    variance of each of its entries summed (``in_parameters``: of the site, else in its activation). A single one has
    none, and counts by its square, ``d + 2`` parts of which ``d + 1`` are noise in ``d`` dimensions. Leave-one-out
    queries are centred by the clean loss here: with each other they would not be independent.
    """
    (place,) = places_of(module, strategy, site)
    variant = "baseline" if strategy.variant == "leave_one_out" else strategy.variant
    unit = 2 if variant == "antithetic" else 1
    found = []
    for b, count in enumerate(counts):
        clean = _loss(module, strategy.loss, x[b : b + 1], y[b : b + 1])
        rows = queries_of_sample(module, strategy, site, x, y, b, pilots + count, draw=draw)[pilots:]
        alive = _survivors(rows, clean, variant)
        units = []
        for i in range(0, len(alive), unit):
            gradient = _delta(alive[i : i + unit], clean, place, strategy.widths[site.name].sigma, variant)
            d = gradient.numel()
            if in_parameters:
                total = {name: torch.zeros_like(p) for name, p in site.parameters.items()}
                _add_vjp(total, module, place, site.parameters, x[b : b + 1], gradient)
                gradient = torch.cat([g.flatten() for g in total.values()])
            units.append(gradient.flatten())
        spread = unit * torch.stack(units).var(0).sum() if len(units) > 1 else torch.tensor(math.nan)
        if len(units) == 1 and strategy.variant != "leave_one_out":
            spread = unit * units[0].square().sum() * (d + 1) / (d + 2)
        found.append(spread.to(x))
    return torch.stack(found)


def queries_of_sample(
    module: nn.Module, strategy: LikelihoodRatio, site: Site, x: Tensor, y: Tensor, b: int, count: int, *, draw: int = 0
) -> list[Query]:
    """The first queries of one sample."""
    module.eval()
    places = places_of(module, strategy, site)
    return [_query(module, strategy, site, places, x, y, b, q, draw) for q in range(count)]


def surviving_queries(
    module: nn.Module, strategy: LikelihoodRatio, site: Site, x: Tensor, y: Tensor, counts: Sequence[int]
) -> list[int]:
    """How many queries of each sample count, in a strategy's first draw."""
    alive = []
    for b in range(len(x)):
        rows = queries_of_sample(module, strategy, site, x, y, b, counts[b])
        clean = _loss(module, strategy.loss, x[b : b + 1], y[b : b + 1])
        alive.append(len(_survivors(rows, clean, strategy.variant)))
    return alive


def assert_equals_reference(
    module: nn.Module, strategy: Any, x: Tensor, y: Tensor, table: Tensor, *, slow: SlowGradient = reference_gradient
) -> None:
    """Compare every gradient of one estimate with the slow one."""
    draw = strategy.draw
    _, found = estimated(strategy, x.clone(), y, table)  # the network may work in place
    assert_gradients(slow, module, strategy, x, y, table, found, draw=draw)


def assert_seen(module: nn.Module, strategy: LikelihoodRatio, x: Tensor, y: Tensor, table: Tensor) -> TraceObservation:
    """Estimate once with traces and once without: the traces are the reference's and the gradients the same bits."""
    clean = strategy.clean_pass(x, y)
    piloted = strategy.pilots.names(strategy.sites)
    strategy.pilot_traces(clean)
    estimate = strategy.estimate(clean, table, traces=True)
    watched = gradients(module)
    seen = estimate.observation
    unwatched = strategy.estimate(clean, table)
    assert unwatched.observation is None
    torch.testing.assert_close(gradients(module), watched, rtol=0, atol=0)
    assert seen.unit == (2 if strategy.variant == "antithetic" else 1)
    assert seen.trace.shape == seen.queries.shape == (len(strategy.sites), len(x))
    for s, counts in enumerate(table.expand(len(strategy.sites), -1).tolist()):
        site = strategy.sites[s]
        expected = reference_traces(
            module, strategy, site, x, y, counts, in_parameters=in_parameter_space(site),
            draw=clean.draw, pilots=strategy.pilots.queries if site.name in piloted else 0,
        )  # fmt: skip
        few = torch.tensor(counts) < (2 if strategy.variant == "leave_one_out" else 1)
        assert torch.equal(seen.trace[s].isnan(), few), "known where there are queries"
        torch.testing.assert_close(seen.trace[s], expected, rtol=1e-9, atol=1e-9, equal_nan=True)
        assert seen.queries[s].tolist() == counts
    return seen


def assert_gradients(
    slow: SlowGradient, module: nn.Module, strategy: Any, x: Tensor, y: Tensor, table: Tensor,
    found: dict[str, Tensor | None], **reference: Any,
) -> None:  # fmt: skip
    """Compare gradients with those of a ``slow`` reference, site by site."""
    found = dict(found)
    for site, counts in zip(strategy.sites, table.expand(len(strategy.sites), -1).tolist(), strict=True):
        for name, gradient in slow(module, strategy, site, x, y, counts, **reference).items():
            actual = found.pop(name)
            if actual is None:  # the site lost everything and left `.grad` alone
                assert not gradient.any(), name
            else:
                torch.testing.assert_close(actual, gradient, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    assert all(gradient is None for gradient in found.values()), "a parameter without a site got a gradient"


def _loss(module: nn.Module, loss: Loss, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return loss(module(x.clone()), y).item()  # the network may work in place


def _query(
    module: nn.Module, strategy: LikelihoodRatio, site: Site, places: list[Place], x: Tensor, y: Tensor,
    b: int, q: int, draw: int,
) -> Query:  # fmt: skip
    noise: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    width = strategy.widths[site.name].sigma
    sigma = torch.tensor(width, dtype=torch.float64, requires_grad=width == 0)

    def mover(place: Place) -> Callable[..., Tensor]:
        def move(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            site_key = f"{site.name}/{place.name}" if site.layers else site.name
            z = _noise(site_key, place.active(output)[0].shape, strategy, b, q, draw)
            r = _relative_width(strategy, site, z)
            noise[place.name], inputs[place.name] = z / r, args[0].detach().clone()
            moved = output.clone()
            place.active(moved)[0] += sigma * r * z
            return moved

        return move

    with ExitStack() as stack:
        for place in places:
            handle = place.module.register_forward_hook(mover(place))
            stack.callback(handle.remove)
        if width:
            return Query(_loss(module, strategy.loss, x[b : b + 1], y[b : b + 1]), noise, inputs)
        loss = strategy.loss(module(x[b : b + 1].clone()), y[b : b + 1]).sum()
    return Query(torch.autograd.grad(loss, sigma)[0].item(), noise, inputs)


def _noise(site_key: str, shape: torch.Size, strategy: LikelihoodRatio, b: int, q: int, draw: int) -> Tensor:
    key = NoiseKey(strategy.seed, draw, site_key, strategy.rank)
    antithetic = strategy.variant == "antithetic"
    row = np.array([b]), np.array([q // 2 if antithetic else q])
    z = draw_noise(strategy.noise, key, *row, tuple(shape), device=torch.device("cpu"), dtype=torch.float64)[0]
    return -z if antithetic and q % 2 == 1 else z


def _relative_width(strategy: LikelihoodRatio, site: Site, z: Tensor) -> Tensor:
    """Beside the noise ``z`` of a row, ``(t, d)`` or a feature map ``(c, h, w)``, the relative width of each token."""
    relative = strategy.widths[site.name].relative
    if relative is None:
        return torch.ones_like(z)
    spread = torch.empty_like(z)
    for t, width in enumerate(relative.tolist()):
        spread[t if z.dim() == 2 else (slice(None), t // z.shape[2], t % z.shape[2])] = width
    return spread


def _delta(rows: list[Query], clean: float, place: Place, sigma: float, variant: str) -> Tensor | None:
    """``delta_b`` of one sample at a single place, or None if no query survived."""
    alive = _survivors(rows, clean, variant)
    if variant == "antithetic":
        pairs = zip(alive[::2], alive[1::2], strict=True)
        terms = [(plus.loss - minus.loss) * plus.noise[place.name] / (2 * sigma) for plus, minus in pairs]
    elif variant == "leave_one_out" and len(alive) == 1:
        terms = []  # no other query to centre it with
    else:
        terms = [_weight(row, _control(row, alive, clean, variant), sigma) * row.noise[place.name] for row in alive]
    return torch.stack(terms).mean(0) if terms else None


def _survivors(rows: list[Query], clean: float, variant: str) -> list[Query]:
    lost = [not math.isfinite(row.loss - clean) for row in rows]
    if variant == "antithetic":
        lost = [lost[q - q % 2] or lost[q - q % 2 + 1] for q in range(len(rows))]
    return [row for row, gone in zip(rows, lost, strict=True) if not gone]


def _weight(row: Query, control: float, sigma: float) -> float:
    return (row.loss - control) / sigma if sigma else row.loss


def _control(row: Query, alive: list[Query], clean: float, variant: str) -> float:
    if variant == "leave_one_out":
        others = [other.loss for other in alive if other is not row]
        return sum(others) / len(others)
    return {"plain": 0.0, "baseline": clean}[variant]


def mixed(early: Tensor | None, late: Tensor | None, share: float) -> Tensor | None:
    if early is None or late is None:
        return late if early is None else early
    return share * early + (1 - share) * late


def _add_vjp(
    total: dict[str, Tensor], module: nn.Module, place: Place, parameters: dict[str, nn.Parameter], x: Tensor,
    delta: Tensor,
) -> None:  # fmt: skip
    outputs: list[Tensor] = []
    handle = place.module.register_forward_hook(lambda _, __, output: outputs.append(output.clone()))
    module(x.clone())
    handle.remove()
    found = torch.autograd.grad(
        place.active(outputs[0])[0], list(parameters.values()), grad_outputs=delta, allow_unused=True
    )
    for name, gradient in zip(parameters, found, strict=True):
        if gradient is not None:
            total[name] += gradient


def _add_rows(
    total: dict[str, Tensor], site: Site, places: list[Place], rows: list[Query], clean: float, variant: str
) -> None:
    """Layers perturbed together: each row has its own input of each layer, and so its own Jacobian.

    The + and - rows of a pair have different inputs, so here the clean loss does not cancel between them.
    """
    alive = _survivors(rows, clean, variant)
    for row in alive:
        weight = _weight(row, 0.0 if variant == "plain" else clean, site.sigma) / len(alive)
        for place in places:
            leaves = {f"{place.name}.{leaf}": p for leaf, p in place.module.named_parameters(recurse=False)}
            leaves = {name: p for name, p in leaves.items() if name in total}
            output = place.active(place.module(row.inputs[place.name]))[0]
            found = torch.autograd.grad(output, list(leaves.values()), weight * row.noise[place.name])
            for name, gradient in zip(leaves, found, strict=True):
                total[name] += gradient
