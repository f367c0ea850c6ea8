"""Memory: what a forward pass needs and how many rows fit, what is free, and what this process holds."""

import ctypes
import gc
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import StagedNetwork

RowsSetting = int | Literal["auto"]
AUTO: Literal["auto"] = "auto"
BEFORE_THE_FIRST_BATCH = 256
MOST_ROWS = 1024
"""More rows in one forward pass fill no device better."""
CPU_CACHE = 2**25
"""Bytes of activations (32 MiB) beyond which larger chunks are slower on a CPU, because they leave its cache."""
SHARE = 0.5
"""Share of the free memory that rows may fill; the rest is for the batch, gradients and the optimiser."""
BESIDE_INFERENCE = 2.0
"""Memory of a row of queries, with its noise and the kernels' buffers, over that of a row of inference."""
PROCESS = Path("/proc/self")


class LivePeak(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while the mode is on.

    Attributes:
        peak: Most bytes alive at a time, without what kernels allocate internally.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._live = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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

        def freed(_: Any) -> None:
            self._live -= size
            del self._known[place]

        self._known[place] = weakref.ref(storage, freed)
        self._live += size
        self.peak = max(self.peak, self._live)


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes at a time in the tensors that ``run`` makes."""
    with torch.no_grad(), LivePeak() as live:
        run()
    return live.peak


def free_bytes(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on a device; None if the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type != "cpu":
        return None
    left = (_kibibytes(Path("/proc/meminfo"), "MemAvailable"), _left_of_limit(Path("/sys/fs/cgroup")))
    return min((each for each in left if each is not None), default=None)


def _kibibytes(file: Path, field: str) -> int | None:
    """A field of a file such as ``/proc/meminfo``, in bytes."""
    lines = file.read_text().splitlines() if file.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


def _left_of_limit(group: Path) -> int | None:
    """What is left of a container's limit, which ``/proc/meminfo`` does not know."""
    limit, used = (group / name for name in ("memory.max", "memory.current"))
    if not (os.access(limit, os.R_OK) and os.access(used, os.R_OK)) or limit.read_text().strip() == "max":
        return None
    # Cached files, which may be dropped at any time, count as used there.
    lines = (group / "memory.stat").read_text().splitlines() if (group / "memory.stat").is_file() else []
    cached = next((int(line.split()[1]) for line in lines if line.startswith("inactive_file ")), 0)
    return max(0, int(limit.read_text()) - int(used.read_text()) + cached)


def rows_in(free: int, row_bytes: int) -> int:
    """Rows of one forward pass that fit in half of ``free`` bytes; ``row_bytes`` is the peak of one row's inference."""
    return int(SHARE * free / (BESIDE_INFERENCE * row_bytes))


def fitting_rows(row_bytes: int, device: torch.device, *, free: int | None) -> int:
    """Rows of one forward pass: as many as fit in half of the free memory and, on a CPU, in its cache.

    A power of two from 2 to ``MOST_ROWS``, so that runs with about as much free memory pack their rows alike.
    ``row_bytes``: peak memory of inference of one row, at least 1; ``free``: bytes, None if unknown.
    """
    rows = MOST_ROWS
    if free is not None:
        rows = min(rows, rows_in(free, row_bytes))
    if device.type == "cpu":
        rows = min(rows, CPU_CACHE // row_bytes)
    return 2 ** max(1, rows.bit_length() - 1)


class ChunkRows:
    """The setting ``chunk_rows`` and its present value.

    Attributes:
        rows: Rows in one forward pass; with ``auto`` a guess until the first batch.
    """

    def __init__(self, setting: RowsSetting, *, least: int) -> None:
        """Check the setting.

        It is ``auto``, or a number of ``least`` or more.
        """
        if setting != AUTO and (not isinstance(setting, Integral) or setting < least):
            raise SettingError(
                "model.strategy.chunk_rows", setting, f"must be auto or a number, {least} or more.",
                f"Write {least} or more, for example 256, or auto.",
            )  # fmt: skip
        self._auto = self._open = setting == AUTO
        self.rows = BEFORE_THE_FIRST_BATCH if setting == AUTO else setting
        self._resumed: int | None = None

    @torch.no_grad()
    def settle(self, network: StagedNetwork, inputs: Tensor, loss: Callable[[Tensor], object] | None = None) -> None:
        """With ``auto``, at the first batch: choose by the memory of one row's inference and the free memory.

        ``loss`` runs on the network's output, where it is the rest of the network.

        A resumed run keeps the rows of the run that it continues, as long as they fit: other rows would round its sums
        in another order.
        """
        if not self._open or not len(inputs):
            return
        self._open = False

        def run(rows: int) -> None:
            output = network.run(inputs[:1].repeat_interleave(rows, dim=0))
            if loss is not None:
                loss(output)

        with network.evaluating(), network.unpaid():
            # Two rows less one: the copies of the weights that autocast makes belong to no row.
            one, two = (peak_bytes(partial(run, n)) for n in (1, 2))
        row = max(1, two - one)
        free = free_bytes(inputs.device)
        self.rows = fitting_rows(row, inputs.device, free=free)
        if self._resumed is None:
            return
        if free is None or rows_in(free, row) >= self._resumed:
            self.rows = self._resumed
        else:
            warnings.warn(
                f"model.strategy.chunk_rows: the resumed run had chunks of {self._resumed} rows, which do not fit in "
                f"the free memory. It continues with {self.rows} and rounds sums in another order.", stacklevel=3,
            )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The rows that were chosen; empty if the setting was a number."""
        chosen = self._resumed if self._open else self.rows
        return {"chunk_rows": chosen} if self._auto and chosen is not None else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._resumed = state.get("chunk_rows")
        self._open = self._auto


def held(field: Literal["VmRSS", "VmHWM"]) -> float | None:
    """MiB that this process holds now (``VmRSS``) or held at most (``VmHWM``); None if the system does not tell."""
    size = _kibibytes(PROCESS / "status", field)
    return None if size is None else size / 2**20


def give_back_freed() -> None:
    """Return freed memory to the system, as far as the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if PROCESS.exists() else None
    if trim is not None:
        trim(0)


def restart_peak() -> bool:
    """Reset ``VmHWM`` to what is held now; False if the system does not allow it."""
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_memory(device: torch.device) -> tuple[float | None, str]:
    """Peak memory in MiB (None if the system does not tell), and of what.

    On a CUDA device ``cuda``: the peak of its tensors, from ``torch.cuda.max_memory_allocated``. Elsewhere
    ``process``: the peak of this process, with interpreter, libraries, data and whatever ran in it before.
    """
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1), "cuda"
    # Linux passes getrusage's figure on to child processes, so that a child of a large process would look large; VmHWM
    # is the process's own.
    peak = held("VmHWM")
    if peak is None:
        try:
            import resource
        except ImportError:  # Windows
            return None, "process"
        unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, others kB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return round(peak, 1), "process"
