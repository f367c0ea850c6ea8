"""Which generator makes noise of the rows' keys, and what draws it.

On a CPU it is torch's own, which is fastest there. Elsewhere it is Philox: torch's generators would be a launch a row,
and have other numbers on each kind of device. On a GPU with Triton its numbers come from kernels, else from torch.
"""

import os
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flops_lightning.errors import SettingError, check_choice
from flops_lightning.noise import philox

GeneratorSetting = Literal["auto", "torch", "philox"]
SETTING = "model.strategy.generator"


def generator_on(device: torch.device, setting: GeneratorSetting) -> Literal["torch", "philox"]:
    """The generator for noise on a device."""
    if setting == "auto":
        return "torch" if device.type == "cpu" else "philox"
    return setting


def kernels_on(device: torch.device) -> ModuleType | None:
    """:mod:`~flops_lightning.noise.philox_triton` where its kernels run, None where torch draws in their place."""
    return _kernels(device.type)


@cache
def _kernels(kind: str) -> ModuleType | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not (kind == "cuda" or interpreted) or find_spec("triton") is None:
        return None
    from flops_lightning.noise import philox_triton

    return philox_triton


def philox_normals(keys: Tensor, size: int, dtype: torch.dtype, stream: int = 0) -> Tensor:
    """``(r, size)`` standard normals of rows with these ``(r,)`` keys, on their device."""
    return _drawn(keys, size, dtype, stream, signs=False)


def philox_signs(keys: Tensor, size: int, dtype: torch.dtype, stream: int = 0) -> Tensor:
    """``(r, size)`` +1 and -1 of rows with these ``(r,)`` keys, on their device."""
    return _drawn(keys, size, dtype, stream, signs=True)


def _drawn(keys: Tensor, size: int, dtype: torch.dtype, stream: int, *, signs: bool) -> Tensor:
    kernels = kernels_on(keys.device) if dtype == torch.float32 else None
    if kernels is None:
        return (philox.signs if signs else philox.normals)(keys, size, dtype, stream)
    drawn: Tensor = kernels.draw(keys, size, signs=signs, stream=stream)
    return drawn


class GeneratorChoice:
    """The setting ``generator``, and what it is on the device of a run.

    Attributes:
        setting: As it was given.
    """

    def __init__(self, setting: GeneratorSetting) -> None:
        """Check the setting."""
        check_choice(SETTING, setting, get_args(GeneratorSetting))
        self.setting: GeneratorSetting = setting
        self._used: str | None = None

    def settle(self, device: torch.device) -> None:
        """Note what draws on this device; refuse it where a resumed run drew with another generator."""
        found = generator_on(device, self.setting)
        used = found if found == "philox" else f"torch on {device.type}"
        if self._used not in (None, used):
            other = "Write generator: philox" if self._used == "philox" else f"Resume it as {self._used}"
            raise SettingError(
                SETTING, self.setting, f"the run drew its noise with {self._used}, and would go on with {used}.",
                f"{other}, or start a new run from its weights with `checkpoint`.",
            )  # fmt: skip
        self._used = used

    def state_dict(self) -> dict[str, Any]:
        """What draws; empty before the first batch."""
        return {} if self._used is None else {"generator": self._used}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; older states do not tell."""
        self._used = state.get("generator")
