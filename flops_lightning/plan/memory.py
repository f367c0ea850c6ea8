"""Peak memory of steps, measured while they run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flops_lightning.network.process_memory import give_back_freed, held, restart_peak


class StepMemory:
    """What steps hold at their peak: weights, gradients, the optimiser's state, and what comes and goes within a step.

    On a GPU that is what torch allocates there at its peak. Elsewhere what comes and goes is the growth of the process
    over what it holds between two steps, which the kernel counts; libraries and data are no part of it.
    """

    def __init__(self, module: nn.Module, optimizers: Iterable[Optimizer], device: torch.device) -> None:
        """Look only from now on: between two steps, after one that has made the optimiser's state."""
        self._device = device
        self._lasting: float | None = None
        self._between: float | None = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            return
        give_back_freed()
        if device.type == "cpu" and restart_peak():
            self._lasting = lasting_bytes(module, optimizers) / 2**20
            self._between = held("VmRSS")

    def peak(self) -> float | None:
        """MiB; None where the system does not tell."""
        if self._device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self._device)) / 2**20
        high = held("VmHWM")
        if high is None or self._between is None or self._lasting is None:
            return None
        return self._lasting + max(0.0, high - self._between)


def lasting_bytes(module: nn.Module, optimizers: Iterable[Optimizer]) -> int:
    """Bytes of weights, buffers, gradients and the state of optimisers."""
    parameters = list(module.parameters())
    state = [value for optimizer in optimizers for kept in optimizer.state.values() for value in kept.values()]
    tensors = [*parameters, *module.buffers(), *(p.grad for p in parameters if p.grad is not None)]
    return sum(t.numel() * t.element_size() for t in (*tensors, *(v for v in state if isinstance(v, Tensor))))
