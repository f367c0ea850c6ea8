"""Stages with other tensors in the place of their parameters."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.network.functional import FunctionalStages
from flops_lightning.network.staging import Stage, StagedNetwork, stage_network
from tests.reference.footprint import everything
from tests.reference.networks import shaken


class Tied(nn.Module):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 3), nn.Linear(3, 3, bias=False)
        self.down.weight = self.up.weight
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh()) + self.shift


def network() -> nn.Sequential:
    return shaken(nn.Sequential(nn.Linear(3, 3), Tied(), nn.Linear(3, 2)))


def others(net: nn.Module, prefix: str) -> dict[str, Tensor]:
    """New values for the parameters below a name."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in net.named_parameters()
        if name.startswith(prefix)
    }


X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3)


def by_hand(values: dict[str, Tensor], x: Tensor) -> Tensor:
    weight = values["1.up.weight"]
    return (x @ weight.T + values["1.up.bias"]).tanh() @ weight.T + values["1.shift"]


def test_a_stage_runs_with_what_it_is_given():
    """Under every name of a tied weight, and whatever is not given stays."""
    net = network()
    functional = FunctionalStages(stage_network(net))
    values = others(net, "1.")
    torch.testing.assert_close(functional.run(1, X, values), by_hand(values, X))
    shift = {"1.shift": values["1.shift"]}
    torch.testing.assert_close(functional.run(1, X, shift), by_hand({**dict(net.named_parameters()), **shift}, X))


def test_without_values_it_is_the_stage_itself():
    net = network()
    staged = stage_network(net)
    for i in range(len(staged)):
        assert torch.equal(FunctionalStages(staged).run(i, X, {}), net[i](X))


@pytest.mark.parametrize("fails", [False, True])
def test_the_network_stays_as_it_was(fails):
    net = network()

    def hook(*_: Any) -> None:
        if fails:
            raise ArithmeticError

    net[1].down.register_forward_hook(hook)
    functional = FunctionalStages(stage_network(net))
    before = everything(net)
    with torch.no_grad(), pytest.raises(ArithmeticError) if fails else nullcontext():
        functional.run(1, X, others(net, "1."))
    assert everything(net) == before
    assert net[1].up.weight is net[1].down.weight


def test_hooks_of_the_stage_s_modules_run():
    net = network()
    net[1].up.register_forward_hook(lambda _, __, output: 2 * output)
    values = others(net, "1.")
    found = FunctionalStages(stage_network(net)).run(1, X, values)
    weight = values["1.up.weight"]
    expected = (2 * (X @ weight.T + values["1.up.bias"])).tanh() @ weight.T + values["1.shift"]
    torch.testing.assert_close(found, expected)


def test_values_may_carry_tangents():
    net = network()
    functional = FunctionalStages(stage_network(net))
    values, tangents = others(net, "1."), {n: torch.ones_like(v) for n, v in others(net, "1.").items()}

    def along(t: Tensor) -> Tensor:
        return functional.run(1, X, {name: value + t * tangents[name] for name, value in values.items()})

    def along_by_hand(t: Tensor) -> Tensor:
        return by_hand({name: value + t * tangents[name] for name, value in values.items()}, X)

    zero, one = torch.zeros((), dtype=X.dtype), torch.ones((), dtype=X.dtype)
    found = torch.func.jvp(along, (zero,), (one,))[1]
    torch.testing.assert_close(found, torch.func.jvp(along_by_hand, (zero,), (one,))[1])


def test_values_may_be_batched():
    """One set of parameters a row."""
    net = network()
    functional = FunctionalStages(stage_network(net))
    values = {name: torch.stack([value, -value, 2 * value, 0 * value]) for name, value in others(net, "1.").items()}
    found = torch.func.vmap(lambda x, own: functional.run(1, x[None], own)[0])(X, values)
    for b in range(4):
        torch.testing.assert_close(found[b], by_hand({name: value[b] for name, value in values.items()}, X[b]))


def test_stages_that_are_not_modules():
    """A function of a network's modules, as the stages of a ViT are."""
    net = network()
    stages = (
        Stage("first", lambda x: net[1](net[0](x)), ("0", "1")),
        Stage("last", lambda x: net[2](x).relu(), ("2",)),
    )
    functional = FunctionalStages(StagedNetwork(net, stages))
    values = others(net, "")
    first = {name: value for name, value in values.items() if not name.startswith("2.")}
    entered = X @ values["0.weight"].T + values["0.bias"]
    torch.testing.assert_close(functional.run(0, X, first), by_hand(values, entered))
    last = {name: value for name, value in values.items() if name.startswith("2.")}
    torch.testing.assert_close(functional.run(1, X, last), (X @ last["2.weight"].T + last["2.bias"]).relu())
