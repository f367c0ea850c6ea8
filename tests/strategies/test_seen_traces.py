"""Traces that an estimate's own queries show, against the sample variance of gradients built one by one."""

import math

import pytest
import torch

from flops_lightning.strategies import PilotSpec
from tests.reference.layouts import COUNTS, TOKEN_SITES, VIT_SITES
from tests.reference.likelihood_ratio import assert_seen, reference_traces
from tests.reference.networks import bound, cross_entropy, freeze, gradients, squared_error, tiny_vit


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
    assert joined.trace.isfinite().tolist() == [[True, True, False, True]] * 3
    assert joined.queries[joined.trace.isfinite()].tolist() == [3.0, 1.0, 4.0] * 3
