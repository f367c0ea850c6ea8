"""Pilots: their traces against explicit covariances, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.strategies import LikelihoodRatio, PilotSpec
from tests.reference.likelihood_ratio import places_of, queries_of_sample
from tests.reference.networks import Loss, bound, estimated, gradients, squared_error

KINDS = {"2": {"kind": "linear"}, "3": {"kind": "block"}}
"""By pilot site: traces of a linear layer are in parameter space, those of a block in activation space."""


def piloted(net: nn.Module, site: str, pilots: int = 4, **settings: Any) -> LikelihoodRatio:
    sites = [{"stages": ["0", "4"], "sigma": 0.5, "queries_per_sample": 20, **KINDS[site]}]
    return bound(net, squared_error, sites, pilots=PilotSpec(site, pilots), **settings)


def place_of(strategy: LikelihoodRatio) -> int:
    """Index of the one site that has pilots."""
    return [site.name for site in strategy.sites].index(strategy.pilots.sites)


def site_of(strategy: LikelihoodRatio) -> Any:
    return strategy.sites[place_of(strategy)]


def gradients_of_queries(
    losses: Tensor, z: Tensor, x: Tensor | None, clean: float, strategy: LikelihoodRatio
) -> Tensor:
    """``(q, n)`` gradient of each query (or antithetic pair): of a linear layer's parameters, or of the activation."""
    weights = (losses - (0.0 if strategy.variant == "plain" else clean)) / site_of(strategy).sigma
    delta = weights.view(-1, *(1,) * (z.dim() - 1)) * z
    if x is not None:
        delta = torch.cat([torch.einsum("qto,ti->qoi", delta, x).flatten(1), delta.sum(1)], dim=1)
    delta = delta.flatten(1)
    return delta.view(-1, 2, delta.shape[1]).mean(1) if strategy.variant == "antithetic" else delta


def trace_of(rows: Tensor, strategy: LikelihoodRatio) -> Tensor:
    """Trace of the covariance of a single query's gradient; for a pair twice that of the pair."""
    return rows.var(0).sum() * (2 if strategy.variant == "antithetic" else 1)


@pytest.mark.parametrize("site", KINDS)
@pytest.mark.parametrize("variant", ["plain", "baseline", "leave_one_out", "antithetic"])
def test_the_trace_is_the_sample_variance_of_the_pilots(variant, site, tokens_net, tokens):
    strategy = piloted(tokens_net, site, pilots=6, variant=variant, chunk_rows=8)
    clean = strategy.clean_pass(*tokens)
    seen = strategy.pilot_traces(clean)
    assert seen.unit == (2 if variant == "antithetic" else 1)
    places = torch.arange(len(strategy.sites)) == place_of(strategy)
    assert seen.trace[~places].isnan().all(), "nothing was seen elsewhere"
    assert torch.equal(seen.queries, 6.0 * places[:, None].expand(-1, 4))
    (found,) = seen.trace[places]
    for b in range(4):
        rows = queries_of_sample(tokens_net, strategy, site_of(strategy), *tokens, b, 6)
        z = torch.stack([row.noise[site] for row in rows])
        losses = torch.tensor([row.loss for row in rows], dtype=z.dtype)
        x = tokens_net[:2](tokens[0])[b].detach() if site == "2" else None
        explicit = gradients_of_queries(losses, z, x, float(clean.loss[b]), strategy)
        torch.testing.assert_close(found[b], trace_of(explicit, strategy), rtol=1e-9, atol=1e-9)


