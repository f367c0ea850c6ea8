"""Traces that an estimate's own queries show, against the sample variance of gradients built one by one."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.allocators import TraceObservation
from flops_lightning.strategies import LikelihoodRatio, PilotSpec
from tests.reference.layouts import COUNTS, TOKEN_SITES, VIT_SITES, convolutional, vit_for
from tests.reference.likelihood_ratio import in_parameter_space, reference_traces, surviving_queries
from tests.reference.networks import bound, cross_entropy, freeze, gradients, squared_error, tiny_vit


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
    for name, gradient in gradients(module).items():
        if gradient is None:
            assert watched[name] is None
        else:
            assert torch.equal(gradient, watched[name]), f"{name}: a look at the traces changed the gradient"
    assert seen.unit == (2 if strategy.variant == "antithetic" else 1)
    assert seen.trace.shape == seen.queries.shape == (len(strategy.sites), len(x))
    for s, counts in enumerate(table.expand(len(strategy.sites), -1).tolist()):
        site = strategy.sites[s]
        expected = reference_traces(
            module, strategy, site, x, y, counts, in_parameters=in_parameter_space(site),
            draw=clean.draw, pilots=strategy.pilots.queries if site.name in piloted else 0,
        )  # fmt: skip
        few = torch.tensor(counts) < 2 * seen.unit
        assert few.any(), "the test needs samples with too few queries"
        assert torch.equal(seen.trace[s].isnan(), few), "known where there are two units or more"
        torch.testing.assert_close(seen.trace[s], expected, rtol=1e-9, atol=1e-9, equal_nan=True)
        assert seen.queries[s].tolist() == counts
    return seen


@pytest.mark.parametrize("layout", ["group", "block", "linear"])
@pytest.mark.parametrize("variant", COUNTS)
def test_vit(variant, layout, images):
    """Blocks with attention, linears in parameter space, and sites where the class token alone gets noise."""
    vit = vit_for(layout)
    strategy = bound(vit, cross_entropy, VIT_SITES[layout], variant=variant, chunk_rows=4)
    if layout != "linear":
        assert any(site.narrow for site in strategy.sites)
    base = torch.tensor(COUNTS[variant])
    table = torch.stack([base.roll(s) for s in range(len(strategy.sites))])
    assert_seen(vit, strategy, *images, table)


@pytest.mark.parametrize("variant", ["baseline", "antithetic"])
@pytest.mark.parametrize("layout", ["block", "linear"])
def test_patch_tokens_and_all_tokens(variant, layout, images):
    for kwargs, active in (({"global_pool": "avg", "reg_tokens": 2}, True), ({}, False)):
        vit = vit_for(layout, **kwargs)
        sites = [{**site, "active_tokens": active} for site in VIT_SITES[layout]]
        strategy = bound(vit, cross_entropy, sites, variant=variant, chunk_rows=6)
        assert_seen(vit, strategy, *images, torch.tensor(COUNTS[variant]))


@pytest.mark.parametrize("layout", ["block", "linear"])
def test_convolutions_and_norms(layout, images):
    """Their traces are those of the activation: there is no closed form for the parameters' gradient's norm."""
    net = convolutional()
    strategy = bound(net, cross_entropy, [{"stages": ["0", "6"], "kind": layout, "sigma": 0.1}], chunk_rows=3)
    seen = assert_seen(net, strategy, *images, torch.tensor([3, 0, 5, 2]))
    assert len(seen.trace) == 4


@pytest.mark.parametrize("leaf", ["weight", "bias"])
def test_a_linear_layer_of_which_one_parameter_is_taught(leaf, tokens_net, tokens):
    """Without its weight the trace is the activation's."""
    freeze(tokens_net, "2." + leaf, "4." + leaf)
    strategy = bound(tokens_net, squared_error, TOKEN_SITES["linear"])
    assert_seen(tokens_net, strategy, *tokens, torch.tensor([3, 1, 0, 4]))


@pytest.mark.parametrize("layout", ["group", "block", "linear"])
@pytest.mark.parametrize("variant", COUNTS)
def test_pilots_are_left_out(variant, layout, tokens_net, tokens):
    """Counts were chosen after a look at the pilots; what follows is independent of that look."""
    pilots = PilotSpec(["lowest", "deepest"], 4)
    strategy = bound(tokens_net, squared_error, TOKEN_SITES[layout], variant=variant, pilots=pilots)
    assert_seen(tokens_net, strategy, *tokens, torch.tensor(COUNTS[variant]))


