"""Running a stage with other values of its parameters, without writing to the parameters themselves."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.func import functional_call

from flops_lightning.network.staging import Stage, StagedNetwork


class _StageModule(nn.Module):
    """One stage as a module that ``functional_call`` can call: it holds the whole network, under its own names."""

    def __init__(self, network: nn.Module, stage: Stage) -> None:
        super().__init__()
        self.network = network
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        """Run the stage."""
        return self.stage.run(x)


class ReplacedParameters:
    """Runs stages of a network with given tensors in the place of parameters.

    Nothing is ever written to a parameter, so there is nothing to restore and nothing that could drift. What it costs
    is the memory of the tensors given: those of one stage at a time.
    """

    def __init__(self, network: StagedNetwork) -> None:
        """Note under which names each parameter is found: tied weights have several."""
        self._stages = [_StageModule(network.module, stage) for stage in network.stages]
        names: dict[int, list[str]] = {}
        for name, parameter in network.module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(f"network.{name}")
        self._aliases = {name: names[id(parameter)] for name, parameter in network.module.named_parameters()}

    def run(self, stage: int, x: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Output of one stage.

        Args:
            stage: Its index.
            x: Its input.
            values: Tensors by the names of the parameters that they stand for, all of this stage. They are shaped like
                the parameters, may carry tangents, and need no gradient.
        """
        if not values:
            return self._stages[stage].stage.run(x)
        replaced = {alias: value for name, value in values.items() for alias in self._aliases[name]}
        output: Tensor = functional_call(self._stages[stage], replaced, (x,), tie_weights=False)
        return output
