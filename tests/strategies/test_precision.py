"""Half precision rounds the forward passes and nothing else, and a sigma that it does not resolve is named."""

import re
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.precision import SimulatedTF32, tf32_rounded
from flops_lightning.errors import SettingError
from flops_lightning.network.staging import stage_network
from flops_lightning.queries import plan_rows, row_losses
from flops_lightning.strategies import (
    SPSA,
    Backprop,
    CoordinateFiniteDifferences,
    EvolutionStrategies,
    ForwardGradientStrategy,
    ForwardMode,
    LikelihoodRatio,
    MeZO,
    SiteSpec,
    WeightForwardMode,
)
from flops_lightning.strategies.perturbation import moved
from flops_lightning.strategies.precision import Resolution, resolution, rounded_up
from flops_lightning.strategies.vjp import layer_gradient, linear_gradient_sq_norm, local_vjp
from tests.reference.networks import cross_entropy

HALVES = [torch.bfloat16, torch.float16]
LINEAR = [
    SiteSpec(stages=["embed"], kind="block", sigma=0.3, queries_per_sample=8),
    SiteSpec(stages=["blocks.0", "head"], kind="linear", sigma=0.3, queries_per_sample=8),
]


def blocks(**settings: Any) -> list[SiteSpec]:
    return [SiteSpec(stages=["embed", "head"], kind="block", queries_per_sample=8, **settings)]


def halves(**settings: Any) -> list[SiteSpec]:
    ranges = (["embed", "blocks.1"], ["blocks.2", "head"])
    return [SiteSpec(stages=stages, queries_per_sample=8, **settings) for stages in ranges]


STRATEGIES: dict[str, Callable[[], ForwardGradientStrategy]] = {
    "likelihood ratio": lambda: LikelihoodRatio(sites=blocks(sigma=0.3), seed=0),
    "leave one out": lambda: LikelihoodRatio(sites=blocks(sigma=0.3), variant="leave_one_out", seed=0),
    "linear sites": lambda: LikelihoodRatio(sites=LINEAR, variant="antithetic", seed=0),
    "exact head": lambda: LikelihoodRatio(sites=blocks(sigma=0.3), exact_head=True, seed=0),
    "forward mode": lambda: ForwardMode(sites=blocks(), seed=0),
    "evolution strategies": lambda: EvolutionStrategies(sites=halves(sigma=0.1), seed=0),
    "spsa, factored": lambda: SPSA(sites=halves(sigma=0.1), layout="factored", seed=0),
    "spsa, guided": lambda: SPSA(sites=halves(sigma=0.1), layout="factored", activation_guided=True, seed=0),
    "weight forward mode": lambda: WeightForwardMode(sites=halves(), seed=0),
    "mezo": lambda: MeZO(sigma=0.1, queries=16, seed=0),
    "coordinates": lambda: CoordinateFiniteDifferences(coordinates=40, step=1.0, ratios="uniform", seed=0),
}


@pytest.fixture
def net(vit: nn.Module) -> nn.Module:
    vit = vit.float()
    for name in ("cls_token", "pos_embed"):  # no layer, so no linear site
        vit.get_parameter(name).requires_grad_(False)
    return vit


