"""Unbiased: noise in the parameters and forward gradients, every layout against autograd; their traces; pilots.

With dense noise of width sigma an estimate is unbiased for the gradient of the smoothed loss ``E[L(theta + sigma z)]``.
With factored noise ``D = sum_k a_k b_k^T / sqrt(K)`` Stein's lemma holds in ``a`` for any ``b``, so the expectation is
``E[grad L(theta + sigma D) sum_k b_k b_k^T / K]``, which is the gradient itself as sigma goes to 0. Guided factors lie
in the span of the sample's inputs, and ``E b b^T`` is the projection onto it, which leaves its gradient alone.

The light tier, with standard errors of 3 to 7 %, sees a fault that changes the size of an estimate by a third; the
heavy one, with 2 % at most, one of 8 %.
"""

from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from flops_lightning.strategies import SPSA, ForwardMode, Site
from tests.reference.networks import autograd_gradient, freeze, squared_error
from tests.reference.networks import bound_to as bound
from tests.reference.parameter_perturbation import LAYOUTS, RANKS, STRATEGIES, Factors, Numbers, numbers_of
from tests.reference.smoothed import (
    Sampled,
    assert_unbiased,
    estimates,
    exact_gradients,
    flat,
    shifted_squared_error,
    token_problem,
    total_variance,
)


class Tier(NamedTuple):
    """How often what the light tier does is repeated, and the largest standard error of a slope."""

    times: int
    largest_error: float


LIGHT = Tier(1, 0.075)
HEAVY = pytest.param(Tier(16, 0.02), marks=[pytest.mark.statistical_heavy, pytest.mark.timeout(3000)], id="heavy")
TIERS = [pytest.param(LIGHT, id="light"), HEAVY]

ALL_LAYOUTS = {name: layout for name, layout in (LAYOUTS | RANKS).items() if "span" not in layout}
ONE_BY_ONE = ("shared", "flipout")
"""Layouts whose directions run one after the other; many are needed, so one layer alone is perturbed."""
THREE = [{"stages": ["0", "1"]}, {"stages": ["2", "3"]}, {"stages": ["4"]}]
# Uneven, and in step with the samples' shares of the gradient, so that weighting samples by their counts shows.
COUNTS = torch.tensor([30, 64, 30, 6])
COUNTS_SHARED = torch.tensor([24, 32, 24, 16])


def case(layout: str, *strategy: str) -> Any:
    """Flipout runs its directions one by one, and takes long; pairs of it are seen in wide noise alone."""
    return pytest.param(*strategy, layout, marks=[pytest.mark.slow] if layout == "flipout" else [])


def problem(*, only: str = "") -> tuple[nn.Module, Tensor, Tensor]:
    """The tokens' problem with all but one layer frozen, if it is named."""
    net, x, y = token_problem()
    freeze(net, *(name for name, _ in net.named_parameters() if only and not name.startswith(only + ".")))
    return net, x, y


def perturbing(strategy: str, layout: str, *, sigma: float, **more: Any) -> tuple[Any, Tensor, Tensor]:
    kind, settings = STRATEGIES[strategy]
    only = ("4" if (strategy, layout) == ("forward", "shared") else "2") if layout in ONE_BY_ONE else ""
    net, x, y = problem(only=only)
    sites = [{"stages": [only]}] if only else THREE
    width = {} if strategy == "forward" else {"sigma": sigma}
    sites = [{**site, **width} for site in sites]
    settings = {**settings, **ALL_LAYOUTS[layout], **more}
    return bound(kind, net, shifted_squared_error, sites, chunk_rows=1000, **settings), x, y


def smoothed_gradient(strategy: Any, x: Tensor, y: Tensor, site: Site, *, copies: int, draws: int) -> Sampled:
    """``(1/B) sum_b E[grad L_b(theta + sigma D) sum_k b_k b_k^T / K]`` by autograd, with noise of its own."""
    module = strategy.network.module.eval()
    generator = torch.Generator().manual_seed(12345)
    total = torch.zeros(draws, sum(p.numel() for p in site.parameters.values()), dtype=x.dtype)
    for b in range(len(x)):
        numbers = numbers_of_layout(strategy, site, x[b : b + 1])

        def loss(moved: dict[str, Tensor], b: int = b) -> Tensor:
            return strategy.loss(functional_call(module, moved, (x[b : b + 1],)), y[b : b + 1]).sum()

        def term(normals: Tensor, numbers: Numbers = numbers, loss: Any = loss) -> Tensor:
            directions = numbers.directions(normals)
            moved = {name: p + site.sigma * directions[name].matrix() for name, p in site.parameters.items()}
            found = torch.func.grad(loss)(moved)
            return flat([projected(found[name], directions[name]) for name in site.parameters])

        for draw in range(draws):
            normals = torch.randn(copies, numbers.size, generator=generator, dtype=x.dtype)
            total[draw] += torch.func.vmap(term)(normals).mean(0).detach() / len(x)
    return Sampled(total)


