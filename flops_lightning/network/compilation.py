"""Suffixes compiled by ``torch.compile``, for queries whose chunks have one static shape."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import StagedNetwork

Run = Callable[[Tensor], Tensor]

# Torch gives up on a piece of code after eight shapes, of all networks that share it; newer versions take a limit.
LIMIT: dict[str, Any] = {"recompile_limit": 64} if "recompile_limit" in signature(torch.compile).parameters else {}


class CompiledNetwork(StagedNetwork):
    """A staged network whose suffixes run compiled; everything else (prefixes, local VJPs, hooked layers) does not.

    Blocks of a ViT are compiled one by one, and blocks of one build share what was compiled, so that twelve take no
    longer than one; consecutive modules of an ``nn.Sequential`` are compiled as one. Forward hooks that are added to a
    module after its first compiled run are not seen.
    """

    def __init__(self, network: StagedNetwork) -> None:
        super().__init__(network.module, network.stages)
        self.live = network.live
        self._suffixes: dict[int, list[Run]] = {}
        self._blocks = {
            i: _CompiledBlock(stage.run) for i, stage in enumerate(self.stages) if hasattr(stage.run, "block")
        }

    def compiles(self, start: int) -> bool:
        """Whether anything is compiled of the suffix from ``start``."""
        return any(
            i in self._blocks or isinstance(stage.run, nn.Module) for i, stage in enumerate(self.stages) if i >= start
        )

    def run_suffix(self, x: Tensor, start: int) -> Tensor:
        """Run the stages from ``start`` on, compiled."""
        if start not in self._suffixes:
            self._suffixes[start] = self._parts(start)
        for part in self._suffixes[start]:
            x = part(x)
        return x

    def _parts(self, start: int) -> list[Run]:
        parts: list[Run] = []
        plain: list[nn.Module] = []

        def compile_plain() -> None:
            if plain:
                parts.append(_compiled(nn.Sequential(*plain)))
                plain.clear()

        for i, stage in enumerate(self.stages[start:], start):
            if isinstance(stage.run, nn.Module):
                plain.append(stage.run)
                continue
            compile_plain()
            parts.append(self._blocks.get(i, stage.run))
        compile_plain()
        return parts


class _CompiledBlock:
    """A block of a ViT, compiled; another one that the network has in its place by now is compiled in its turn."""

    def __init__(self, stage: Any) -> None:
        self._stage = stage
        self._known: nn.Module | None = None

    def __call__(self, x: Tensor) -> Tensor:
        block: nn.Module = self._stage.block
        if self._known is not block:
            self._known, self._run = block, _compiled(block)
        return self._run(x)


def _compiled(module: nn.Module) -> Run:
    # Static: automatic dynamic shapes would give up on the second size of chunk what the first one gained.
    run: Run = torch.compile(module, dynamic=False, **LIMIT)
    return run


def check_compiler(device: torch.device, setting: str = "model.strategy.compile_suffixes") -> None:
    """Find out that nothing can be compiled before the first batch does."""
    if device.type == "cuda":
        missing = "" if importlib.util.find_spec("triton") else "the package triton"
    else:
        compilers = (os.environ.get("CXX", ""), "g++", "clang++", "cl")
        missing = "" if any(name and shutil.which(name) for name in compilers) else "a C++ compiler"
    if missing:
        raise SettingError(
            setting, True, f"torch.compile needs {missing} for the device {device.type}.",
            "Install it, or write compile_suffixes: false.",
        )  # fmt: skip
