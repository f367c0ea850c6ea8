"""The fast path equals a slow, obvious implementation: equality in float64, not statistics."""

import pytest
import torch

from flops_lightning.strategies import PilotSpec
from tests.reference.layouts import COUNTS, SIGMA, VIT_SITES, convolutional, vit_for
from tests.reference.likelihood_ratio import assert_equals_reference, assert_seen, reference_gradient
from tests.reference.networks import assert_entries, bound, cross_entropy, gradients, tiny_vit

CASES = [
    (variant, layout)
    for variant in COUNTS
    for layout in VIT_SITES
    if (variant, layout) != ("leave_one_out", "together")
]


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_vit(variant, layout, images):
    vit = vit_for(layout)
    strategy = bound(vit, cross_entropy, VIT_SITES[layout], variant=variant, chunk_rows=4)
    base = torch.tensor(COUNTS[variant])
    # Counts of its own for every site: each must read its own line of the table.
    table = torch.stack([base.roll(s) for s in range(len(strategy.sites))])
    assert_equals_reference(vit, strategy, *images, table)
    if layout != "together":
        assert_seen(vit, strategy, *images, table)


@pytest.mark.parametrize("layout", ["group", "together"])
@pytest.mark.parametrize("variant", ["baseline", "antithetic"])
def test_mean_of_patch_tokens_with_register_tokens(variant, layout, images):
    vit = vit_for(layout, global_pool="avg", reg_tokens=2)
    strategy = bound(vit, cross_entropy, VIT_SITES[layout], variant=variant, chunk_rows=6)
    assert strategy.sites[1].tokens == slice(3, None) or strategy.sites[1].layers
    assert_equals_reference(vit, strategy, *images, torch.tensor(COUNTS[variant]))
    if layout != "together":
        assert_seen(vit, strategy, *images, torch.tensor(COUNTS[variant]))


@pytest.mark.parametrize("layout", ["group", "linear", "together"])
def test_all_tokens_on_request(layout, images):
    vit = vit_for(layout)
    sites = [{**site, "active_tokens": False} for site in VIT_SITES[layout]]
    strategy = bound(vit, cross_entropy, sites, chunk_rows=5)
    assert all(site.tokens is None for site in strategy.sites)
    assert all(layer.tokens is None for site in strategy.sites for layer in site.layers)
    assert_equals_reference(vit, strategy, *images, torch.tensor(COUNTS["baseline"]))
    if layout == "group":
        assert_seen(vit, strategy, *images, torch.tensor(COUNTS["baseline"]))


@pytest.mark.parametrize("stage", ["blocks.0", "blocks.1", "blocks.2"])
@pytest.mark.parametrize("variant", ["baseline", "leave_one_out", "antithetic"])
def test_pilots_that_are_used_again(variant, stage, images):
    vit = tiny_vit()
    sites = [{"stages": ["embed", "head"], "kind": "block", "queries_per_sample": 10, **SIGMA}]
    strategy = bound(vit, cross_entropy, sites, variant=variant, chunk_rows=7, pilots=PilotSpec(stage, 4))
    clean = strategy.clean_pass(*images)
    strategy.pilot_traces(clean)
    counts = COUNTS[variant]
    strategy.estimate(clean, torch.tensor(counts))
    found = gradients(vit)
    for site in strategy.sites:
        pilots = 4 if site.name == stage else 0
        expected = reference_gradient(vit, strategy, site, *images, counts, pilots=pilots)
        assert_entries(found, expected, rtol=1e-9, atol=1e-9)


def test_pilots_that_are_not_used_again_leave_their_noise_alone(vit, images):
    sites = [{"stages": ["embed", "head"], "kind": "block", "queries_per_sample": 10, **SIGMA}]
    pilots = PilotSpec("blocks.0", 4, reuse=False)
    strategy = bound(vit, cross_entropy, sites, pilots=pilots)
    clean = strategy.clean_pass(*images)
    strategy.pilot_traces(clean)
    strategy.estimate(clean)
    found = gradients(vit)
    site = next(site for site in strategy.sites if site.name == "blocks.0")
    ten = reference_gradient(vit, strategy, site, *images, [10] * 4)
    four = reference_gradient(vit, strategy, site, *images, [4] * 4)
    for name, gradient in ten.items():
        torch.testing.assert_close(found[name], (10 * gradient - 4 * four[name]) / 6, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", ["block", "linear", "together"])
def test_convolutions(layout, images):
    net = convolutional()
    kind = {"block": {"kind": "block"}, "linear": {"kind": "linear"}, "together": {"kind": "linear", "together": True}}
    strategy = bound(net, cross_entropy, [{"stages": ["0", "6"], **kind[layout], **SIGMA}], chunk_rows=3)
    assert_equals_reference(net, strategy, *images, torch.tensor([3, 0, 5, 2]))
    if layout != "together":  # traces of the activation: there is no closed form for the gradient's norm
        assert_seen(net, strategy, *images, torch.tensor([3, 0, 5, 2]))
