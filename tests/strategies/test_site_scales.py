"""Scales of sites against Jacobians built whole, and when they are estimated anew."""

import io
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import integrate
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel

from flops_lightning.errors import SettingError
from flops_lightning.queries import CleanPass
from flops_lightning.strategies import LikelihoodRatio, Site
from flops_lightning.strategies.statistics import SCALE_EVERY, site_scales
from tests.reference.layouts import TOKEN_SITES
from tests.reference.likelihood_ratio import in_parameter_space
from tests.reference.networks import (
    assert_entries,
    bound,
    cross_entropy,
    freeze,
    gradients,
    squared_error,
    tiny_vit,
    token_network,
)


class Span(nn.Module):
    """The part of a network between a site's input and its output."""

    def __init__(self, strategy: LikelihoodRatio, site: Site) -> None:
        super().__init__()
        self.whole, self.network, self.site = strategy.network.module, strategy.network, site

    def forward(self, h: Tensor) -> Tensor:
        if self.site.layers:
            return self.site.layers[0].module(h)
        output = self.network.run(h, self.site.first, self.site.last + 1)
        return output if self.site.tokens is None else output[:, self.site.tokens]


def inputs_of(strategy: LikelihoodRatio, site: Site, x: Tensor) -> Tensor:
    """``(b, ...)`` what enters the site's first stage, or its layer at the active tokens."""
    if not site.layers:
        return strategy.network.run(x, 0, site.first).detach()
    (target,) = site.layers
    kept: list[Tensor] = []
    handle = target.module.register_forward_pre_hook(lambda _, args: kept.append(args[0].detach()))
    strategy.network.module(x)
    handle.remove()
    return kept[0] if target.tokens is None else kept[0][:, target.tokens]


def jacobians(strategy: LikelihoodRatio, site: Site, x: Tensor, metric: Mapping[str, Tensor] | None) -> Tensor:
    """``(b, d, n)`` Jacobian of the site's active output in its parameters, weighted by the root of the metric."""
    span = Span(strategy, site)
    parameters = {f"whole.{name}": p.detach() for name, p in site.parameters.items()}
    found = []
    for h in inputs_of(strategy, site, x):
        with sdpa_kernel(SDPBackend.MATH):  # fused attention knows no batches of derivatives
            by_name = jacrev(lambda p, h=h: functional_call(span, p, (h[None],))[0].flatten())(parameters)
        columns = [
            (jacobian * (metric[name.removeprefix("whole.")].sqrt() if metric else 1.0)).flatten(1)
            for name, jacobian in by_name.items()
        ]
        found.append(torch.cat(columns, dim=1))
    return torch.stack(found)


def expected_ratio(above: Tensor, below: Tensor) -> float:
    """``E[z' A z / z' D z]``, z standard normal: ``int_0^inf |I + 2tD|^-1/2 tr((I + 2tD)^-1 A) dt`` (Magnus 1986)."""
    scale, vectors = torch.linalg.eigh(below)
    diagonal = (vectors.T @ above @ vectors).diagonal()

    def integrand(u: float) -> float:  # t = u / (1 - u) takes [0, 1) to [0, inf)
        factor = 1 + 2 * u / (1 - u) * scale
        return float(factor.rsqrt().prod() * (diagonal / factor).sum()) / (1 - u) ** 2

    return integrate.quad(integrand, 0, 1, epsrel=1e-6)[0]


def exact_scale(strategy: LikelihoodRatio, s: int, x: Tensor, metric: Mapping[str, Tensor] | None) -> float:
    """``sum_b ||J_b||_F^2 / (b d)``, the squared norm of a parameter gradient for each unit of the activation's.

    Where traces are in parameter space already it is 1 without a metric, and else the expectation of a ratio.
    """
    weighted = jacobians(strategy, strategy.sites[s], x, metric)
    if not in_parameter_space(strategy.sites[s]):
        return float(weighted.square().sum() / weighted[..., 0].numel())
    plain = jacobians(strategy, strategy.sites[s], x, None)
    rows = weighted.flatten(0, 1)
    return expected_ratio(rows @ rows.T, torch.block_diag(*(j @ j.T for j in plain)))


def random_metric(module: nn.Module) -> dict[str, Tensor]:
    """Weights over two orders of magnitude, ten times larger for weights than for biases."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: (10.0 if name.endswith("weight") else 1.0)
        * torch.randn(p.shape, generator=generator, dtype=p.dtype).exp()
        for name, p in module.named_parameters()
    }


def check(
    strategy: LikelihoodRatio, x: Tensor, clean: CleanPass, metric: dict[str, Tensor] | None, *, draws: int = 600
) -> None:
    """The mean over many probes is the exact scale, within four standard errors of at most 5 % of it."""
    found = torch.stack(
        [site_scales(strategy.engine, strategy.sites, replace(clean, draw=i), metric) for i in range(draws)]
    )
    for s, site in enumerate(strategy.sites):
        exact = exact_scale(strategy, s, x, metric)
        error = float(found[:, s].std()) / len(found) ** 0.5
        assert error < 0.05 * exact, f"{site.name}: too noisy to tell"
        assert abs(float(found[:, s].mean()) - exact) < 4 * error, f"{site.name}: {found[:, s].mean()} for {exact}"


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", ["group", "block", "linear"])
def test_scales(layout, weighted, tokens_net, tokens):
    """Groups, blocks and layers on several tokens; the layer norm's traces are the activation's."""
    strategy = bound(tokens_net, squared_error, TOKEN_SITES[layout])
    kinds = [in_parameter_space(site) for site in strategy.sites]
    assert kinds == {"group": [False] * 2, "block": [False] * 4, "linear": [True, True, False, True]}[layout]
    metric = random_metric(tokens_net) if weighted else None
    check(strategy, tokens[0], strategy.clean_pass(*tokens), metric)


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
def test_scales_where_noise_is_on_the_class_token_alone(weighted, images):
    vit = tiny_vit(embed_dim=8, mlp_ratio=1)
    sites = [{"stages": ["embed", "blocks.1"], "kind": "group"}, {"stages": ["blocks.2", "head"], "kind": "block"}]
    strategy = bound(vit, cross_entropy, sites, chunk_rows=3)
    assert [site.narrow for site in strategy.sites] == [False, True, False, False]
    metric = random_metric(vit) if weighted else None
    check(strategy, images[0], strategy.clean_pass(*images), metric, draws=250)


def test_a_layer_of_which_the_bias_alone_is_taught(tokens_net, tokens):
    """Its traces are the activation's: every feature of every token moves one derivative by as much as itself."""
    freeze(tokens_net, "2.weight")
    strategy = bound(tokens_net, squared_error, TOKEN_SITES["linear"])
    assert not in_parameter_space(strategy.sites[1])
    assert exact_scale(strategy, 1, tokens[0], None) == 1.0
    check(strategy, tokens[0], strategy.clean_pass(*tokens), None)


