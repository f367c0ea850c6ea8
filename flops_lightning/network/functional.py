"""Stages as functions of their parameters, and derivatives along a direction in forward mode."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from flops_lightning.network.staging import Stage, StagedNetwork


class _StageModule(nn.Module):
    """One stage in the form that ``functional_call`` takes: it holds the whole network, under its own names."""

    def __init__(self, network: nn.Module, stage: Stage) -> None:
        super().__init__()
        self.network, self.stage = network, stage

    def forward(self, function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        return function(*inputs)


class FunctionalStages:
    """Runs the stages of a network with given tensors in place of parameters, to which nothing is ever written."""

    def __init__(self, network: StagedNetwork) -> None:
        """Look up the names of each parameter: tied weights have several, but those of a shared module one."""
        self._stages = [_StageModule(network.module, stage) for stage in network.stages]
        names: dict[int, list[str]] = {}
        for path, owner in network.module.named_modules(prefix="network"):
            for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
                names.setdefault(id(parameter), []).append(f"{path}.{name}")
        self._aliases = {name: names[id(parameter)] for name, parameter in network.module.named_parameters()}

    def run(self, stage: int, x: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Output of one stage with tensors by the name of the parameter of this stage that they replace."""
        run = self._stages[stage].stage.run
        return self._call(stage, values, run, x) if values else run(x)

    def context(self, stage: int, values: Mapping[str, Tensor]) -> Tensor:
        """Context of a stage that has one, with tensors in the place of parameters, ``(m, ...)`` for ``m`` of them."""
        context = self._stages[stage].stage.context
        if context is None:
            raise TypeError(f"{self._stages[stage].stage.name} has no context.")
        return self._call(stage, values, context.compute)

    def _call(self, stage: int, values: Mapping[str, Tensor], function: Callable[..., Tensor], *inputs: Any) -> Tensor:
        aliased = {alias: value for name, value in values.items() for alias in self._aliases[name]}
        output: Tensor = functional_call(self._stages[stage], aliased, (function, *inputs), tie_weights=False)
        return output


def directional_derivative(function: Callable[[Tensor], Any], direction: Tensor, *, has_aux: bool = False) -> Any:
    """Derivative of ``function`` at 0 along ``direction`` by ``torch.func.jvp``; ``has_aux``: also its second output.

    Attention runs as products and a softmax meanwhile: neither fused kernel of torch has a forward derivative.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            # The annotation of jvp leaves out what `has_aux` adds.
            found: Any = torch.func.jvp(function, (torch.zeros_like(direction),), (direction,), has_aux=has_aux)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return found[1:] if has_aux else found[1]
