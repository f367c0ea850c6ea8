"""Whether a checkpoint fits the task that is to load it, said by name before torch says it by stack trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from flops_lightning.errors import SettingError


def check_weights(module: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Compare names and shapes.

    Raises:
        SettingError: the checkpoint is of another network; the first tensor that differs is named.
    """
    own = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    for name in dict.fromkeys([*own, *given]):
        there, here = given.get(name, "missing"), own.get(name, "missing")
        if there != here:
            raise SettingError(
                "ckpt_path", name, f"is {there} in the checkpoint and {here} in this network.",
                "Give the checkpoint of this configuration, or the configuration of that run.",
            )  # fmt: skip


def check_optimizer(optimizer: Optimizer, checkpoint: Mapping[str, Any]) -> None:
    """Compare the number of parameters in the optimiser's groups.

    Raises:
        SettingError: the checkpoint trained other parameters than this configuration.
    """
    saved = [len(g["params"]) for state in checkpoint.get("optimizer_states", []) for g in state["param_groups"]]
    own = [len(group["params"]) for group in optimizer.param_groups]
    if saved and saved != own:
        raise SettingError(
            "ckpt_path", saved, f"the checkpoint's optimiser has groups of that many parameters, this one {own}.",
            "Resume with the configuration of that run, or start from its weights with `checkpoint`.",
        )  # fmt: skip
