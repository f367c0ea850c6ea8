from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from flops_lightning.network import stage_network
from flops_lightning.queries import EMBEDDING_FEATURES
from flops_lightning.strategies import LikelihoodRatio
from flops_lightning.strategies.costs import TIMED_ROWS
from tests.reference.layouts import TOKEN_SITES
from tests.reference.networks import bound, cross_entropy, gradients, squared_error, token_network


def test_attention_pooling_is_counted_and_leaves_parameters_trainable():
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=3, num_heads=2,
        num_classes=3, global_pool="map", class_token=False,
    )  # fmt: skip
    strategy = bound(vit, cross_entropy, [])
    strategy.estimate(strategy.clean_pass(torch.randn(4, 1, 8, 8), torch.randint(3, (4,))))
    assert all(p.requires_grad and p.grad is not None for p in vit.parameters())


def test_forward_equivalents_of_layers_of_equal_cost():
    network = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    sites = [{"stages": [str(i)], "kind": "block", "queries_per_sample": 10} for i in range(4)]
    strategy = bound(network, cross_entropy, sites)
    strategy.estimate(strategy.clean_pass(torch.randn(8, 4), torch.randint(4, (8,))))
    cost = {name: count.forward_equivalents for name, count in strategy.meter.sites.items()}
    assert cost["clean"] == 8
    for i in range(4):
        queries, vjp = 8 * 10 * (3 - i) / 4, 8 * 3 / 4
        assert cost[str(i)] == pytest.approx(queries + vjp)


def test_a_large_embedding_is_averaged_down():
    network = nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(4 * 2500, 3))
    strategy = bound(network, cross_entropy, [])
    clean = strategy.clean_pass(torch.randn(2, 2500, 4), torch.randint(3, (2,)))
    assert clean.embedding.shape == (2, EMBEDDING_FEATURES)


def test_autocast_does_not_reuse_weights_from_before_an_update():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    strategy = bound(network, cross_entropy, [{"stages": ["0"]}, {"stages": ["2"]}], update="site_by_site")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.warns(RuntimeWarning, match=r"below what torch.bfloat16"):
            clean = strategy.clean_pass(torch.randn(4, 4), torch.randint(3, (4,)))
        with torch.no_grad():
            network[2].weight.mul_(3.0)
        refreshed = strategy.refresh(clean, ["2"])
        expected = cross_entropy(network(clean.activations[0]).float(), clean.targets)
    torch.testing.assert_close(refreshed.loss, expected, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(refreshed.loss, clean.loss, rtol=1e-2)


def test_mappings_are_taken_for_sites_and_pilots():
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    sites = [{"stages": ["0"]}, {"stages": ["2"], "name": "top"}]
    strategy = LikelihoodRatio(sites=sites, pilots={"sites": "top", "queries": 4})
    strategy.bind(stage_network(network), cross_entropy)
    assert [site.name for site in strategy.sites] == ["0", "top"]
    assert strategy.budget.queries_per_sample == (20, 16)


def test_default_sites_skip_what_is_frozen_and_stages_without_parameters():
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3), nn.LogSoftmax(1))
    assert bound(network, cross_entropy, []).sites[-1].parameters.keys() == {"3.weight", "3.bias"}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=2)
    for parameter in (*vit.head.parameters(), *vit.norm.parameters()):
        parameter.requires_grad_(False)
    assert [site.name for site in bound(vit, cross_entropy, []).sites] == ["group1", "group2", "group3"]


def measured_and_counted(strategy: LikelihoodRatio, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    statistics = strategy.sample_statistics(strategy.clean_pass(x, y), {"measured_costs", "counted_costs"})
    return statistics.measured_costs, statistics.counted_costs


@pytest.mark.parametrize(
    ("layout", "variant"),
    [*((layout, "baseline") for layout in TOKEN_SITES), ("block", "leave_one_out"), ("together", "antithetic")],
)
def test_the_most_expensive_site_costs_as_counted(layout, variant, tokens_net, tokens):
    """Measured costs are in the unit of the counted ones, forward-equivalents; and no query is free."""
    strategy = bound(tokens_net, squared_error, TOKEN_SITES[layout], variant=variant)
    measured, counted = measured_and_counted(strategy, *tokens)
    assert measured.shape == counted.shape == (len(strategy.sites),)
    assert (measured > 0).all()
    torch.testing.assert_close(measured.max(), counted.max(), rtol=1e-12, atol=0)
    assert [strategy.meter.sites.get(site.name) for site in strategy.sites] == [None] * len(strategy.sites), (
        "queries that are timed are not metered"
    )


def test_the_order_is_that_of_the_suffixes():
    """Above the lowest site lie eight wide layers, above the middle one half of them, above the top one nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 256), *(nn.Linear(256, 256) for _ in range(8)), nn.Linear(256, 2))
    net[1:9].requires_grad_(False)
    net[4].requires_grad_(True)
    sites = [{"stages": ["0"]}, {"stages": ["1", "4"]}, {"stages": ["5", "9"], "kind": "block"}]

    def in_order() -> bool:
        strategy = bound(net, squared_error, sites)  # anew: a strategy measures once
        assert [site.name for site in strategy.sites] == ["0", "1..4", "9"]
        measured, counted = measured_and_counted(strategy, torch.ones(8, 8), torch.zeros(8, 2))
        assert counted.tolist() == sorted(counted.tolist(), reverse=True)
        return bool(measured[0] > 1.2 * measured[1] > 1.2 * 1.2 * measured[2])

    # Milliseconds each: another job may disturb one look, not all.
    assert any(in_order() for _ in range(5))


@pytest.mark.parametrize("batch", [1, 4, 2 * TIMED_ROWS])
def test_any_batch(batch, tokens):
    """About the same number of queries is timed whatever the batch, one of each sample at least."""
    calls: list[int] = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        calls.append(len(output))
        return squared_error(output, target)

    x, y = (tensor[:1].repeat(batch, *(1,) * (tensor.dim() - 1)) for tensor in tokens)
    strategy = bound(token_network(), loss, [{"stages": ["0", "1"]}, {"stages": ["2", "4"]}], variant="antithetic")
    clean = strategy.clean_pass(x, y)
    calls.clear()
    strategy.sample_statistics(clean, {"measured_costs"})
    assert sum(calls) == 2 * 4 * max(TIMED_ROWS, 2 * batch)


def test_it_is_measured_once_and_changes_no_estimate(tokens_net, tokens, monkeypatch):
    found: list[dict[str, Any]] = []
    for names in ({"measured_costs"}, set()):
        strategy = bound(tokens_net, squared_error, TOKEN_SITES["block"])
        clean = strategy.clean_pass(*tokens)
        first = strategy.sample_statistics(clean, names).measured_costs
        strategy.estimate(clean)
        found.append(gradients(tokens_net))
        if names:
            monkeypatch.delattr("flops_lightning.strategies.observing_strategy.measured_costs")  # else a NameError
            again = strategy.sample_statistics(strategy.clean_pass(*tokens), names).measured_costs
            torch.testing.assert_close(again, first, rtol=0, atol=0)
            monkeypatch.undo()
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())
