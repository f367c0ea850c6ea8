"""Stages with other tensors in the place of their parameters."""

import torch
from torch import Tensor, nn

from flops_lightning.network.functional import FunctionalStages
from flops_lightning.network.staging import Stage, StagedNetwork, stage_network
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


def test_a_module_under_two_names_keeps_its_parameters():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(3, 3)
            self.alias = self.body

        def forward(self, x: Tensor) -> Tensor:
            return self.alias(self.body(x))

    net = shaken(nn.Sequential(Twice()))
    before, values = dict(net.named_parameters(remove_duplicate=False)), others(net, "0.")
    weight, bias = values["0.body.weight"], values["0.body.bias"]
    found = FunctionalStages(stage_network(net)).run(0, X, values)
    torch.testing.assert_close(found, (X @ weight.T + bias) @ weight.T + bias)
    assert all(p is before[name] for name, p in net.named_parameters(remove_duplicate=False))


def test_hooks_of_the_stage_s_modules_run():
    net = network()
    net[1].up.register_forward_hook(lambda _, __, output: 2 * output)
    values = others(net, "1.")
    found = FunctionalStages(stage_network(net)).run(1, X, values)
    weight = values["1.up.weight"]
    expected = (2 * (X @ weight.T + values["1.up.bias"])).tanh() @ weight.T + values["1.shift"]
    torch.testing.assert_close(found, expected)


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
