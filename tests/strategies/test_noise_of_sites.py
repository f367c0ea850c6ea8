"""Kinds of noise at sites of every kind: what each estimates, exactly and on average, and where it is refused."""

import pytest
import torch
from torch import nn

from flops_lightning.errors import SettingError
from flops_lightning.noise.kinds import NoiseSpec
from flops_lightning.strategies import ForwardMode, LikelihoodRatio, PilotSpec, SiteSpec
from tests.reference.layouts import COUNTS, NOISES, TOKEN_SITES, VIT_SITES, convolutional, vit_for
from tests.reference.likelihood_ratio import assert_equals_reference, reference_traces
from tests.reference.networks import (
    assert_entries,
    autograd_gradient,
    bound,
    bound_to,
    cross_entropy,
    estimated,
    gradients,
    squared_error,
    stage_network,
    token_network,
)

KINDS = {name: noise for name, noise in NOISES.items() if name != "gaussian"}
CONVOLUTIONS = [{"stages": ["0", "6"], "kind": "linear", "sigma": 0.1}]
every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        *(("baseline", layout) for layout in VIT_SITES),
        *((v, "block") for v in ("plain", "leave_one_out", "antithetic", "forward mode")),
    ],
)
def test_equals_the_reference(kind, variant, layout, images):
    vit, settings = vit_for(layout), {"chunk_rows": 6, "noise": KINDS[kind]}
    if variant == "forward mode":
        sites = [{"stages": ["embed", "head"], "kind": layout}]
        strategy = bound_to(ForwardMode, vit, cross_entropy, sites, **settings)
    else:
        strategy = bound(vit, cross_entropy, VIT_SITES[layout], variant=variant, **settings)
    base = torch.tensor(COUNTS.get(variant, COUNTS["baseline"]))
    table = torch.stack([base.roll(s) for s in range(len(strategy.sites))])
    assert_equals_reference(vit, strategy, *images, table)


@every_kind
@pytest.mark.parametrize("variant", ["baseline", "antithetic"])
def test_feature_maps(kind, variant, images):
    net = convolutional()
    strategy = bound(net, cross_entropy, CONVOLUTIONS, variant=variant, chunk_rows=6, noise=KINDS[kind])
    assert_equals_reference(net, strategy, *images, torch.tensor(COUNTS[variant]))


@every_kind
def test_traces(kind, images):
    """Summed from each query's gradient, whatever the noise."""
    vit = vit_for("block")
    strategy = bound(vit, cross_entropy, VIT_SITES["block"], noise=KINDS[kind], chunk_rows=7)
    counts = torch.tensor([5, 8, 2, 4])
    clean = strategy.clean_pass(*images)
    seen = strategy.estimate(clean, counts, traces=True).observation
    gradients(vit)
    for i, site in enumerate(strategy.sites):
        expected = reference_traces(vit, strategy, site, *images, counts.tolist(), in_parameters=False)
        torch.testing.assert_close(seen.trace[i], expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("layout", ["group", "block", "linear"])
def test_forward_mode_with_a_basis_of_directions_is_exact(layout, tokens_net, tokens):
    """12 features at 3 tokens of the first layer, 9 of the third, 3 and 2 above: 36 queries are whole bases of each."""
    sites = [SiteSpec(**{k: v for k, v in site.items() if k != "sigma"}) for site in TOKEN_SITES[layout]]
    strategy = ForwardMode(sites=sites, noise=NoiseSpec(orthogonal=True), seed=7)
    strategy.bind(stage_network(tokens_net), squared_error)
    _, found = estimated(strategy, *tokens, torch.tensor([36, 36, 72, 36]))
    assert_entries(found, autograd_gradient(tokens_net, squared_error, *tokens), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("strategy", [LikelihoodRatio, ForwardMode])
def test_a_plain_mapping_is_accepted(strategy):
    assert strategy(noise={"distribution": "rademacher"}).noise == NoiseSpec(distribution="rademacher")
    assert strategy().noise == NoiseSpec()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise": {"distribution": "cauchy"}}, r"strategy.noise.distribution = 'cauchy': is not one of the choices"),
        (
            {"noise": {"shape": "dense"}},
            r"noise = {'shape': 'dense'}: has no setting 'shape'. Choose from distribution, layout",
        ),
        ({"noise": "rademacher"}, r"strategy.noise = 'rademacher': must be NoiseSpec\(\.\.\.\) or a mapping"),
        (
            {"noise": {"orthogonal": True}, "pilots": PilotSpec("deepest", 4)},
            r"strategy.pilots.queries = 4: orthogonal queries depend on the pilots",
        ),
    ],
)
def test_settings_that_are_refused(settings, message):
    for strategy in (LikelihoodRatio, ForwardMode):
        with pytest.raises(SettingError, match=message):
            strategy(**settings)


@pytest.mark.parametrize("kind", ["factored", "factored_rademacher"])
def test_factored_noise_wants_tokens_somewhere(kind, tokens):
    flat_net = nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    sites = [{"stages": ["1"]}, {"stages": ["3"], "kind": "linear"}]
    strategy = bound(flat_net, squared_error, sites, noise=KINDS[kind])
    with pytest.raises(SettingError, match=r"noise.layout = 'factored': no site has more than one token.*Write dense"):
        strategy.clean_pass(*tokens)
    one_is_enough = bound(token_network(), squared_error, TOKEN_SITES["linear"], noise=KINDS[kind])
    assert one_is_enough.clean_pass(*tokens).batch_size == 4
