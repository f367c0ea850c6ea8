"""The base class of allocators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch

from flops_lightning.errors import SettingError
from flops_lightning.protocol import Allocation, QueryBudget, SampleStatistics, TraceObservation
from flops_lightning.settings import KeepsSettings


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


def batch_generator(seed: int, batch: int) -> torch.Generator:
    """The random numbers of one batch, a function of the allocator's seed and of the number of batches before."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, batch)).generate_state(1)[0]))
