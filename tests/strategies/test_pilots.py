"""Pilots: their traces, the weights with which they enter each sample's gradient, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.strategies import LikelihoodRatio, PilotSpec
from tests.reference.layouts import COUNTS
from tests.reference.likelihood_ratio import reference_gradient, reference_traces
from tests.reference.networks import assert_entries, bound, estimated, gradients, squared_error

KINDS = {"2": {"kind": "linear"}, "3": {"kind": "block"}}
"""By pilot site: traces of a linear layer are in parameter space, those of a block in activation space."""


def piloted(net: nn.Module, site: str, pilots: int = 4, **settings: Any) -> LikelihoodRatio:
    sites = [{"stages": ["0", "4"], "sigma": 0.5, "queries_per_sample": 20, **KINDS[site]}]
    return bound(net, squared_error, sites, pilots=PilotSpec(site, pilots), **settings)


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
    assert_entries(found, expected)


BLOCKS = [{"stages": ["0", "4"], "kind": "block", "queries_per_sample": 10, "sigma": 0.3}]
LINEAR = [{**BLOCKS[0], "kind": "linear"}]
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


@pytest.mark.parametrize(("pilots", "problem"), [({"qeries": 4}, "has no setting 'qeries'"), (4, "PilotSpec")])
def test_what_is_no_pilot_spec_is_refused(pilots, problem):
    with pytest.raises(SettingError, match=rf"model\.strategy\.pilots = .*{problem}"):
        LikelihoodRatio(pilots=pilots)


def assert_estimate(
    module: nn.Module, strategy: LikelihoodRatio, x: Tensor, y: Tensor, counts: list[int], weights: Any
) -> None:
    """Compare what is in ``.grad`` with the slow reference, pilots of 4 queries a sample."""
    found = gradients(module)
    piloted = strategy.pilots.names(strategy.sites)
    for s, site in enumerate(strategy.sites):
        pilots = 4 if site.name in piloted else 0
        own = None if weights is None else weights[s].tolist()
        expected = reference_gradient(module, strategy, site, x, y, counts, pilots=pilots, pilot_weight=own)
        assert_entries(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("layout", ["block", "linear"])
@pytest.mark.parametrize("variant", COUNTS)
def test_pilots_at_two_sites(variant, layout, weighted, tokens_net, tokens):
    """``w mean(pilots) + (1 - w) mean(rest)``, ``w`` by sample; without a rest the pilots alone."""
    site = BLOCKS if layout == "block" else LINEAR
    strategy = bound(tokens_net, squared_error, site, variant=variant, pilots=PilotSpec(["4", "0"], 4), chunk_rows=6)
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
    assert_estimate(tokens_net, strategy, *tokens, COUNTS[variant], weights)


def test_one_line_of_weights_is_for_all_sites(tokens_net, tokens):
    strategy = bound(tokens_net, squared_error, BLOCKS, pilots=PilotSpec(["0", "2"], 4))
    weight = torch.tensor([0.9, 0.2, 0.0, 1.0])
    clean = strategy.clean_pass(*tokens)
    strategy.pilot_traces(clean)
    strategy.estimate(clean, torch.tensor([1, 2, 3, 4]), pilot_weight=weight)
    assert_estimate(tokens_net, strategy, *tokens, [1, 2, 3, 4], weight.double().expand(4, 4))


@pytest.mark.parametrize("reuse", [True, False])
def test_weights_without_pilots_change_nothing(reuse, tokens_net, tokens):
    """None were drawn, or they are not to enter the gradient."""
    strategy = bound(tokens_net, squared_error, BLOCKS, pilots=PilotSpec("2", 4, reuse=reuse))
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
    strategy = bound(tokens_net, squared_error, BLOCKS, pilots=PilotSpec(["lowest", "deepest"], 4))
    clean = strategy.clean_pass(*tokens)
    strategy.pilot_traces(clean)
    estimate = strategy.estimate(clean)
    assert estimate.queries == 4 * (6 + 10 + 10 + 6)
    spent: dict[str, Any] = {name: (count.queries, count.pilots) for name, count in strategy.meter.sites.items()}
    assert spent == {"clean": (0, 0), "0": (40, 16), "2": (40, 0), "3": (40, 0), "4": (40, 16)}


def test_site_by_site_pilots_at_the_top_enter_and_those_below_do_not(tokens_net, tokens):
    """Without reuse pilots of every site are taken from the network before its updates; only counts see them."""
    strategy = bound(tokens_net, squared_error, BLOCKS, update="site_by_site", pilots=PilotSpec("deepest", 4))
    weights = torch.full((4, 4), 0.3, dtype=torch.float64)
    clean = strategy.clean_pass(*tokens)
    strategy.pilot_traces(clean)
    for (name,) in strategy.update_groups:
        strategy.estimate(clean, torch.tensor([1, 2, 3, 4]), sites=[name], pilot_weight=weights)
        clean = strategy.refresh(clean, [name])
    assert_estimate(tokens_net, strategy, *tokens, [1, 2, 3, 4], weights)
