"""The base class of allocators."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, ClassVar

import torch

from flops_lightning.allocators.inclusion import InclusionDraws
from flops_lightning.errors import SettingError
from flops_lightning.protocol import Allocation, QueryBudget, SampleStatistics, TraceObservation
from flops_lightning.settings import KeepsSettings


class QueryAllocator(KeepsSettings, ABC):
    """Splits a fixed budget of queries between the samples of a batch; ``state_dict`` holds what a resumed run needs.

    Example:
        >>> from flops_lightning.protocol import Allocation, QueryBudget, SampleStatistics
        >>> class FirstHalf(QueryAllocator):
        ...     def allocate(self, statistics, budget):
        ...         half = len(statistics.loss) // 2
        ...         return Allocation(torch.tensor([[2 * n] * half + [0] * half for n in budget.queries_per_sample]))
        >>> FirstHalf().allocate(SampleStatistics(loss=torch.ones(4)), QueryBudget((3,))).counts
        tensor([[6, 6, 0, 0]])
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    """Fields of :class:`SampleStatistics` that must not be None."""

    @cached_property
    def _inclusion(self) -> InclusionDraws:
        return InclusionDraws()

    @property
    def requests(self) -> frozenset[str]:
        """Fields of :class:`SampleStatistics` that this allocator reads; ``predictors.<name>`` for one predictor."""
        return self.requires

    @property
    def learns(self) -> bool:
        """Whether :meth:`observe` learns from the traces seen in each step's own queries."""
        return False

    def observe(self, observation: TraceObservation) -> None:
        """Learn from the queries of the last allocation; does nothing unless :attr:`learns`."""

    @abstractmethod
    def allocate(self, statistics: SampleStatistics, budget: QueryBudget) -> Allocation:
        """Choose how many queries each sample gets at each site.

        The statistics may be on any device; :meth:`SampleStatistics.on_cpu` fetches them in one transfer. Returns
        ``(s, b)`` counts that meet the budget exactly, and diagnostics to log.
        """

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and tensors that a resumed run needs."""
        return self._inclusion.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; one that keeps nothing else refuses what it does not know."""
        unknown = sorted(set(state) - {"drawn_batches"})
        if unknown and type(self).state_dict is QueryAllocator.state_dict:
            raise ValueError(f"{type(self).__name__} keeps no such state, the checkpoint has {unknown}.")
        self._inclusion.load_state_dict(state)

    def check(self, statistics: SampleStatistics) -> None:
        """Raise a :class:`SettingError` if ``statistics`` lacks a field named in :attr:`requires`."""
        for name in sorted(self.requires):
            if getattr(statistics, name) is None:
                pilots = " (set `strategy.pilots`)" if name == "trace" else ""
                problem = f"needs the statistic `{name}`, which `sample_statistics` returned as None."
                remedy = f"Return `{name}` from `sample_statistics`{pilots}, or use EqualAllocator."
                raise SettingError("allocator", type(self).__name__, problem, remedy)


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU operations on the calling thread alone.

    An allocation is hundreds of operations on matrices the size of a batch: several threads gain nothing on idle cores,
    and wait for each other on busy ones (on two cores 1.3 s instead of 17 ms for a batch of 128).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_unused(setting: str, value: object, default: object, because: str) -> None:
    """Raise a :class:`SettingError` if a setting that has no effect was given."""
    if value != default:
        raise SettingError(setting, value, f"has no effect with {because}.", f"Remove `{setting.rpartition('.')[2]}`.")
