"""Estimates with Philox on the CPU: unbiased, whatever the chunks and ranks, and resumed with the same numbers."""

import warnings
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.strategies import (
    SPSA,
    CoordinateFiniteDifferences,
    EvolutionStrategies,
    ForwardMode,
    LikelihoodRatio,
    MeZO,
    WeightForwardMode,
)
from flops_lightning.strategies.base import ForwardGradientStrategy
from tests.reference.layouts import TOKEN_SITES
from tests.reference.networks import assert_entries, bound, bound_to, gradients, squared_error, token_network

LAYOUTS = [*TOKEN_SITES]
OTHERS = {
    "forward mode": ForwardMode,
    "ES": EvolutionStrategies,
    "SPSA": SPSA,
    "SPSA, factored": partial(SPSA, layout="factored"),
    "weights, forward mode": WeightForwardMode,
}


def grads_of(strategy: ForwardGradientStrategy, x: Tensor, y: Tensor, steps: int = 1) -> dict[str, Any]:
    for _ in range(steps):
        gradients(strategy.network.module)
        strategy.estimate(strategy.clean_pass(x, y))
    return gradients(strategy.network.module)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_estimates_are_unbiased_and_chunks_may_be_cut_anywhere(layout, tokens):
    """The mean over draws is the gradient; with this sigma the bias of the smoothing is far below its error."""
    x, y = tokens
    net = token_network()
    sites = [{**site, "sigma": 1e-3} for site in TOKEN_SITES[layout]]
    strategy = bound(net, lambda h, _: h.sum(1), sites, generator="philox", chunk_rows=1000)
    exact = torch.autograd.grad(net(x).sum(1).mean(), list(net.parameters()), allow_unused=True)
    draws: dict[str, list[Tensor]] = {}
    for _ in range(60):
        for name, gradient in grads_of(strategy, x, y).items():
            if gradient is not None:
                draws.setdefault(name, []).append(gradient)
    for (name, _), derivative in zip(net.named_parameters(), exact, strict=True):
        if name in draws and derivative is not None:
            found = torch.stack(draws[name])
            bias = (found.mean(0) - derivative).flatten()
            error = found.std(0).flatten() / len(found) ** 0.5
            assert float(bias.norm()) < 3 * float(error.norm()) + 1e-9, name
    whole, parts = (
        grads_of(bound(net, squared_error, TOKEN_SITES[layout], generator="philox", chunk_rows=rows), x, y)
        for rows in (1000, 3)
    )
    assert_entries(parts, whole, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", OTHERS)
def test_every_estimator_draws_with_it(name, tokens):
    x, y = tokens
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {
            setting: grads_of(
                bound_to(OTHERS[name], token_network(), squared_error, TOKEN_SITES["group"], generator=setting), x, y
            )
            for setting in ("auto", "torch", "philox")
        }
    assert_entries(found["auto"], found["torch"])
    assert not any(torch.allclose(found["philox"][key], g) for key, g in found["torch"].items())


def test_mezo_draws_with_it_and_masks_need_none(tokens):
    from flops_lightning.network.staging import stage_network

    x, y = tokens
    found = {}
    for setting in ("auto", "philox"):
        strategy = MeZO(seed=0, generator=setting)
        strategy.bind(stage_network(token_network()), squared_error)
        found[setting] = grads_of(strategy, x, y)
        assert strategy.state_dict()["generator"] == ("philox" if setting == "philox" else "torch on cpu")
    assert not torch.allclose(found["auto"]["0.weight"], found["philox"]["0.weight"])
    with pytest.raises(TypeError, match="generator"):
        CoordinateFiniteDifferences(generator="philox")


def test_a_resumed_run_goes_on_with_the_same_numbers_and_refuses_others(tokens):
    x, y = tokens

    def made(**settings: Any) -> LikelihoodRatio:
        return bound(token_network(), squared_error, TOKEN_SITES["group"], **settings)

    first, second = made(generator="philox"), made(generator="philox")
    grads_of(first, x, y, steps=2)
    second.load_state_dict(first.state_dict())
    assert_entries(grads_of(second, x, y), grads_of(first, x, y))
    other = made()
    other.load_state_dict(first.state_dict())
    with pytest.raises(SettingError, match=r"generator = 'auto'.* with philox, .*Write generator: philox"):
        other.clean_pass(x, y)
    older = made(generator="philox")
    older.load_state_dict({key: value for key, value in first.state_dict().items() if key != "generator"})
    older.clean_pass(x, y)


def test_ranks_draw_different_noise(tokens):
    x, y = tokens
    by_rank = []
    for rank in (0, 1):
        strategy = bound(token_network(), squared_error, TOKEN_SITES["group"], generator="philox")
        strategy.rank = rank
        by_rank.append(grads_of(strategy, x, y))
    assert not any(torch.allclose(by_rank[0][name], by_rank[1][name]) for name in by_rank[0])
