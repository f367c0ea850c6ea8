"""Lightning callbacks. ``RunSummary`` knows a task and is loaded when first used; the others know only protocols."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flops_lightning.callbacks.query_allocator import QueryAllocatorCallback

if TYPE_CHECKING:
    from flops_lightning.callbacks.run_summary import RunSummary

__all__ = ["QueryAllocatorCallback", "RunSummary"]


def __getattr__(name: str) -> object:
    """Import ``RunSummary`` on first use (PEP 562)."""
    if name != "RunSummary":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flops_lightning.callbacks.run_summary import RunSummary

    return RunSummary