def numbers_of_layout(strategy: Any, site: Site, x: Tensor) -> Numbers:
    if getattr(strategy, "layout", "shared") == "factored":
        return numbers_of(strategy.network.module, strategy, site, x)
    return Numbers({(name, ""): tuple(p.shape) for name, p in site.parameters.items()}, {}, site.parameters)


def projected(gradient: Tensor, direction: Factors) -> Tensor:
    if direction.b is None:
        return gradient
    return (gradient.flatten(1) @ direction.b.mT @ direction.b / len(direction.b)).view(gradient.shape)


@cache
def wide_truth(layout: str, times: int) -> list[Sampled]:
    """By site, the same for all variants."""
    strategy, x, y = perturbing("baseline", layout, sigma=WIDE)
    sites = strategy.sites
    return [smoothed_gradient(strategy, x, y, site, copies=1000, draws=10 * min(times, 30)) for site in sites]


WIDE, NARROW = 0.3, 1e-4


def check(strategy: Any, x: Tensor, y: Tensor, truth: list[Sampled], tier: Tier, *, more: int = 1) -> None:
    shared = getattr(strategy, "layout", "") == "shared"
    counts, times = (COUNTS_SHARED, 3 * tier.times // 2) if shared else (COUNTS, tier.times)
    found = estimates(strategy, x, y, counts * strategy.unit * more, draws=20 * times)
    for estimate, expected in zip(found.values(), truth, strict=True):
        assert_unbiased(estimate, expected, largest_error=tier.largest_error)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    ("strategy", "layout"),
    [
        case(layout, strategy)
        for strategy in ("plain", "baseline", "leave_one_out", "spsa")
        for layout in LAYOUTS
        if layout != "flipout" or strategy in ("baseline", "spsa")  # what a variant does to the weights is the same
    ],
)
def test_wide_noise(strategy, layout, tier):
    check(*perturbing(strategy, layout, sigma=WIDE), wide_truth(layout, tier.times), tier)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wide_noise_smooths(layout):
    """Else the tests with wide noise would say no more than those with narrow noise."""
    strategy, x, y = perturbing("baseline", layout, sigma=WIDE)
    differ = []
    for smoothed, plain in zip(wide_truth(layout, 1), exact_gradients(strategy, x, y), strict=True):
        slope = float(smoothed.mean @ plain.mean / plain.mean.square().sum())
        doubt = float((smoothed.draws @ plain.mean / plain.mean.square().sum()).std()) / len(smoothed.draws) ** 0.5
        differ.append(abs(slope - 1) > 5 * doubt + 0.02)
    assert any(differ)


@pytest.mark.parametrize(
    ("strategy", "layout"),
    [
        *(case(layout, "baseline") for layout in ALL_LAYOUTS),
        *(case(layout, "spsa") for layout in LAYOUTS if layout != "flipout"),
    ],
)
def test_narrow_noise(strategy, layout):
    chosen, x, y = perturbing(strategy, layout, sigma=NARROW)
    check(chosen, x, y, exact_gradients(chosen, x, y), LIGHT)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("layout", [case(layout) for layout in ALL_LAYOUTS])
def test_forward_gradients_in_the_weights(layout, tier):
    chosen, x, y = perturbing("forward", layout, sigma=0.0)
    check(chosen, x, y, exact_gradients(chosen, x, y), tier)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("kind", ["group", "block", "linear", "together"])
def test_forward_gradients_in_the_activity(kind, tier):
    site = {"stages": ["0", "4"], "kind": "linear" if kind == "together" else kind, "together": kind == "together"}
    net, x, y = problem()
    strategy = bound(ForwardMode, net, shifted_squared_error, THREE if kind == "group" else [site], chunk_rows=1000)
    check(strategy, x, y, exact_gradients(strategy, x, y), tier, more=10 if kind == "together" else 1)