def test_layers_that_are_perturbed_together_have_no_scale(tokens_net, tokens):
    strategy = bound(tokens_net, squared_error, TOKEN_SITES["together"])
    with pytest.raises(SettingError, match=r"strategy\.sites = '0\.\.4': perturbs several layers.*together: false"):
        strategy.sample_statistics(strategy.clean_pass(*tokens), {"scale"})


NAMES = ("scale", "preconditioned_scale")


def test_scales_are_estimated_anew_every_so_often(tokens_net, tokens):
    """A local VJP of every sample at every site is paid for it; the two kinds of scale keep their own time."""
    strategy, metric = bound(tokens_net, squared_error, TOKEN_SITES["block"]), random_metric(tokens_net)
    found: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    paid = []
    for i in range(2 * SCALE_EVERY):
        names = {"scale"} if i < 5 else set(NAMES)
        clean = strategy.clean_pass(*tokens)
        before = strategy.meter.total().forward_equivalents
        statistics = strategy.sample_statistics(clean, names, metric)
        paid.append(strategy.meter.total().forward_equivalents - before)
        for name in NAMES:
            found[name].append(getattr(statistics, name))
    clean = strategy.clean_pass(*tokens)
    for name, first, weights in (("scale", 0, None), ("preconditioned_scale", 5, metric)):
        for i, scale in enumerate(found[name]):
            if i < first:
                assert scale is None
                continue
            at = replace(clean, draw=i - (i - first) % SCALE_EVERY)
            expected = site_scales(strategy.engine, strategy.sites, at, weights)
            torch.testing.assert_close(scale, expected, rtol=1e-12, atol=0)
    vjp = 4 * 3.0  # three forward passes of every stage, four samples
    assert paid == pytest.approx([vjp * (i % SCALE_EVERY in (0, 5)) for i in range(len(paid))])


def test_what_was_measured_survives_a_checkpoint(tokens, monkeypatch):
    names = {*NAMES, "measured_costs"}

    def fresh() -> LikelihoodRatio:
        return bound(token_network(), squared_error, TOKEN_SITES["block"], seed=None)

    first = fresh()
    metric = random_metric(first.network.module)
    for _ in range(3):
        first.clean_pass(*tokens)
    before = first.sample_statistics(first.clean_pass(*tokens), {*names, "predictors"}, metric)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    resumed = fresh()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.state_dict() == first.state_dict()
    with monkeypatch.context() as patch:
        patch.delattr("flops_lightning.strategies.likelihood_ratio.site_scales")  # else a NameError
        patch.delattr("flops_lightning.strategies.observing_strategy.measured_costs")
        after = resumed.sample_statistics(resumed.clean_pass(*tokens), {*names, "predictors"}, metric)
    first.sample_statistics(first.clean_pass(*tokens), {*names, "predictors"}, metric)
    assert resumed.meter.state_dict() == first.meter.state_dict(), "nothing had to run again"
    for name in names:
        torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=0, atol=0)
    assert_entries(after.predictors, before.predictors)
    for draw in range(5, 3 + SCALE_EVERY + 1):
        scales = [each.sample_statistics(each.clean_pass(*tokens), {"scale"}).scale for each in (first, resumed)]
        assert torch.equal(*scales)
        assert torch.equal(scales[0], before.scale) == (draw < 3 + SCALE_EVERY), "as old as it was"


def test_a_checkpoint_from_before_there_were_scales(tokens):
    strategy = bound(token_network(), squared_error, TOKEN_SITES["block"])
    strategy.sample_statistics(strategy.clean_pass(*tokens), {"scale", "measured_costs", "predictors"})
    state: dict[str, Any] = {
        key: value for key, value in strategy.state_dict().items() if key in ("draw", "meter", "seed")
    }
    strategy.load_state_dict(state)
    assert strategy.state_dict() == {**state, "scales": {}, "seconds": [], "predictors": []}


def test_a_scale_leaves_no_gradient(tokens_net, tokens):
    strategy = bound(tokens_net, squared_error, TOKEN_SITES["block"])
    strategy.sample_statistics(strategy.clean_pass(*tokens), set(NAMES), random_metric(tokens_net))
    assert set(gradients(tokens_net).values()) == {None}