@pytest.mark.parametrize("rank", [0, 3])
def test_every_draw_and_rank_shows_its_own(rank, tokens_net, tokens):
    strategy = bound(tokens_net, squared_error, TOKEN_SITES["block"])
    strategy.rank = rank
    first, second = (assert_seen(tokens_net, strategy, *tokens, torch.tensor([3, 1, 2, 4])) for _ in range(2))
    known = first.trace.isfinite()
    assert (first.trace[known] != second.trace[known]).all()


@pytest.mark.parametrize("variant", ["baseline", "antithetic"])
def test_lost_queries_show_nothing(variant, tokens_net, tokens):
    limit = float(tokens_net(tokens[0])[:, 0].detach().max()) + 0.1

    def brittle(output: Tensor, target: Tensor) -> Tensor:
        return torch.where(output[:, 0] > limit, math.nan, squared_error(output, target))

    sites = [{**site, "sigma": 1.0} for site in TOKEN_SITES["linear"]]
    strategy = bound(tokens_net, brittle, sites, variant=variant, chunk_rows=6)
    counts = torch.tensor([8, 4, 6, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = strategy.estimate(strategy.clean_pass(*tokens), counts, traces=True).observation
    for s, site in enumerate(strategy.sites):
        alive = surviving_queries(tokens_net, strategy, site, *tokens, counts.tolist())
        assert seen.queries[s].tolist() == alive
        expected = reference_traces(
            tokens_net, strategy, site, *tokens, counts.tolist(), in_parameters=in_parameter_space(site)
        )
        torch.testing.assert_close(seen.trace[s], expected, rtol=1e-9, atol=1e-9, equal_nan=True)
    assert 0 < seen.queries.sum() < 4 * counts.sum()


def test_layers_that_are_perturbed_together_show_nothing(tokens_net, tokens):
    sites = [{**TOKEN_SITES["together"][0], "stages": ["0", "3"], "name": "joint"}, {"stages": ["4"], "sigma": 0.5}]
    strategy = bound(tokens_net, squared_error, sites)
    clean = strategy.clean_pass(*tokens)
    seen = strategy.estimate(clean, torch.full((4,), 3), traces=True).observation
    watched = gradients(tokens_net)
    assert seen.trace[0].isnan().all()
    assert seen.queries.tolist() == [[0.0] * 4, [3.0] * 4]
    assert seen.trace[1].isfinite().all()
    strategy.estimate(clean, torch.full((4,), 3))
    assert all(torch.equal(gradient, watched[name]) for name, gradient in gradients(tokens_net).items())


def test_a_site_without_queries_shows_nothing(tokens_net, tokens):
    strategy = bound(tokens_net, squared_error, TOKEN_SITES["block"])
    counts = torch.full((4, 4), 3)
    counts[1] = 0
    seen = strategy.estimate(strategy.clean_pass(*tokens), counts, traces=True).observation
    assert seen.trace.isnan().all(dim=1).tolist() == [False, True, False, False]
    assert seen.queries.sum(dim=1).tolist() == [12.0, 0.0, 12.0, 12.0]


def test_site_by_site_fills_the_lines_one_group_at_a_time(images):
    """Each line is of the network as it was when that site was estimated."""
    vit, (x, y) = tiny_vit().eval(), images
    strategy = bound(vit, cross_entropy, VIT_SITES["group"], update="site_by_site")
    counts, clean, joined = torch.tensor([3, 1, 0, 4]), strategy.clean_pass(x, y), None
    expected = torch.full((3, 4), math.nan, dtype=torch.float64)
    for (name,) in strategy.update_groups:
        (s,) = (s for s, site in enumerate(strategy.sites) if site.name == name)
        seen = strategy.estimate(clean, counts, sites=[name], traces=True).observation
        lines = [i for i in range(3) if seen.trace[i].isfinite().any()]
        assert lines == [s]
        assert seen.queries.sum(dim=1).tolist() == [8.0 * (i == s) for i in range(3)]
        expected[s] = reference_traces(vit, strategy, strategy.sites[s], x, y, counts.tolist(), in_parameters=False)
        joined = seen if joined is None else joined.joined(seen)
        torch.testing.assert_close(joined.trace, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
        found = gradients(vit)
        with torch.no_grad():
            for key, parameter in strategy.sites[s].parameters.items():
                parameter.sub_(0.05 * found[key] / found[key].norm())
        clean = strategy.refresh(clean, [name])
    assert joined.trace.isfinite().tolist() == [[True, False, False, True]] * 3
    assert joined.queries[joined.trace.isfinite()].tolist() == [3.0, 4.0] * 3
