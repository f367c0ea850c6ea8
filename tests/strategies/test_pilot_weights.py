"""Pilots at several sites, and the weights with which they enter each sample's gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.strategies import LikelihoodRatio, PilotSpec
from tests.reference.likelihood_ratio import reference_gradient, reference_traces
from tests.reference.networks import bound, cross_entropy, gradients, squared_error, tiny_vit

COUNTS = {"plain": [3, 1, 5, 2], "baseline": [3, 0, 5, 2], "leave_one_out": [3, 0, 5, 2], "antithetic": [4, 0, 6, 2]}
BLOCKS = {"stages": ["0", "4"], "kind": "block", "queries_per_sample": 10, "sigma": 0.3}
LINEAR = {**BLOCKS, "kind": "linear"}


def assert_gradients(
    module: nn.Module, strategy: LikelihoodRatio, x: Tensor, y: Tensor, counts: list[int], weights: Tensor | None
) -> None:
    """Compare what is in ``.grad`` with the slow reference, pilots of 4 queries a sample."""
    found = gradients(module)
    piloted = strategy.pilots.names(strategy.sites)
    for s, site in enumerate(strategy.sites):
        pilots = 4 if site.name in piloted else 0
        own = None if weights is None else weights[s].tolist()
        expected = reference_gradient(module, strategy, site, x, y, counts, pilots=pilots, pilot_weight=own)
        for name, gradient in expected.items():
            torch.testing.assert_close(found.pop(name), gradient, rtol=1e-9, atol=1e-9)
    assert not found


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", ["block", "linear"])
@pytest.mark.parametrize("variant", COUNTS)
def test_pilots_at_two_sites(variant, layout, weighted, tokens_net, tokens):
    """``w mean(pilots) + (1 - w) mean(rest)``, ``w`` by sample; without a rest the pilots alone."""
    site = BLOCKS if layout == "block" else LINEAR
    strategy = bound(tokens_net, squared_error, [site], variant=variant, pilots=PilotSpec(["4", "0"], 4), chunk_rows=6)
    assert strategy.budget.queries_per_sample == (6, 10, 10, 6)
    clean = strategy.clean_pass(*tokens)
    seen = strategy.pilot_traces(clean)
    assert seen.queries.tolist() == [[4.0] * 4, [0.0] * 4, [0.0] * 4, [4.0] * 4]
    assert seen.trace[1:3].isnan().all()
    for s in (0, 3):
        expected = reference_traces(
            tokens_net, strategy, strategy.sites[s], *tokens, [4] * 4, in_parameters=layout == "linear"
        )
        torch.testing.assert_close(seen.trace[s], expected, rtol=1e-9, atol=1e-9)
    table = [[0.9, 0.2, 0.0, 1.0], [0.7] * 4, [0.1] * 4, [0.0, 0.6, 0.3, 0.5]]
    weights = torch.tensor(table, dtype=torch.float64) if weighted else None
    strategy.estimate(clean, torch.tensor(COUNTS[variant]), pilot_weight=weights)
    assert_gradients(tokens_net, strategy, *tokens, COUNTS[variant], weights)


def test_weights_where_noise_is_on_the_class_token_alone(images):
    vit = tiny_vit()
    sites = [{"stages": ["embed", "blocks.1"], "sigma": 0.1}, {"stages": ["blocks.2", "head"], "kind": "block"}]
    strategy = bound(vit, cross_entropy, sites, pilots=PilotSpec(["embed..blocks.1", "blocks.2"], 4), chunk_rows=7)
    weights = torch.tensor([[0.9, 0.2, 0.0, 1.0], [0.0, 0.6, 0.3, 0.5], [0.5] * 4, [0.5] * 4], dtype=torch.float64)
    clean = strategy.clean_pass(*images)
    strategy.pilot_traces(clean)
    strategy.estimate(clean, torch.tensor([3, 0, 5, 2]), pilot_weight=weights)
    assert_gradients(vit, strategy, *images, [3, 0, 5, 2], weights)


def test_one_line_of_weights_is_for_all_sites(tokens_net, tokens):
    strategy = bound(tokens_net, squared_error, [BLOCKS], pilots=PilotSpec(["0", "2"], 4))
    weight = torch.tensor([0.9, 0.2, 0.0, 1.0])
    clean = strategy.clean_pass(*tokens)
    strategy.pilot_traces(clean)
    strategy.estimate(clean, torch.tensor([1, 2, 3, 4]), pilot_weight=weight)
    assert_gradients(tokens_net, strategy, *tokens, [1, 2, 3, 4], weight.double().expand(4, 4))


@pytest.mark.parametrize("reuse", [True, False])
def test_weights_without_pilots_change_nothing(reuse, tokens_net, tokens):
    """None were drawn, or they are not to enter the gradient."""
    strategy = bound(tokens_net, squared_error, [BLOCKS], pilots=PilotSpec("2", 4, reuse=reuse))
    clean = strategy.clean_pass(*tokens)
    if not reuse:
        strategy.pilot_traces(clean)
    counts = torch.tensor([1, 2, 3, 4])
    strategy.estimate(clean, counts)
    without = gradients(tokens_net)
    strategy.estimate(clean, counts, pilot_weight=torch.full((4, 4), 0.7))
    for name, gradient in gradients(tokens_net).items():
        torch.testing.assert_close(gradient, without[name], rtol=0, atol=0)


def test_pilots_at_two_sites_are_paid_at_each(tokens_net, tokens):
    strategy = bound(tokens_net, squared_error, [BLOCKS], pilots=PilotSpec(["lowest", "deepest"], 4))
    clean = strategy.clean_pass(*tokens)
    strategy.pilot_traces(clean)
    estimate = strategy.estimate(clean)
    assert estimate.queries == 4 * (6 + 10 + 10 + 6)
    spent: dict[str, Any] = {name: (count.queries, count.pilots) for name, count in strategy.meter.sites.items()}
    assert spent == {"clean": (0, 0), "0": (40, 16), "2": (40, 0), "3": (40, 0), "4": (40, 16)}


def test_site_by_site_pilots_at_the_top_enter_and_those_below_do_not(tokens_net, tokens):
    """Without reuse pilots of every site are taken from the network before its updates; only counts see them."""
    strategy = bound(tokens_net, squared_error, [BLOCKS], update="site_by_site", pilots=PilotSpec("deepest", 4))
    weights = torch.full((4, 4), 0.3, dtype=torch.float64)
    clean = strategy.clean_pass(*tokens)
    strategy.pilot_traces(clean)
    for (name,) in strategy.update_groups:
        strategy.estimate(clean, torch.tensor([1, 2, 3, 4]), sites=[name], pilot_weight=weights)
        clean = strategy.refresh(clean, [name])
    assert_gradients(tokens_net, strategy, *tokens, [1, 2, 3, 4], weights)
