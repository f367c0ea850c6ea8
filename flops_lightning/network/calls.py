"""Other functions in the place of modules' own, and what may run a module behind their backs."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn


@contextmanager
def replaced(forwards: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Modules run these functions in the place of ``forward`` while it lasts; their hooks run as ever."""
    before = []
    try:
        for module, forward in forwards:
            before.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, own in reversed(before):
            if own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = own


def uncompiled(network: nn.Module) -> AbstractContextManager[Any]:
    """Compiled modules run as they are while it lasts: compiled code would not see hooks and replays."""
    if any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in network.modules()):
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()


def checkpointed() -> bool:
    """Whether a caller is torch.utils.checkpoint, which runs modules again when a derivative is taken."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
    return False
