"""What an estimate leaves alone: parameters bit by bit and in their place, hooks, modes, generators, the batch."""

import contextlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import CoordinateFiniteDifferences, ForwardMode, LikelihoodRatio, MeZO
from tests.reference.footprint import everything
from tests.reference.networks import Prompted, TokenMean, gradients, shaken, squared_error
from tests.reference.parameter_perturbation import LAYOUTS, STRATEGIES

SITES: dict[str, list[dict[str, Any]]] = {
    "group": [{"stages": ["0", "2"]}, {"stages": ["3", "5"]}],
    "block": [{"stages": ["0", "5"], "kind": "block"}],
    "linear": [{"stages": ["0", "5"], "kind": "linear"}],
    "together": [{"stages": ["0", "5"], "kind": "linear", "together": True}],
}
CASES: dict[str, tuple[type[Any], dict[str, Any]]] = {
    **{f"activations, {kind}": (LikelihoodRatio, {"sites": sites}) for kind, sites in SITES.items()},
    **{f"forward mode, {kind}": (ForwardMode, {"sites": sites}) for kind, sites in SITES.items()},
    **{
        f"{name}, {layout}": (kind, {"sites": SITES["group"], **own, **settings})
        for name, (kind, own) in STRATEGIES.items()
        for layout, settings in LAYOUTS.items()
    },
    "MeZO": (MeZO, {"queries": 4}),
    "coordinates": (CoordinateFiniteDifferences, {"coordinates": 20, "grasp_queries": 2, "scheme": "central"}),
}


def network_with_habits(*, prompts: bool) -> nn.Sequential:
    """Modes that differ, a hook, a frozen parameter, dropout, parameters of no layer, a stage that works in place."""
    layer, norm = Prompted() if prompts else nn.Linear(3, 3), nn.Sequential(nn.LayerNorm(3), nn.Dropout(0.5))
    stages = (nn.Hardtanh(-1.0, 1.0, inplace=True), nn.Linear(3, 3), layer, norm, TokenMean(), nn.Linear(3, 2))
    net = shaken(nn.Sequential(*stages)).train()
    net[3][0].eval()
    net[1].bias.requires_grad_(False)
    net[5].register_forward_hook(lambda *_: None)
    return net


@pytest.mark.parametrize("name", CASES)
def test_the_network_stays_as_it_was(name, tokens):
    """Also where an estimate fails: in the loss, or inside a site whose parameters are replaced."""
    kind, settings = CASES[name]
    net, (x, y) = network_with_habits(prompts="linear" not in name and "together" not in name), tokens
    where, at, calls = "", 0, itertools.count(1)

    def fails(here: str) -> None:
        if here == where and next(calls) == at:
            raise ArithmeticError

    def loss(output: Tensor, target: Tensor) -> Tensor:
        fails("loss")
        return squared_error(output, target)

    net[2].register_forward_hook(lambda *_: fails("stage"))
    strategy, batch = kind(**settings, chunk_rows=4, seed=7), x.clone()
    strategy.bind(stage_network(net), loss)
    for point, call in (("loss", 1), ("loss", 3), ("stage", 2), ("stage", 3), ("nowhere", 0)):
        where = ""
        clean = strategy.clean_pass(batch, y)
        before, kept = everything(net), {i: h.clone() for i, h in clean.activations.items()}
        where, at, calls = point, call, itertools.count(1)
        with pytest.raises(ArithmeticError) if call else contextlib.nullcontext():
            strategy.estimate(clean)
        found = gradients(net)
        assert everything(net) == before
        torch.testing.assert_close((batch, clean.activations), (x, kept), rtol=0, atol=0)
        assert found.pop("1.bias") is None
        assert {gradient is None for gradient in found.values()} == {bool(call)}
    assert not any(gradient.requires_grad for gradient in (*found.values(), clean.loss))
