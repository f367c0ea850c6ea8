"""A search in the place of a strategy: what fits it and what does not."""

from collections.abc import Sequence
from typing import Any

from flops_lightning.errors import SettingError
from flops_lightning.optim.optimizers import ClipSettings, OptimizerSettings
from flops_lightning.search import SearchSettings
from flops_lightning.settings import read_settings
from flops_lightning.strategies.base import ForwardGradientStrategy
from flops_lightning.strategies.candidate_search import CandidateSearch

STEP = OptimizerSettings(name="sgd", lr=1.0)
"""Of a search: to where its gradient points."""


def search_in_place_of(search: SearchSettings, strategy: object, optimizer: Any, clip: Any) -> ForwardGradientStrategy:
    """The strategy of a search; others, and what would change its steps, are refused."""
    if strategy is not None:
        problem = "is given together with a search, but a run uses only one of them."
        raise SettingError("strategy", type(strategy).__name__, problem, "Write strategy: null, or search: null.")
    if optimizer is not None and read_settings(OptimizerSettings, optimizer, "optimizer") != STEP:
        raise SettingError("optimizer", optimizer, "has no effect on a search.", "Write optimizer: null.")
    if clip is not None and read_settings(ClipSettings, clip, "clip") != ClipSettings():
        raise SettingError("clip", clip, "would shorten the steps of a search.", "Write clip: null.")
    return CandidateSearch(search=search)


def check_search(callbacks: Sequence[Any], data: Any) -> None:
    """Raise a :class:`SettingError` for an allocator, and for a data module that mixes its images."""
    if any(hasattr(callback, "allocator") for callback in callbacks):
        problem = "has nothing to allocate: all images score every candidate."
        raise SettingError("trainer.callbacks", "QueryAllocatorCallback", problem, "Remove it, or use a strategy.")
    for name in ("mixup_alpha", "cutmix_alpha"):
        if getattr(data, name, 0):
            problem = "would score every generation on other images."
            raise SettingError(f"data.{name}", getattr(data, name), problem, "Write 0, or use a strategy.")