def test_a_capped_span_gives_the_projected_gradient():
    """Biased, as documented: onto the leading direction of each sample's inputs."""
    net, x, y = problem(only="2")
    freeze(net, "2.bias")
    strategy = bound(
        SPSA, net, shifted_squared_error, [{"stages": ["2"], "sigma": NARROW}], chunk_rows=1000, layout="factored",
        activation_guided=True, span=1,
    )  # fmt: skip
    inputs, parts = net[:2](x).detach(), []
    for b in range(4):
        gradient = autograd_gradient(net, strategy.loss, x[b : b + 1], y[b : b + 1])["2.weight"]
        leading = torch.linalg.svd(inputs[b]).Vh[0]
        parts.append(gradient @ torch.outer(leading, leading))
    truth = torch.stack(parts).mean(0).flatten()
    (whole,) = exact_gradients(strategy, x, y)
    assert (truth - whole.mean).norm() > 0.05 * whole.mean.norm()
    check(strategy, x, y, [Sampled(truth.repeat(2, 1))], LIGHT)


def queries_of_one(strategy: str, layout: str, **more: Any) -> tuple[Any, Tensor, Tensor]:
    """One sample, one site, linear over sigma."""
    net, x, y = problem(only="2")
    kind, settings = STRATEGIES[strategy]
    width = {} if strategy == "forward" else {"sigma": NARROW}
    settings = {**settings, **ALL_LAYOUTS[layout], **more}
    chosen = bound(kind, net, squared_error, [{"stages": ["2"], **width}], chunk_rows=1000, **settings)
    return chosen, x[:1], y[:1, :2]


@pytest.mark.parametrize(
    ("strategy", "layout"),
    [
        *(case(layout, "baseline") for layout in ALL_LAYOUTS),
        *(("spsa", "shared"), ("spsa", "guided"), ("forward", "guided")),
    ],
)
def test_traces_are_the_variance_of_single_queries(strategy, layout):
    """Times the number of queries (pairs count twice), whatever the directions; and both are the closed form."""
    chosen, x, y = queries_of_one(strategy, layout)
    few, many = (each * chosen.unit for each in ((4, 60) if layout in ONE_BY_ONE else (32, 500)))
    (found,) = estimates(chosen, x, y, torch.tensor([few]), draws=200).values()
    variance, error = (few * value for value in total_variance(found.draws))
    clean = chosen.clean_pass(x, y)
    seen = [chosen.observe_traces(clean, torch.tensor([many]), first_query=many * i) for i in range(15)]
    traces = Sampled(torch.stack([each.trace[0] for each in seen]))
    trace, doubt = float(traces.mean), float(traces.error)
    assert max(error, doubt) < 0.12 * variance, "too noisy to tell"
    expected = closed_form_trace(chosen, x, y)
    assert abs(trace - variance) < 4 * (error**2 + doubt**2) ** 0.5
    assert abs(trace - expected) < 4 * doubt
    assert abs(variance - expected) < 4 * error


def closed_form_trace(strategy: Any, x: Tensor, y: Tensor) -> float:
    """``sum_p E[(G_p . D_p)^2 (||D_p||^2 + d - d_p)] - ||G||^2`` over parameters p, pairs doubled.

    A dense part has ``E[(G . D)^2 ||D||^2] = ||G||^2 (d + 2)``, one of signs ``||G||^2 d``, and one of rank K
    ``||G||^2 [(o + 2)(m + 2) + (K - 1)(o m + 2)] / K`` with ``m`` the dimensions in which the input factor is drawn,
    whose directions have ``E ||D||^2 = o m``.
    """
    (site,) = strategy.sites
    gradient = autograd_gradient(strategy.network.module, strategy.loss, x, y)
    numbers = numbers_of_layout(strategy, site, x)
    moments, sizes, norms = {}, {}, {}
    for name, p in site.parameters.items():
        norms[name] = float(gradient[name].square().sum())
        if (name, "a") not in numbers.shapes:
            sizes[name], moments[name] = p.numel(), p.numel() + (0 if strategy.layout == "flipout" else 2)
            continue
        k, o = numbers.shapes[name, "a"]
        m = numbers.shapes.get((name, "b"), (k, k))[1]
        sizes[name], moments[name] = o * m, ((o + 2) * (m + 2) + (k - 1) * (o * m + 2)) / k
    whole = sum(sizes.values())
    trace = sum(norms[n] * (moments[n] + whole - sizes[n] - 1) for n in norms)
    return trace * {1: 1.0, 2: 2.0}[strategy.unit]


# Pilots
