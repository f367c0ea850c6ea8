"""All that an estimate must leave alone."""

import random
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules import module as torch_module


def hooks(module: nn.Module) -> dict[str, Any]:
    """Hooks of every submodule, and those of all modules."""
    kinds = [name for name in vars(module) if name.endswith("_hooks")]
    every = [(name, kind, child) for name, child in module.named_modules() for kind in kinds]
    found = {f"{name}.{kind}": list(getattr(child, kind).values()) for name, kind, child in every}
    found["global"] = [*torch_module._global_forward_hooks, *torch_module._global_forward_pre_hooks]
    return found


def random_states() -> tuple[Any, ...]:
    """Where the generators of torch, numpy and Python stand."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002


def everything(module: nn.Module) -> dict[str, Any]:
    """Hooks, modes, values and places of parameters, attributes and generators."""
    return {
        "hooks": hooks(module),
        "modes": {name: child.training for name, child in module.named_modules()},
        "requires_grad": {name: p.requires_grad for name, p in module.named_parameters()},
        "pointers": {name: t.data_ptr() for name, t in module.state_dict().items()},
        "values": {name: t.tolist() for name, t in module.state_dict().items()},
        "attributes": {name: sorted(vars(child)) for name, child in module.named_modules()},
        "random": random_states(),
        "grad_enabled": torch.is_grad_enabled(),
    }
