from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from flops_lightning.queries import EMBEDDING_FEATURES
from flops_lightning.strategies import LikelihoodRatio, SiteSpec
from tests.reference.networks import cross_entropy


def per_sample(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(outputs, targets, reduction="none")


def bound(network: nn.Module, **settings: object) -> LikelihoodRatio:
    from flops_lightning.network.staging import stage_network

    strategy = LikelihoodRatio(seed=0, **settings)
    strategy.bind(stage_network(network), per_sample)
    return strategy


def test_attention_pooling_is_counted_and_leaves_parameters_trainable():
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=3, num_heads=2,
        num_classes=3, global_pool="map", class_token=False,
    )  # fmt: skip
    strategy = bound(vit)
    strategy.estimate(strategy.clean_pass(torch.randn(4, 1, 8, 8), torch.randint(3, (4,))))
    assert all(p.requires_grad and p.grad is not None for p in vit.parameters())


def test_forward_equivalents_of_layers_of_equal_cost():
    network = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(4)))
    sites = [SiteSpec(stages=[str(i)], kind="block", queries_per_sample=10) for i in range(4)]
    strategy = bound(network, sites=sites)
    strategy.estimate(strategy.clean_pass(torch.randn(8, 4), torch.randint(4, (8,))))
    cost = {name: count.forward_equivalents for name, count in strategy.meter.sites.items()}
    assert cost["clean"] == 8
    for i in range(4):
        queries, vjp = 8 * 10 * (3 - i) / 4, 8 * 3 / 4
        assert cost[str(i)] == pytest.approx(queries + vjp)


def test_a_large_embedding_is_averaged_down():
    network = nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(4 * 2500, 3))
    strategy = bound(network)
    clean = strategy.clean_pass(torch.randn(2, 2500, 4), torch.randint(3, (2,)))
    assert clean.embedding.shape == (2, EMBEDDING_FEATURES)


def test_autocast_does_not_reuse_weights_from_before_an_update():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    strategy = bound(network, sites=[SiteSpec(stages=["0"]), SiteSpec(stages=["2"])], update="site_by_site")
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
    strategy = bound(
        network, sites=[{"stages": ["0"]}, {"stages": ["2"], "name": "top"}], pilots={"sites": "top", "queries": 4}
    )
    assert [site.name for site in strategy.sites] == ["0", "top"]
    assert strategy.budget.queries_per_sample == (20, 16)


def test_default_sites_skip_what_is_frozen_and_stages_without_parameters():
    network = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3), nn.LogSoftmax(1))
    assert bound(network).sites[-1].parameters.keys() == {"3.weight", "3.bias"}
    vit = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=3, num_heads=2)
    for parameter in (*vit.head.parameters(), *vit.norm.parameters()):
        parameter.requires_grad_(False)
    assert [site.name for site in bound(vit).sites] == ["group1", "group2", "group3"]