@pytest.fixture
def batch(images: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return images[0].float(), images[1]


@pytest.fixture
def highest() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def estimate(strategy: ForwardGradientStrategy, net: nn.Module, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    strategy.bind(stage_network(net), cross_entropy)
    net.zero_grad()
    strategy.estimate(strategy.clean_pass(*batch))
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", STRATEGIES)
def test_an_estimate_in_half_precision_is_that_of_float32_but_for_the_rounding_of_its_passes(name, half, net, batch):
    """With the same noise, at a sigma that is wide beside the rounding: off by a few machine epsilons, in float32."""
    full = estimate(STRATEGIES[name](), net, batch)
    with torch.autocast("cpu", dtype=half), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the rule is about what a random network needs
        rounded = estimate(STRATEGIES[name](), net, batch)
    assert full.keys() == rounded.keys()
    assert {gradient.dtype for gradient in rounded.values()} == {torch.float32}
    exact, other = (torch.cat([g.double().flatten() for g in each.values()]) for each in (full, rounded))
    assert (other - exact).norm() < 10 * torch.finfo(half).eps * exact.norm()


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(
    ("layer", "x", "delta"),
    [
        (nn.Linear(6, 5), (64, 7, 6), (64, 7, 5)),
        (nn.Conv2d(3, 4, 3), (64, 3, 8, 8), (64, 4, 6, 6)),
        (nn.LayerNorm(6), (64, 7, 6), (64, 7, 6)),
    ],
)
def test_closed_forms_are_not_rounded(layer, x, delta, half):
    """Against float64, of the same half-precision inputs; sums beyond float16's range do not overflow."""
    inputs, deltas = torch.randn(x).to(half), 1e4 * torch.randn(delta)
    exact = layer_gradient(layer.double(), inputs.double(), deltas.double())
    with torch.autocast("cpu", dtype=half):
        found = layer_gradient(layer.float(), inputs, deltas)
        if isinstance(layer, nn.Linear):
            found["norm"] = linear_gradient_sq_norm(inputs.float(), deltas, bias=True)
            exact["norm"] = linear_gradient_sq_norm(inputs.double(), deltas.double(), bias=True)
    for name, gradient in exact.items():
        assert found[name].dtype == torch.float32
        assert (found[name] - gradient).norm() < 1e-6 * gradient.norm()


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e8])
@pytest.mark.parametrize(("half", "bound"), [(torch.bfloat16, 2.0**-7), (torch.float16, 1e-6)])
def test_a_local_vjp_keeps_its_accuracy_at_any_scale(half, bound, scale, net, batch):
    """Under bfloat16 as accurate as mixed precision is; under float16, which has no range for it, float32."""
    strategy = LikelihoodRatio(sites=blocks(), seed=0)
    strategy.bind(stage_network(net), cross_entropy)
    clean = strategy.clean_pass(*batch)
    site = strategy.sites[1]
    delta = scale * torch.randn(clean.activations[site.start].shape)
    with torch.no_grad():
        exact = local_vjp(strategy.network, site, clean, delta, rows=3)
        with torch.autocast("cpu", dtype=half):
            found = local_vjp(strategy.network, site, clean, delta, rows=3)
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    flat, other = (torch.cat([g.double().flatten() for g in each.values()]) for each in (exact, found))
    assert (other - flat).norm() < bound * flat.norm()


@pytest.mark.parametrize("half", HALVES)
def test_losses_are_taken_in_float32(half):
    """Products inside of a loss function too, such as those of an embedding loss."""
    output, target = torch.randn(6, 5).to(half), torch.randn(6, 5)

    def similarity(output: Tensor, target: Tensor) -> Tensor:
        return (output @ target.T).diagonal()

    with torch.autocast("cpu", dtype=half):
        found = row_losses(similarity, output, target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, (output.float() * target).sum(1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("half", HALVES)
def test_noise_enters_before_the_rounding(half):
    """A half-precision activation is rounded once, after float32 noise was added."""
    h, z = torch.randn(1000).to(half)[None], torch.randn(1, 1000)
    expected = (h.double() + 0.01 * z.double()).to(half)
    found = moved(h.clone(), z, None, 0.01)
    # Float32 sums may fall on the other side of a tie.
    assert (found != expected).float().mean() < 1e-2
    assert (found.double() - h.double() - 0.01 * z).abs().max() <= 0.51 * torch.finfo(half).eps * expected.abs().max()


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("layout", ["shared", "factored"])
def test_directions_drawn_again_are_summed_in_float32(layout, half, vit, batch):
    """Those of layers and of parameters without one (class token, position embedding) alike."""
    strategy = SPSA(sites=halves(sigma=0.1), layout=layout, seed=0)
    strategy.bind(stage_network(vit.float()), cross_entropy)
    clean, site = strategy.clean_pass(*batch), strategy.sites[0]
    plan = plan_rows(np.full(len(batch[0]), 6), 16, multiple=2)
    coefficients = 1e5 * torch.randn(len(plan.samples))
    exact = strategy.engine.layouts(site).gradient(site, clean, plan, coefficients, {})
    with torch.autocast("cpu", dtype=half):
        found = strategy.engine.layouts(site).gradient(site, clean, plan, coefficients, {})
    assert found.keys() == exact.keys() == site.parameters.keys()
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


def test_backprop_under_float16_is_refused(net, batch):
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(SettingError) as error:
        estimate(Backprop(), net, batch)
    assert str(error.value).startswith("trainer.precision = '16-mixed'")
    assert "bf16-mixed" in str(error.value)


def test_autocast_decides_before_the_dtype():
    x = torch.randn(3)
    assert resolution(x) == Resolution("torch.float32", 2.0**-23, 16.0)
    assert resolution(x.double()) == Resolution("torch.float64", 2.0**-52, 16.0)
    assert resolution(torch.arange(3)) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert resolution(x) == Resolution("torch.bfloat16", 2.0**-7, 2.0)
        assert resolution(x.double()) == Resolution("torch.float64", 2.0**-52, 16.0)  # autocast leaves it alone


@pytest.mark.parametrize(
    ("precision", "convolution", "convolutions", "eps"),
    [
        ("highest", "ieee", True, 2.0**-23),
        ("high", "ieee", False, 2.0**-10),
        ("medium", "ieee", False, 2.0**-10),
        ("highest", "tf32", True, 2.0**-10),
        ("highest", "tf32", False, 2.0**-23),
    ],
)
@pytest.mark.usefixtures("highest")
def test_tf32_counts_on_a_gpu(precision, convolution, convolutions, eps, monkeypatch):
    torch.set_float32_matmul_precision(precision)
    monkeypatch.setattr(
        torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision=convolution, allow_tf32=None), raising=False
    )
    on_gpu: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32)
    assert resolution(on_gpu, convolutions=convolutions).eps == eps
    assert resolution(torch.ones(1), convolutions=convolutions).eps == 2.0**-23  # not on a CPU


