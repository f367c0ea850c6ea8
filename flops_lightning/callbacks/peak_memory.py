"""The most memory that this process has held so far."""

from __future__ import annotations

import sys

import torch

from flops_lightning.network.process_memory import held


def peak_memory(device: torch.device) -> tuple[float | None, str]:
    """Megabytes (2^20 bytes; None where the system does not tell), and what they are of.

    On a CUDA device the peak of the tensors there (``cuda``, from ``torch.cuda.max_memory_allocated``); elsewhere that
    of the process (``process``): interpreter, libraries and data included, and whatever ran in it before.
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1), "cuda"
    return _of_process(), "process"


def _of_process() -> float | None:
    # Linux hands getrusage's figure on to the programs that a process starts, so that one started from a large process
    # would look large; the high-water mark in /proc is the program's own.
    high = held("VmHWM")
    if high is not None:
        return round(high, 1)
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, others kB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)
