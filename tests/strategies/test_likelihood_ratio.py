"""What an estimate must leave alone, how it adds up, and which settings are refused."""

import copy
import gc
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.strategies import LikelihoodRatio, PilotSpec
from tests.reference.layouts import TOKEN_SITES
from tests.reference.likelihood_ratio import assert_equals_reference, reference_gradient
from tests.reference.networks import (
    TokenMean,
    assert_entries,
    bound,
    cross_entropy,
    estimated,
    gradients,
    shaken,
    squared_error,
    tiny_vit,
)

TWO = [{"stages": ["0", "1"]}, {"stages": ["2", "4"]}]


def test_estimates_add_up_in_grad(tokens_net, tokens):
    strategy = bound(tokens_net, squared_error, TWO)
    clean, alone = estimated(strategy, *tokens)
    for parameter in tokens_net.parameters():
        parameter.grad = torch.ones_like(parameter)
    strategy.estimate(clean)
    strategy.estimate(clean)
    for name, gradient in gradients(tokens_net).items():
        torch.testing.assert_close(gradient, 1 + 2 * alone[name])


def test_sites_may_be_estimated_one_by_one(tokens_net, tokens):
    strategy = bound(tokens_net, squared_error, TWO)
    clean, whole = estimated(strategy, *tokens)
    strategy.estimate(clean, sites=["2..4"])
    upper = gradients(tokens_net)
    assert {name for name, gradient in upper.items() if gradient is None} == {"0.weight", "0.bias"}
    strategy.estimate(clean, sites=["0..1"])
    for name, gradient in gradients(tokens_net).items():
        torch.testing.assert_close(upper[name] if gradient is None else gradient, whole[name], rtol=0, atol=0)


def test_without_counts_every_sample_gets_the_budget(tokens_net, tokens):
    sites = [{**TWO[0], "queries_per_sample": 4}, {**TWO[1], "queries_per_sample": 6}]
    _, silent = estimated(bound(tokens_net, squared_error, sites), *tokens)
    strategy = bound(tokens_net, squared_error, sites)
    assert strategy.budget.queries_per_sample == (4, 6)
    _, told = estimated(strategy, *tokens, torch.tensor([[4] * 4, [6] * 4]))
    assert_entries(told, silent)


def test_the_result_reports_the_clean_pass_and_the_queries(tokens_net, tokens):
    x, y = tokens
    strategy = bound(tokens_net, squared_error, TWO)
    estimate = strategy.estimate(strategy.clean_pass(x, y), torch.tensor([[1, 0, 2, 3], [1, 1, 1, 1]]))
    torch.testing.assert_close(estimate.output, tokens_net(x).detach())
    torch.testing.assert_close(estimate.loss, squared_error(tokens_net(x), y).detach())
    assert (estimate.queries, estimate.lost, estimate.silent_samples, estimate.lost_batch) == (10, 0, 0, False)