def true_trace(strategy: LikelihoodRatio, loss: Loss, x: Tensor, y: Tensor, b: int) -> tuple[float, float]:
    """Trace for one sample and its standard error, from many queries of its own."""
    net, generator = strategy.network.module, torch.Generator().manual_seed(b)
    (place,) = places_of(net, strategy, site_of(strategy))
    kept: dict[str, Tensor] = {}

    def move(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        z = torch.randn(output.shape, generator=generator, dtype=output.dtype)
        if strategy.variant == "antithetic":
            z[1::2] = -z[::2]
        kept["z"], kept["x"] = z, args[0][0]
        return output + site_of(strategy).sigma * z

    found = []
    with torch.no_grad():
        clean = float(loss(net(x[b : b + 1]), y[b : b + 1]))
        handle = place.module.register_forward_hook(move)
        for _ in range(10):
            losses = loss(net(x[b : b + 1].repeat(4000, 1, 1)), y[b : b + 1].repeat(4000, 1))
            inputs = kept["x"] if place.name == "2" else None
            found.append(trace_of(gradients_of_queries(losses, kept["z"], inputs, clean, strategy), strategy))
        handle.remove()
    traces = torch.stack(found)
    return float(traces.mean()), float(traces.std() / len(traces) ** 0.5)


@pytest.mark.parametrize("site", KINDS)
@pytest.mark.parametrize("variant", ["baseline", "antithetic"])
def test_traces_are_unbiased(variant, site, tokens_net, tokens):
    strategy = piloted(tokens_net, site, variant=variant, chunk_rows=1000)
    place = place_of(strategy)
    found = torch.stack([strategy.pilot_traces(strategy.clean_pass(*tokens)).trace[place] for _ in range(800)])
    for b in range(4):
        truth, doubt = true_trace(strategy, squared_error, *tokens, b)
        error = (float(found[:, b].var()) / len(found) + doubt**2) ** 0.5
        assert error < 0.1 * truth, "too noisy to tell"
        assert abs(float(found[:, b].mean()) - truth) < 4 * error


def test_pilots_are_paid_from_the_budget_of_their_site(tokens_net, tokens):
    strategy = piloted(tokens_net, "3", pilots=6)
    assert strategy.budget.queries_per_sample == (20, 20, 14, 20)
    clean = strategy.clean_pass(*tokens)
    strategy.pilot_traces(clean)
    estimate = strategy.estimate(clean)
    assert estimate.queries == 4 * (20 + 20 + 14 + 20)
    spent = {name: (count.queries, count.pilots) for name, count in strategy.meter.sites.items()}
    assert spent == {"clean": (0, 0), "0": (80, 0), "2": (80, 0), "3": (80, 24), "4": (80, 0)}


def test_pilots_without_reuse_share_no_noise_with_the_rest(tokens_net, tokens):
    """Else the counts would depend on the noise of the queries they count."""
    strategy = piloted(tokens_net, "3")
    strategy.pilots.reuse = False
    clean = strategy.clean_pass(*tokens)
    strategy.estimate(clean, torch.full((4,), 4))
    first = gradients(tokens_net)
    strategy.pilot_traces(clean)
    strategy.estimate(clean, torch.full((4,), 4))
    second = gradients(tokens_net)
    torch.testing.assert_close(first["4.weight"], second["4.weight"], rtol=0, atol=0)
    assert not torch.allclose(first["3.0.weight"], second["3.0.weight"], rtol=0.01)


def test_without_pilots_there_is_no_trace(tokens_net, tokens):
    strategy = bound(tokens_net, squared_error, [{"stages": ["0", "1"]}, {"stages": ["2", "4"]}])
    assert strategy.pilot_traces(strategy.clean_pass(*tokens)) is None


def test_a_batch_whose_pilots_were_not_drawn_gets_the_whole_budget(tokens_net, tokens):
    """As in a step without an allocator: nobody asked for the pilots, so nothing is taken off."""
    sites = [{"stages": ["0", "4"], "sigma": 0.5, "queries_per_sample": 20, "kind": "block"}]
    plain = bound(tokens_net, squared_error, sites)
    plain.clean_pass(*tokens)
    _, expected = estimated(plain, *tokens)
    strategy = piloted(tokens_net, "3")
    strategy.pilot_traces(strategy.clean_pass(*tokens))
    _, found = estimated(strategy, *tokens)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0)


