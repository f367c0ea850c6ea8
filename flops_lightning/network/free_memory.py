"""How many rows one forward pass may have: the memory that a row takes, and the memory that is free."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MOST_ROWS = 1024
"""More fill no device better."""
CPU_CACHE = 2**25
"""Bytes of activations on a CPU beyond which larger chunks are slower, since they leave the cache: 32 MiB."""
SHARE = 0.5
"""Of the free memory; the rest is for what is kept of the batch, gradients, the optimiser and what comes later."""
BESIDE_INFERENCE = 2.0
"""A row of queries over one of inference: its noise or its directions (of rank 1), buffers of the kernels."""


class LivePeak(TorchDispatchMode):
    """Most bytes at a time in the tensors that were made while the mode was on, counted, not measured.

    Attributes:
        peak: Bytes. What kernels take for themselves is not in it.
    """

    def __init__(self) -> None:
        """Nothing is alive yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._live = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the storages of what an operation returns."""
        del types
        result = func(*args, **(kwargs or {}))
        given = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for each in tree_leaves(result):
            if isinstance(each, Tensor):
                self._count(each, given)
        return result

    def _count(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place in given or place in self._known:
            return

        def gone(_: Any) -> None:
            self._live -= size
            del self._known[place]

        self._known[place] = weakref.ref(storage, gone)
        self._live += size
        self.peak = max(self.peak, self._live)


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes at a time in tensors that ``run`` makes."""
    with torch.no_grad(), LivePeak() as live:
        run()
    return live.peak


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a process can still have on a device; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type != "cpu":
        return None
    system = _available(Path("/proc/meminfo"))
    left = [each for each in (system, _left_of_limit(Path("/sys/fs/cgroup"))) if each is not None]
    return min(left) if left else None


def _available(meminfo: Path) -> int | None:
    lines = meminfo.read_text().splitlines() if meminfo.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _left_of_limit(group: Path) -> int | None:
    """Of a container's limit, which the system's own figure knows nothing of."""
    limit, used = (group / name for name in ("memory.max", "memory.current"))
    if not (os.access(limit, os.R_OK) and os.access(used, os.R_OK)) or limit.read_text().strip() == "max":
        return None
    # Files that were read and may be forgotten at any time count as used there.
    lines = (group / "memory.stat").read_text().splitlines() if (group / "memory.stat").is_file() else []
    cached = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
    return max(0, int(limit.read_text()) - int(used.read_text()) + cached)


def rows_in(free: int, row_bytes: int) -> int:
    """Rows of one forward pass that half of the free memory holds.

    Args:
        free: Bytes that are free.
        row_bytes: Peak memory of inference of one row, at least 1.
    """
    return int(SHARE * free / (BESIDE_INFERENCE * row_bytes))


def fitting_rows(row_bytes: int, device: torch.device, *, free: int | None) -> int:
    """Rows of one forward pass: as many as half of the free memory holds, on a CPU no more than its cache is good for.

    Args:
        row_bytes: Peak memory of inference of one row, at least 1.
        device: Where.
        free: Bytes that are free; None: not known.

    Returns:
        From 2 to ``MOST_ROWS``; a power of two, so that runs with about as much free memory pack their rows alike.
    """
    rows = MOST_ROWS
    if free is not None:
        rows = min(rows, rows_in(free, row_bytes))
    if device.type == "cpu":
        rows = min(rows, CPU_CACHE // row_bytes)
    return 2 ** max(1, rows.bit_length() - 1)
