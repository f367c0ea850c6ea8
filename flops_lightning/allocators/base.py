"""What an allocator is given, what it returns, and the interface between allocators and whoever trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from flops_lightning.errors import SettingError


@dataclass(frozen=True)
class QueryBudget:
    """Queries to be split over the samples of a batch, per site.

    Attributes:
        queries_per_sample: Average number of queries of a sample, one entry per site ``s``.
        multiple: Counts come in multiples of this (2 where queries come in antithetic pairs).
        minimum: Fewest queries that the estimator can use (2 for leave-one-out); an allocator may set a higher floor.
    """

    queries_per_sample: tuple[int, ...]
    multiple: int = 1
    minimum: int = 0

    def __post_init__(self) -> None:
        """Refuse budgets that no allocation can meet."""
        if self.multiple < 1:
            raise SettingError(
                "multiple", self.multiple, "must be at least 1.", "Write 2 for antithetic pairs, else 1."
            )
        if not self.queries_per_sample:
            raise SettingError("queries_per_sample", (), "no site has a budget.", "Give at least one number.")
        for queries in self.queries_per_sample:
            if queries < self.multiple or queries % self.multiple:
                raise SettingError(
                    "queries_per_sample",
                    queries,
                    f"must be a positive multiple of {self.multiple}.",
                    "With antithetic pairs write an even number, for example 20.",
                )


@dataclass(frozen=True)
class SampleStatistics:
    """What is known of the samples of a batch before their queries are spent.

    Attributes:
        loss: ``(b,)`` clean losses.
        embedding: ``(b, d)`` features by which samples are compared (the paper: the top CLS token), or None.
        trace: ``(b,)`` estimates of the trace of the covariance of one query's gradient, or None.
        budget: The budget of the module that trains, or None where the callback's own setting rules.
    """

    loss: Tensor
    embedding: Tensor | None = None
    trace: Tensor | None = None
    budget: QueryBudget | None = None

    def __post_init__(self) -> None:
        """Refuse shapes that do not give one entry a sample."""
        for name, value in self._tensors().items():
            letters = "(b, d)" if name == "embedding" else "(b,)"
            dimensions = 2 if name == "embedding" else 1
            if value.ndim != dimensions or value.shape[:1] != self.loss.shape[:1]:
                raise SettingError(
                    f"sample_statistics.{name}",
                    tuple(value.shape),
                    f"must have the shape {letters}, with one entry for each sample as in `loss`.",
                    "Return what belongs to each sample, not reduced over the batch.",
                )

    def on_cpu(self) -> SampleStatistics:
        """The same statistics in float64 on the CPU, detached; from an accelerator in one transfer."""
        tensors = {name: value.detach().to(self.loss.device) for name, value in self._tensors().items()}
        flat = torch.cat([value.flatten() for value in tensors.values()]).cpu().double()
        parts = flat.split([value.numel() for value in tensors.values()])
        moved = {name: part.view(tensors[name].shape) for name, part in zip(tensors, parts, strict=True)}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        named = {"loss": self.loss, "embedding": self.embedding, "trace": self.trace}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True)
class Allocation:
    """Counts for one batch.

    Attributes:
        counts: ``(s, b)`` int64 on the CPU; row ``s`` sums exactly to ``queries_per_sample[s] * b``.
        diagnostics: Named floats to be logged (lambda, J / J_equal, convergence, ...).
    """

    counts: Tensor
    diagnostics: dict[str, float] = field(default_factory=dict)


class QueryAllocator(ABC):
    """Splits a fixed budget of queries over the samples of a batch.

    Subclasses are pure: statistics in, counts out, with the state that must survive a restart in ``state_dict``.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    """Fields of :class:`SampleStatistics` that must not be None."""

    @abstractmethod
    def allocate(self, statistics: SampleStatistics, budget: QueryBudget) -> Allocation:
        """Choose how many queries each sample gets at each site.

        Args:
            statistics: Of the batch, on whatever device they were computed; :meth:`SampleStatistics.on_cpu` brings them
                over in one transfer.
            budget: Queries per sample at each site.

        Returns:
            The counts, which meet the budget exactly, and what is worth logging.
        """

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors that a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, the checkpoint has {sorted(state)}.")

    def check(self, statistics: SampleStatistics) -> None:
        """Raise if a statistic that this allocator needs is missing.

        Raises:
            SettingError: ``statistics`` lacks a field named in :attr:`requires`.
        """
        for name in sorted(self.requires):
            if getattr(statistics, name) is None:
                raise SettingError(
                    "allocator",
                    type(self).__name__,
                    f"needs the statistic `{name}`, which `sample_statistics` returned as None.",
                    f"Return `{name}` from `sample_statistics`"
                    + (" (set `strategy.pilots`)" if name == "trace" else "")
                    + ", or use EqualAllocator.",
                )


@runtime_checkable
class SupportsQueryAllocation(Protocol):
    """What a LightningModule must offer so that :class:`QueryAllocatorCallback` can serve it."""

    def sample_statistics(self, batch: Any) -> SampleStatistics:
        """Run the clean pass (and pilots, if any) and return what the allocator may look at."""

    def set_query_counts(self, counts: Tensor) -> None:
        """Take the ``(s, b)`` counts for the step that follows on the same batch."""


def equal_shares(batch_size: int) -> Tensor:
    """``(b,)`` float64 shares that are all the same."""
    return torch.full((batch_size,), 1.0 / batch_size, dtype=torch.float64)
