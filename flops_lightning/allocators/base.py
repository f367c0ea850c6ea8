"""What an allocator is given, what it returns, and the interface between allocators and whoever trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from flops_lightning.allocators.statistics import QueryBudget, SampleStatistics, TraceObservation
from flops_lightning.errors import SettingError
from flops_lightning.settings import KeepsSettings


@dataclass(frozen=True)
class Allocation:
    """Counts for one batch.

    Attributes:
        counts: ``(s, b)`` int64 on the CPU; row ``s`` sums exactly to ``queries_per_sample[s] * b``.
        diagnostics: Named floats to be logged (lambda, J / J_equal, convergence, ...).
        pilot_weight: ``(s, b)`` weight of reused pilots in each sample's gradient, chosen without a look at them, or
            None for the share of the pilots in the budget.
        most: ``(s,)`` upper bound of a sample's counts at each site; None: none.
    """

    counts: Tensor
    diagnostics: dict[str, float] = field(default_factory=dict)
    pilot_weight: Tensor | None = None
    most: Tensor | None = None


class QueryAllocator(KeepsSettings, ABC):
    """Splits a fixed budget of queries over the samples of a batch.

    Subclasses are pure: statistics in, counts out, with the state that must survive a restart in ``state_dict``.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    """Fields of :class:`SampleStatistics` that must not be None."""

    @property
    def requests(self) -> frozenset[str]:
        """Fields of :class:`SampleStatistics` that this allocator reads, ``predictors.<name>`` for one of them."""
        return self.requires

    @property
    def learns(self) -> bool:
        """Whether :meth:`observe` makes use of the traces seen in each step's own queries."""
        return False

    def observe(self, observation: TraceObservation) -> None:
        """Learn from the queries that the last allocation was spent on; does nothing unless :attr:`learns`."""

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


@runtime_checkable
class SupportsTraceFeedback(Protocol):
    """What a LightningModule may offer besides, for allocators that learn from each step's own queries.

    Two more methods are called where a module has them: ``request_statistics(names)``, once before training, with the
    names of the statistics that the allocator reads and ``observation`` if :meth:`trace_observation` will be asked for;
    and ``set_pilot_weights(weights)`` on every batch with reused pilots, with :attr:`Allocation.pilot_weight`.
    """

    def trace_observation(self) -> TraceObservation | None:
        """What the queries of the step just made tell of the traces; None where there is nothing to tell."""


def equal_shares(batch_size: int) -> Tensor:
    """``(b,)`` float64 shares that are all the same."""
    return torch.full((batch_size,), 1.0 / batch_size, dtype=torch.float64)


def batch_generator(seed: int, batch: int) -> torch.Generator:
    """The random numbers of one batch, a function of the allocator's seed and of the number of batches before."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, batch)).generate_state(1)[0]))
