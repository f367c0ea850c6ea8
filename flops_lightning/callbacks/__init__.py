"""Lightning callbacks. All but the first are loaded when first used: some know a task, the others only protocols."""

from importlib import import_module
from typing import TYPE_CHECKING

from flops_lightning.callbacks.query_allocator import QueryAllocatorCallback

if TYPE_CHECKING:
    from flops_lightning.callbacks.class_report import ClassReport
    from flops_lightning.callbacks.forward_only import ForwardOnly
    from flops_lightning.callbacks.prediction_writer import PredictionWriter
    from flops_lightning.callbacks.robustness import Robustness
    from flops_lightning.callbacks.run_summary import RunSummary
    from flops_lightning.resume.signals import SaveOnSignal

_HOMES = {
    "ClassReport": "callbacks.class_report",
    "ForwardOnly": "callbacks.forward_only",
    "PredictionWriter": "callbacks.prediction_writer",
    "Robustness": "callbacks.robustness",
    "RunSummary": "callbacks.run_summary",
    "SaveOnSignal": "resume.signals",
}

__all__ = [
    "ClassReport", "ForwardOnly", "PredictionWriter", "QueryAllocatorCallback", "Robustness", "RunSummary",
    "SaveOnSignal",
]  # fmt: skip


def __getattr__(name: str) -> object:
    """Import a callback on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"flops_lightning.{_HOMES[name]}"), name)