def test_the_least_width_is_so_many_rounding_steps():
    values = torch.tensor([3.0, -4.0, 0.0, 5.0])
    assert Resolution("", 2.0**-7, 2.0).least_width(values) == pytest.approx(2 * 2**-7 * 12.5**0.5)
    assert [rounded_up(v) for v in (0.0131, 0.013, 2.2e-7)] == pytest.approx([0.014, 0.013, 2.2e-7])


@pytest.mark.parametrize("half", [*HALVES, None])
def test_the_sigma_that_is_named_is_workable(half, net, batch):
    """Warned of once a site; at the sigmas named, the estimate agrees to 90 % with exact derivatives, silently."""
    with torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None):
        with pytest.warns(RuntimeWarning, match="sigma = 1e-09 at site") as caught:
            estimate(LikelihoodRatio(sites=halves(sigma=1e-9), seed=0), net, batch)
        named = [float(re.findall(r"Write (\S+) or more", str(each.message))[0]) for each in caught]
        assert len(named) == 2
        specs = [
            SiteSpec(s.stages, sigma=sigma, queries_per_sample=8) for s, sigma in zip(halves(), named, strict=True)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = estimate(LikelihoodRatio(sites=specs, seed=0), net, batch)
    exact = estimate(ForwardMode(sites=halves(), seed=0), net, batch)
    for spec in ("body", "top"):
        names = [n for n in exact if n.startswith(("blocks.2", "norm", "head")) == (spec == "top")]
        a, b = (torch.cat([each[n].double().flatten() for n in names]) for each in (exact, found))
        assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.9


def test_tf32_keeps_ten_bits_of_the_mantissa():
    x = torch.randn(10_000) * torch.logspace(-20, 20, 10_000)
    steps = torch.frexp(tf32_rounded(x))[0].double() * 2**11
    assert torch.equal(steps, steps.round())
    assert ((tf32_rounded(x) - x).abs() <= 2.0**-11 * x.abs()).all()


def test_simulated_tf32_rounds_operands_and_nothing_else(net, batch):
    x, layer = torch.randn(4, 6), nn.Linear(6, 5)
    with torch.no_grad(), SimulatedTF32():
        found = layer(x)
    expected = tf32_rounded(x).double() @ tf32_rounded(layer.weight.detach()).double().T + layer.bias.detach().double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        exact = net(batch[0])
        with SimulatedTF32():
            rounded = net(batch[0])
    assert 0 < (rounded - exact).norm() < 8 * 2**-10 * exact.norm()