@pytest.mark.parametrize("layout", TOKEN_SITES)
def test_a_site_may_get_no_query(layout, tokens_net, tokens):
    """An allocator over samples and sites may starve a site; its gradient is then left alone."""
    strategy = bound(tokens_net, squared_error, TOKEN_SITES[layout])
    counts = torch.full((len(strategy.sites), 4), 2)
    counts[0] = 0
    clean = strategy.clean_pass(*tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate = strategy.estimate(clean, counts, traces=True)
    assert (estimate.queries, estimate.lost, estimate.silent_samples) == (8 * (len(strategy.sites) - 1), 0, 0)
    assert estimate.observation.trace[0].isnan().all()
    assert estimate.observation.queries.sum(dim=1).tolist() == (
        [0] if layout == "together" else [0, 8, 8, 8][: len(counts)]
    )
    found = gradients(tokens_net)
    assert all(found[name] is None for name in strategy.sites[0].parameters)
    assert all(found[name].abs().max() > 0 for site in strategy.sites[1:] for name in site.parameters)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", TOKEN_SITES)
def test_the_last_batch_may_be_smaller(layout, batch, tokens_net, tokens):
    x, y = tokens
    strategy = bound(tokens_net, squared_error, TOKEN_SITES[layout], chunk_rows=6)
    estimated(strategy, x, y)
    assert_equals_reference(tokens_net, strategy, x[:batch], y[:batch], torch.tensor([3, 1][:batch]))


def test_integer_inputs(tokens):
    net = shaken(nn.Sequential(nn.Embedding(10, 3), nn.Linear(3, 3), TokenMean(), nn.Linear(3, 2)))
    strategy = bound(net, squared_error, [{"stages": ["0", "1"]}, {"stages": ["3"], "kind": "linear"}])
    x = torch.tensor([[1, 2], [2, 9], [0, 0], [3, 1]])
    assert_equals_reference(net, strategy, x, tokens[1], torch.tensor([3, 0, 2, 1]))


def test_memory_does_not_grow(tokens_net, tokens):
    sites = [
        {"stages": ["0", "1"], "queries_per_sample": 6},
        {"stages": ["2", "3"], "kind": "linear", "together": True, "queries_per_sample": 4},
        {"stages": ["4"], "kind": "linear", "queries_per_sample": 4},
    ]
    strategy = bound(tokens_net, squared_error, sites, chunk_rows=8, pilots=PilotSpec("4", 2))

    def steps(number: int) -> tuple[int, int, int]:
        for _ in range(number):
            clean = strategy.clean_pass(*tokens)
            strategy.pilot_traces(clean)
            strategy.estimate(clean)
            gradients(tokens_net)
        gc.collect()
        objects = gc.get_objects()
        tensors = [o for o in objects if issubclass(type(o), Tensor)]
        return len(tensors), sum(t.numel() for t in tensors), len(objects)

    tensors, numbers, objects = steps(10)
    more_tensors, more_numbers, more_objects = steps(60)
    assert (more_tensors, more_numbers) == (tensors, numbers)
    assert more_objects - objects < 30, "less than one object in two steps"


def test_a_resumed_run_draws_the_same_noise(tokens_net, tokens):
    strategy = bound(tokens_net, squared_error, TWO, seed=3)
    estimated(strategy, *tokens)
    state = copy.deepcopy(strategy.state_dict())
    _, second = estimated(strategy, *tokens)
    with pytest.raises(SettingError, match=r"seed = 99: .* noise from the seed 3. Leave the seed out, or write 3"):
        bound(tokens_net, squared_error, TWO, seed=99).load_state_dict(state)
    resumed = bound(tokens_net, squared_error, TWO, seed=None)
    resumed.load_state_dict(state)
    _, again = estimated(resumed, *tokens)
    assert_entries(again, second)
    assert resumed.meter.state_dict() == strategy.meter.state_dict()


def test_stale_pilots_are_not_used_after_a_restart(tokens_net, tokens):
    """The draw counter may come back to where pilots of another batch were drawn."""
    settings = {"pilots": PilotSpec("2..4", 2), "seed": 3}
    fresh = bound(tokens_net, squared_error, TWO, **settings)
    _, expected = estimated(fresh, *tokens)
    strategy = bound(tokens_net, squared_error, TWO, **settings)
    state = copy.deepcopy(strategy.state_dict())
    strategy.pilot_traces(strategy.clean_pass(tokens[0].flip(0), tokens[1]))
    strategy.load_state_dict(state)
    _, found = estimated(strategy, *tokens)
    assert_entries(found, expected)


def test_the_seed_is_that_of_seed_everything():
    torch.manual_seed(1234)
    assert LikelihoodRatio().seed == 1234
    assert LikelihoodRatio(seed=5).seed == 5


SITE_BY_SITE: dict[str, list[dict[str, Any]]] = {
    "group": [{"stages": ["embed", "blocks.0"]}, {"stages": ["blocks.1", "blocks.2"]}, {"stages": ["pool", "head"]}],
    "mixed": [
        {"stages": ["embed", "blocks.1"]},
        {"stages": ["blocks.2"], "kind": "linear"},
        {"stages": ["pool", "head"], "kind": "linear", "together": True},
    ],
    "overlapping": [
        {"stages": ["embed", "blocks.0"]},
        {"stages": ["blocks.1", "head"], "kind": "linear", "modules": ["blocks.1.*", "norm", "head"], "together": True},
        {"stages": ["blocks.2"], "kind": "linear", "modules": ["*.mlp.*", "*.norm?"], "together": True},
        {"stages": ["blocks.2"], "kind": "linear", "modules": ["*.attn.*"]},
    ],
}


@pytest.mark.parametrize("layout", SITE_BY_SITE)
def test_site_by_site_each_site_sees_the_updates_above_it(layout, images):
    """FLOPS, algorithm 1: after each update the next site's queries start from a clean pass as if made anew."""
    vit = tiny_vit().eval()
    x, y = images
    strategy = bound(vit, cross_entropy, SITE_BY_SITE[layout], update="site_by_site")
    names = [site.name for site in strategy.sites]
    assert strategy.update_groups == tuple((name,) for name in reversed(names))
    clean = strategy.clean_pass(x, y)
    counts = torch.tensor([2, 0, 1, 3])
    for (name,) in strategy.update_groups:
        strategy.estimate(clean, counts, sites=[name])
        found = gradients(vit)
        (site,) = [site for site in strategy.sites if site.name == name]
        expected = reference_gradient(vit, strategy, site, x, y, counts.tolist())
        for key, gradient in expected.items():
            torch.testing.assert_close(found.pop(key), gradient, rtol=1e-9, atol=1e-9)
        assert set(found.values()) == {None}
        with torch.no_grad():
            for key, parameter in site.parameters.items():
                parameter.sub_(0.05 * expected[key] / expected[key].norm())
        clean = strategy.refresh(clean, [name])
        torch.testing.assert_close(clean.loss, cross_entropy(vit(x), y).detach())
        torch.testing.assert_close(clean.output, vit(x).detach())


def test_simultaneous_is_one_update_of_all_sites(tokens_net):
    assert bound(tokens_net, squared_error, TWO).update_groups == (("0..1", "2..4"),)


@pytest.mark.parametrize(
    ("sites", "settings", "message"),
    [
        (TWO, {"variant": "baselines"}, r"^model\.strategy\.variant = 'baselines'"),
        (TWO, {"update": "both"}, r"^model\.strategy\.update = 'both'"),
        (TWO, {"chunk_rows": 1}, r"^model\.strategy\.chunk_rows = 1"),
        (
            [TWO[0], {**TWO[1], "queries_per_sample": 5}],
            {"variant": "antithetic"},
            r"queries_per_sample = 5: is odd at site '2\.\.4'.*even",
        ),
        (
            TOKEN_SITES["together"],
            {"variant": "leave_one_out"},
            r"strategy\.variant = 'leave_one_out': .*'0\.\.4'.*together: false",
        ),
    ],
)
def test_settings_that_are_refused(sites, settings, message, tokens_net):
    with pytest.raises(SettingError, match=message):
        bound(tokens_net, squared_error, sites, **settings)


@pytest.mark.parametrize(
    ("counts", "variant", "problem"),
    [
        (torch.tensor([2, 2, 2]), "baseline", r"\(3,\).*\(2, 4\) or \(4,\)"),
        (torch.full((3, 4), 2), "baseline", r"\(3, 4\)"),
        (torch.full((4, 2), 2), "baseline", r"\(4, 2\)"),
        (torch.tensor(2), "baseline", r"\(\)"),
        (torch.tensor([2, -1, 2, 2]), "baseline", "-1: every count must be 0 or a positive"),
        (torch.tensor([2, 3, 2, 2]), "antithetic", "3: every count must be 0 or a positive multiple of 2"),
        (torch.tensor([2.0, 2.7, 2.0, 2.0]), "baseline", "integer"),
        (torch.tensor([2.0, float("nan"), 2.0, 2.0]), "baseline", "integer"),
        (torch.tensor([2, 1, 2, 2]), "leave_one_out", "2"),
    ],
)
def test_counts_that_are_refused(counts, variant, problem, tokens_net, tokens):
    strategy = bound(tokens_net, squared_error, TWO, variant=variant)
    clean = strategy.clean_pass(*tokens)
    with pytest.raises(SettingError, match=problem) as error:
        strategy.estimate(clean, counts)
    assert error.value.setting == "counts"
    assert all(p.grad is None for p in tokens_net.parameters())


@pytest.mark.parametrize("names", [["typo"], ["0..1", "typo"], []])
def test_unknown_sites_are_refused(names, tokens_net, tokens):
    strategy = bound(tokens_net, squared_error, TWO)
    clean = strategy.clean_pass(*tokens)
    for method in (lambda: strategy.estimate(clean, sites=names), lambda: strategy.refresh(clean, names)):
        with pytest.raises(SettingError, match=r"'0\.\.1', '2\.\.4'") as error:
            method()
        assert error.value.setting == "sites"
