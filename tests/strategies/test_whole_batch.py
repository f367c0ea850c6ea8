"""What Backprop, MeZO and CoordinateFiniteDifferences have in common: nothing to allocate, one update, a lost batch."""

import contextlib
import io
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import Backprop, CoordinateFiniteDifferences, MeZO
from tests.reference.networks import autograd_gradient, gradients, squared_error

MAKE: dict[str, Any] = {
    "Backprop": Backprop,
    "MeZO": partial(MeZO, sigma=0.1, seed=7),
    "CoordinateFiniteDifferences": partial(CoordinateFiniteDifferences, coordinates=20, grasp_queries=6, seed=7),
}
WHY = {
    "Backprop": "spends no queries",
    "MeZO": "gives all samples the same directions",
    "CoordinateFiniteDifferences": "measures every coordinate on every sample",
}
every = pytest.mark.parametrize("name", MAKE)
seeded = pytest.mark.parametrize("name", ["MeZO", "CoordinateFiniteDifferences"])


def bound(name: str, module: nn.Module, loss: Any = squared_error, **settings: Any) -> Any:
    strategy = MAKE[name](**settings)
    strategy.bind(stage_network(module), loss)
    return strategy


@every
@pytest.mark.parametrize(
    ("asked", "setting"),
    [
        ({"counts": torch.full((4,), 2)}, r"counts = \(4,\)"),
        ({"pilot_weight": torch.ones(4)}, "counts = None"),
        ({"traces": True}, "counts = None"),
    ],
)
def test_there_is_nothing_to_allocate(name, asked, setting, tokens_net, tokens):
    strategy = bound(name, tokens_net)
    clean = strategy.clean_pass(*tokens)
    with pytest.raises(SettingError, match=rf"{setting}: {name} {WHY[name]}\. Remove the allocator"):
        strategy.estimate(clean, **asked)
    assert set(gradients(tokens_net).values()) == {None}


@every
def test_there_is_one_update_and_no_statistics(name, tokens_net, tokens):
    strategy = bound(name, tokens_net)
    clean = strategy.clean_pass(*tokens)
    names = ("all",) if name == "MeZO" else ()
    assert (tuple(site.name for site in strategy.sites), strategy.budget) == (names, None)
    assert strategy.update_groups == (names,)
    assert strategy.pilot_traces(clean) is None
    instead = "use SPSA" if name == "MeZO" else "such as LikelihoodRatio"
    with pytest.raises(SettingError, match=rf"{name} {WHY[name]} \(batch of 4.*\['scale'\].*Remove.*{instead}"):
        strategy.sample_statistics(clean, {"scale"})
    own = "has the site 'all' alone" if name == "MeZO" else "has no sites"
    with pytest.raises(SettingError, match=rf"sites = \['typo'\]: {name} {own}"):
        strategy.estimate(clean, sites=["typo"])
    with pytest.raises(RuntimeError, match="one update group, nothing to refresh"):
        strategy.refresh(clean, ["all"])


@every
def test_a_frozen_network_is_refused(name, tokens_net):
    with pytest.raises(SettingError, match=r"^freeze = .*leaves nothing to train\. Freeze less"):
        bound(name, tokens_net.requires_grad_(False))


@every
@pytest.mark.filterwarnings("ignore:.*lost every query")
def test_a_lost_batch_touches_no_gradient(name, tokens_net, tokens):
    strategy = bound(name, tokens_net)
    before = tokens_net[0].weight.grad = torch.ones_like(tokens_net[0].weight)
    estimate = strategy.estimate(strategy.clean_pass(tokens[0] * math.nan, tokens[1]))
    assert (estimate.lost_batch, estimate.silent_samples) == (True, 4)
    assert estimate.lost == (8 if name == "MeZO" else 0)
    assert tokens_net[0].weight.grad is before
    assert (before == 1).all()
    assert all(p.grad is None for key, p in tokens_net.named_parameters() if key != "0.weight")
    assert strategy.draw == 1, "the next batch must draw other noise"
    if name == "CoordinateFiniteDifferences":
        assert strategy.state_dict()["ratios"] is None, "such a batch must not decide the ratios of the run"
        strategy.estimate(strategy.clean_pass(*tokens))
        assert set(strategy.state_dict()["ratios"]) == {key for key, _ in tokens_net.named_parameters()}


@pytest.mark.parametrize("name", ["Backprop", "CoordinateFiniteDifferences"])
def test_a_sample_without_a_finite_loss_contributes_nothing(name, tokens_net, tokens):
    """Zero times the NaN of its activations would be NaN in every weight."""
    (x, y), rest = tokens, torch.tensor([0, 1, 3])
    x = x.clone()
    x[2, 1, 0] = math.nan
    exact, entries = autograd_gradient(tokens_net, squared_error, x[rest], y[rest]), 0
    settings = {}
    if name != "Backprop":
        entries = sum(p.numel() for p in tokens_net.parameters())
        settings = {"coordinates": entries, "scheme": "central", "step": 1e-5}
    strategy = bound(name, tokens_net, **settings)
    clean = strategy.clean_pass(x, y)
    with contextlib.nullcontext() if not entries else pytest.warns(RuntimeWarning, match="1 samples lost every query"):
        estimate = strategy.estimate(clean)
    expected = {key: gradient * 3 / 4 for key, gradient in exact.items()}
    torch.testing.assert_close(gradients(tokens_net), expected, rtol=0, atol=1e-8)
    assert (estimate.silent_samples, estimate.lost, estimate.lost_batch) == (1, 2 * entries, False)


@every
def test_estimates_add_up_in_grad(name, tokens_net, tokens):
    strategy = bound(name, tokens_net)
    for _ in range(2 if name == "Backprop" else 1):
        strategy.estimate(strategy.clean_pass(*tokens))
    if name != "Backprop":  # whose graph is gone after one
        strategy.draw = 0
        strategy.estimate(strategy.clean_pass(*tokens), sites=[site.name for site in strategy.sites])
    twice = gradients(tokens_net)
    strategy.draw = 0
    strategy.estimate(strategy.clean_pass(*tokens))
    torch.testing.assert_close(twice, {key: 2 * gradient for key, gradient in gradients(tokens_net).items()})


@seeded
def test_a_resumed_run_draws_the_same(name, tokens_net, tokens):
    def step(strategy: Any) -> dict[str, Tensor]:
        strategy.estimate(strategy.clean_pass(*tokens))
        return gradients(tokens_net)

    first = bound(name, tokens_net, seed=3)
    step(first)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    state, second = torch.load(file, weights_only=True), step(first)
    draws = "noise" if name == "MeZO" else "masks"
    with pytest.raises(SettingError, match=rf"strategy.seed = 99: .* {draws} from the seed 3. Leave .* or write 3"):
        bound(name, tokens_net, seed=99).load_state_dict(state)
    resumed = bound(name, tokens_net, seed=None)
    resumed.load_state_dict(state)
    torch.testing.assert_close(step(resumed), second, rtol=0, atol=0)
    assert resumed.state_dict() == first.state_dict()


@seeded
def test_the_seed_is_that_of_seed_everything(name):
    torch.manual_seed(1234)
    assert MAKE[name](seed=None).seed == 1234
    assert MAKE[name](seed=5).seed == 5
