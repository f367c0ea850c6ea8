"""Forward gradients with directions in the activity (and what both kinds share): exact derivatives, no width.

Directions in the weights are compared with the slow reference in ``test_parameter_perturbation.py``.
"""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.strategies import EvolutionStrategies, ForwardMode, LikelihoodRatio, PilotSpec, WeightForwardMode
from tests.reference.layouts import VIT_SITES, convolutional, vit_for
from tests.reference.likelihood_ratio import assert_equals_reference
from tests.reference.networks import TokenMean, cross_entropy, estimated, gradients, normal, shaken, squared_error
from tests.reference.networks import bound_to as bound

KINDS: dict[str, dict[str, Any]] = {
    "group": {},
    "block": {"kind": "block"},
    "linear": {"kind": "linear"},
    "together": {"kind": "linear", "together": True},
}
COUNTS = torch.tensor([3, 0, 5, 2])


def over(first: str, last: str, kind: str) -> list[dict[str, Any]]:
    """One range of stages; groups may not span the whole network."""
    if kind == "group":
        return [{"stages": [first]}, {"stages": [str(int(first) + 1), last]}]
    return [{"stages": [first, last], **KINDS[kind]}]


def without_width(sites: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in site.items() if name != "sigma"} for site in sites]


@pytest.mark.parametrize("layout", VIT_SITES)
def test_vit(layout, images):
    vit = vit_for(layout)
    strategy = bound(ForwardMode, vit, cross_entropy, without_width(VIT_SITES[layout]), chunk_rows=4)
    table = torch.stack([COUNTS.roll(s) for s in range(len(strategy.sites))])
    assert_equals_reference(vit, strategy, *images, table)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_tokens(batch, kind, tokens_net, tokens):
    strategy = bound(ForwardMode, tokens_net, squared_error, over("0", "4", kind), chunk_rows=3)
    x, y = tokens
    for rank in (0, 2):
        strategy.rank = rank
        assert_equals_reference(tokens_net, strategy, x[:batch], y[:batch], COUNTS[:batch])


@pytest.mark.parametrize("kind", ["block", "linear", "together"])
def test_convolutions(kind, images):
    net = convolutional()
    strategy = bound(ForwardMode, net, cross_entropy, over("0", "6", kind), chunk_rows=3)
    assert_equals_reference(net, strategy, *images, COUNTS)


LAYOUTS = [{}, {"layout": "factored", "rank": 2}, {"layout": "factored", "activation_guided": True}]
BOTH: list[tuple[type[Any], dict[str, Any], str]] = [
    *((ForwardMode, {}, kind) for kind in KINDS),
    *((WeightForwardMode, layout, "group") for layout in LAYOUTS),
]


@pytest.mark.filterwarnings("ignore:.*nested tensor")
@pytest.mark.parametrize(("kind", "settings", "sites"), [*BOTH, (ForwardMode, {}, "transformer")])
def test_it_is_the_difference_of_losses_as_sigma_goes_to_0(kind, settings, sites, tokens_net, tokens):
    """Torch's own transformer layers have a fast path without a forward derivative."""
    net, (x, y), layout = tokens_net, tokens, over("0", "4", "block" if sites == "transformer" else sites)
    if sites == "transformer":
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
        net, layout = shaken(nn.Sequential(layer, TokenMean(), nn.Linear(4, 2))), over("0", "2", "block")
        x = normal(4, 3, 4, seed=2)
    _, found = estimated(bound(kind, net, squared_error, layout, **settings), x, y, COUNTS)
    narrow = [{**site, "sigma": 1e-7} for site in layout]
    differences = LikelihoodRatio if kind is ForwardMode else EvolutionStrategies
    _, expected = estimated(bound(differences, net, squared_error, narrow, **settings), x, y, COUNTS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


def zero_one_error(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) != target).to(output)


def outside_of_torch(output: Tensor, target: Tensor) -> Tensor:
    return torch.from_numpy(output.numpy() ** 2).sum(1) + target


@pytest.mark.parametrize("kind", [ForwardMode, WeightForwardMode])
@pytest.mark.parametrize("loss", [zero_one_error, outside_of_torch])
def test_a_loss_without_a_slope_is_refused(loss, kind, tokens_net, tokens):
    """Smoothing is what noise of some width adds; without it the 0-1 error has no gradient."""
    x, y = tokens[0], torch.tensor([0, 1, 0, 1])
    with pytest.raises(SettingError, match=f"loss = '{loss.__name__}': has no derivative.* such as LikelihoodRatio"):
        bound(kind, tokens_net, loss, over("0", "4", "group")).clean_pass(x, y)
    wide = bound(EvolutionStrategies, tokens_net, zero_one_error, over("0", "4", "group"), sigma=1.0)
    assert estimated(wide, x, y)[1]["4.weight"].abs().max() > 0


@pytest.mark.parametrize(("kind", "settings", "sites"), BOTH)
def test_a_width_has_no_effect_and_is_warned_of(kind, settings, sites, tokens_net, tokens):
    chosen = over("0", "4", sites)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, expected = estimated(bound(kind, tokens_net, squared_error, chosen, **settings), *tokens, COUNTS)
    with pytest.warns(UserWarning, match=r"sites\[.\].sigma = 3 has no effect: derivatives are exact"):
        wide = bound(kind, tokens_net, squared_error, [{**site, "sigma": 3.0} for site in chosen], **settings)
    torch.testing.assert_close(estimated(wide, *tokens, COUNTS)[1], expected, rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "settings", "sites"), BOTH)
@pytest.mark.filterwarnings("ignore:.*lost every query")
def test_a_sample_without_a_finite_derivative_contributes_nothing(kind, settings, sites, tokens_net, tokens):
    """Its loss is finite, but has no slope: the root of zero."""
    x, y = tokens
    y = y.clone()
    y[2] = tokens_net.eval()(x).detach()[2]

    def distance(output: Tensor, target: Tensor) -> Tensor:
        return squared_error(output, target).sqrt()

    strategy = bound(kind, tokens_net, distance, over("0", "4", sites), **settings)
    clean = strategy.clean_pass(x, y)
    assert clean.loss.isfinite().all()
    estimate = strategy.estimate(clean, torch.full((4,), 4))
    found = gradients(tokens_net)
    assert (estimate.lost, estimate.silent_samples) == (4 * len(strategy.sites), len(strategy.sites))
    strategy.estimate(clean, torch.tensor([4, 4, 0, 4]))
    torch.testing.assert_close(gradients(tokens_net), found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "together"])
def test_pilots_and_a_resumed_run(kind, tokens_net, tokens):
    settings = {"pilots": PilotSpec("lowest", 4), "seed": 3}

    def step(strategy: ForwardMode) -> dict[str, Tensor | None]:
        clean = strategy.clean_pass(*tokens)
        assert (strategy.pilot_traces(clean).trace[0] > 0).all()
        strategy.estimate(clean, torch.tensor([2, 4, 6, 2]))
        return gradients(tokens_net)

    first, resumed = (bound(ForwardMode, tokens_net, squared_error, over("0", "4", kind), **settings) for _ in range(2))
    step(first)
    resumed.load_state_dict(first.state_dict())
    second = step(first)
    torch.testing.assert_close(step(resumed), second, rtol=0, atol=0)
