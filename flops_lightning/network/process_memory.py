"""What this process holds in memory, as Linux tells it."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path
from typing import Literal

PROCESS = Path("/proc/self")


def held(field: Literal["VmRSS", "VmHWM"]) -> float | None:
    """MiB in memory now (``VmRSS``) or at most so far (``VmHWM``); None where the system does not tell."""
    status = PROCESS / "status"
    if not status.is_file():
        return None
    lines = status.read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:")), None)


def give_back_freed() -> None:
    """Hand freed memory back to the system, as far as the C library does that."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if PROCESS.exists() else None
    if trim is not None:
        trim(0)


def restart_peak() -> bool:
    """Let ``VmHWM`` start again from what is held now; False where the system does not allow it."""
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True