BLOCKS = [{"stages": ["0", "4"], "kind": "block", "queries_per_sample": 10}]
UNEVEN = [{**BLOCKS[0], "stages": ["0", "3"]}, {**BLOCKS[0], "stages": ["4"], "queries_per_sample": 6}]
JOINT = [{"stages": ["0", "4"], "kind": "linear", "together": True, "name": "all"}]


@pytest.mark.parametrize(
    ("sites", "pilots", "settings", "setting", "problem"),
    [
        (BLOCKS, PilotSpec("5", 4), {}, "sites", r"'5': is not a site.*\['0', '2', '3', '4', 'lowest', 'deepest'\]"),
        (BLOCKS, PilotSpec(["2", "5"], 4), {}, "sites", r"'5': is not a site"),
        (BLOCKS, PilotSpec("", 4), {}, "sites", "'': is not a site"),
        (BLOCKS, PilotSpec([], 4), {}, "sites", "'': is not a site"),
        (JOINT, PilotSpec("all", 4), {}, "sites", "together"),
        (JOINT, PilotSpec("lowest", 4), {}, "sites", "'all': perturbs several layers together"),
        (BLOCKS, PilotSpec("2", 1), {}, "queries", r"from 2 to 8 .*of '2' is 10"),
        (UNEVEN, PilotSpec(["0", "4"], 6), {}, "queries", r"from 2 to 4 .*of '4' is 6"),
        (BLOCKS, PilotSpec("2", -2), {}, "queries", "from 2 to 8"),
        (BLOCKS, PilotSpec("2", 9), {}, "queries", "from 2 to 8"),
        (BLOCKS, PilotSpec("2", 2), {"variant": "antithetic"}, "queries", "multiple of 2 from 4 to 8"),
        (BLOCKS, PilotSpec("2", 5), {"variant": "antithetic"}, "queries", "multiple of 2 from 4 to 8"),
        (BLOCKS, PilotSpec("2", 4), {"update": "site_by_site"}, "reuse", r"stale.*reuse: false.*'4'"),
        (BLOCKS, PilotSpec(["4", "2"], 4), {"update": "site_by_site"}, "reuse", r"stale.*reuse: false.*'4' alone"),
    ],
)
def test_settings_that_are_refused(sites, pilots, settings, setting, problem, tokens_net):
    with pytest.raises(SettingError, match=problem) as error:
        bound(tokens_net, squared_error, sites, pilots=pilots, **settings)
    assert error.value.setting == f"model.strategy.pilots.{setting}"


@pytest.mark.parametrize(
    ("pilots", "update", "budget"),
    [
        (PilotSpec("2", 2), "simultaneous", (10, 8, 10, 10)),
        (PilotSpec("2", 8), "simultaneous", (10, 2, 10, 10)),
        (PilotSpec(["0", "3"], 4), "simultaneous", (6, 10, 6, 10)),
        (PilotSpec("lowest", 4), "simultaneous", (6, 10, 10, 10)),
        (PilotSpec(["deepest", "4", "lowest"], 4), "simultaneous", (6, 10, 10, 6)),
        (PilotSpec("4", 4), "site_by_site", (10, 10, 10, 6)),
        (PilotSpec(["deepest"], 4), "site_by_site", (10, 10, 10, 6)),
        (PilotSpec(["2", "4"], 4, reuse=False), "site_by_site", (10, 6, 10, 6)),
        (PilotSpec("2", 0), "simultaneous", (10, 10, 10, 10)),
    ],
)
def test_settings_that_are_not(pilots, update, budget, tokens_net):
    """``lowest`` is the site next to the input, ``deepest`` the one next to the loss; naming one twice is once."""
    strategy = bound(tokens_net, squared_error, BLOCKS, pilots=pilots, update=update)
    assert strategy.budget.queries_per_sample == budget


@pytest.mark.parametrize("pilots", [{"qeries": 4}, 4])
def test_what_is_no_pilot_spec_is_refused(pilots):
    with pytest.raises(SettingError, match=r"strategy.pilots = .*PilotSpec"):
        LikelihoodRatio(pilots=pilots)
