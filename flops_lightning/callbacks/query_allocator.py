"""The callback that lets an allocator choose the queries of every training batch, for any LightningModule."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from flops_lightning.allocators import QueryAllocator
from flops_lightning.allocators.ranks import (
    GatheredStatistics,
    gather_observation,
    gather_statistics,
    with_fixed_totals,
)
from flops_lightning.callbacks.allocation_monitor import AllocationMonitor
from flops_lightning.distributed import Communicator, SingleProcess, present_communicator
from flops_lightning.errors import SettingError
from flops_lightning.phases import phase
from flops_lightning.protocol import (
    Allocation,
    QueryBudget,
    SampleStatistics,
    SupportsPilotWeights,
    SupportsQueryAllocation,
    SupportsStatisticsRequests,
    SupportsTraceFeedback,
)

SIGNATURES = {
    "sample_statistics": "def sample_statistics(self, batch) -> SampleStatistics",
    "set_query_counts": "def set_query_counts(self, counts: Tensor) -> None",
}
"""The methods of :class:`SupportsQueryAllocation`."""
FIRST_PAGE = frozenset(
    ("J_over_J_equal", "J_over_J_equal_seen", "J_over_J_optimal_seen", "J_over_J_own", "count_min", "count_max")
)
"""Figures logged as ``allocation/<name>``; the others are ``allocation_details/<name>``."""


@dataclass(frozen=True)
class AllocatedBatch:
    """What the callback keeps from the start of a batch to its end."""

    gathered: GatheredStatistics
    allocation: Allocation
    sites: tuple[str, ...]


def resolve_budget(own: QueryBudget | None, *, queries_per_sample: int, multiple: int) -> QueryBudget:
    """The budget that holds, given the module's and the callback's settings.

    Args:
        own: The module's budget, or None.
        queries_per_sample: The callback's average number of queries of a sample; 0: the module's.
        multiple: The callback's multiple of the counts; 1: the module's.

    Raises:
        SettingError: There is no budget, or there are two that differ.
    """
    if own is None:
        if not queries_per_sample:
            raise SettingError(
                "queries_per_sample", queries_per_sample, "neither the callback nor the module sets a budget.",
                "Set `queries_per_sample` of QueryAllocatorCallback, or return `budget=QueryBudget(...)` in the "
                "statistics of `sample_statistics`.",
            )  # fmt: skip
        return QueryBudget((queries_per_sample,), multiple)
    remedy = "Remove it from the callback, or make the two agree."
    if queries_per_sample and any(queries != queries_per_sample for queries in own.queries_per_sample):
        problem = f"differs from the module's own budget of {own.queries_per_sample} queries per sample."
        raise SettingError("queries_per_sample", queries_per_sample, problem, remedy)
    if multiple not in (1, own.multiple):
        problem = f"differs from the multiple of {own.multiple} in the module's own budget."
        raise SettingError("multiple", multiple, problem, remedy)
    return own


class QueryAllocatorCallback(Callback):
    """Splits the budget of queries over the samples of the batch before every training step.

    Works with every LightningModule that has the two methods of
    :class:`~flops_lightning.protocol.SupportsQueryAllocation`; :mod:`flops_lightning.protocol` also lists the optional
    ones.

    The allocator's diagnostics are logged at every step, and every ``log_every_n_steps`` the figures of
    :class:`AllocationMonitor`: those in ``FIRST_PAGE`` as ``allocation/<name>``, the others as
    ``allocation_details/<name>``. The allocator's state is saved in checkpoints. In several processes all make the same
    allocation from the statistics of all, and each spends a share of the budget in proportion to its samples.

    Args:
        allocator: Splits the budget.
        queries_per_sample: Average number of queries of a sample. 0: the module's own, from
            ``SampleStatistics.budget``.
        multiple: Counts are multiples of this (2 if queries come in antithetic pairs). 1: the module's own.
        log: Whether to log the allocator's diagnostics and to watch the allocation.

    Raises:
        SettingError: The budget cannot be met, or ``allocator`` is not a QueryAllocator (for example a class).

    Example:
        >>> import lightning.pytorch as pl
        >>> from flops_lightning import EqualAllocator
        >>> callback = QueryAllocatorCallback(allocator=EqualAllocator(), queries_per_sample=20)
        >>> trainer = pl.Trainer(accelerator="cpu", callbacks=[callback], logger=False, barebones=True)
        >>> callback.state_key
        'QueryAllocatorCallback[EqualAllocator]'
    """

    def __init__(
        self, *, allocator: QueryAllocator, queries_per_sample: int = 0, multiple: int = 1, log: bool = True
    ) -> None:
        """Check the settings."""
        if not isinstance(allocator, QueryAllocator):
            raise SettingError(
                "allocator", allocator, "is not a QueryAllocator.", "Write for example EqualAllocator()."
            )
        if queries_per_sample or multiple != 1:
            QueryBudget((queries_per_sample or multiple,), multiple)
        self.allocator = allocator
        self.queries_per_sample = queries_per_sample
        self.multiple = multiple
        self._monitor = AllocationMonitor() if log else None
        self._last: AllocatedBatch | None = None
        self._ranks: Communicator = SingleProcess()

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; another class of allocator does not find it."""
        return f"{type(self).__qualname__}[{type(self.allocator).__qualname__}]"

    def state_dict(self) -> dict[str, Any]:
        """The allocator's state."""
        return self.allocator.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the allocator's state."""
        self.allocator.load_state_dict(state_dict)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before training, a module without the required methods and a second allocator.

        Raises:
            SettingError: The message names the methods to add.
        """
        if stage != "fit":
            return
        missing = [line for name, line in SIGNATURES.items() if not callable(getattr(pl_module, name, None))]
        if missing:
            raise SettingError(
                "model", type(pl_module).__name__, "lacks methods that QueryAllocatorCallback needs.",
                f"Add to the module: {'; '.join(missing)}.",
            )  # fmt: skip
        self._ranks = present_communicator()
        self._request(pl_module)
        callbacks = cast("Any", trainer).callbacks  # an attribute that Lightning does not declare
        rivals = [type(each.allocator).__name__ for each in callbacks if isinstance(each, QueryAllocatorCallback)]
        if len(rivals) > 1:
            raise SettingError(
                "trainer.callbacks", rivals, "more than one QueryAllocatorCallback; each would overwrite the other's "
                "counts.", "Keep one.",
            )  # fmt: skip

    def _request(self, pl_module: LightningModule) -> None:
        feeds_back = isinstance(pl_module, SupportsTraceFeedback)
        if self.allocator.learns and not feeds_back:
            raise SettingError(
                "allocator", type(self.allocator).__name__, "learns from each step's queries, and "
                f"{type(pl_module).__name__} does not report what they showed.",
                "Add `def trace_observation(self) -> TraceObservation | None`, or write traces: {source: pilots}.",
            )  # fmt: skip
        if isinstance(pl_module, SupportsStatisticsRequests):
            watched = feeds_back and (self.allocator.learns or self._monitor is not None)
            pl_module.request_statistics(self.allocator.requests | frozenset({"observation"} if watched else ()))

    @phase("allocation")
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask for the statistics of the batch, allocate, and hand the counts over."""
        module = cast("SupportsQueryAllocation", pl_module)
        # The hook runs with autograd on and without the autocast that the training step has.
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            statistics: object = module.sample_statistics(batch)
        if not isinstance(statistics, SampleStatistics):
            raise SettingError(
                "sample_statistics", type(statistics).__name__, "must return SampleStatistics.",
                "Return `flops_lightning.allocators.SampleStatistics(loss=..., embedding=..., trace=...)`.",
            )  # fmt: skip
        self.allocator.check(statistics)
        if "embedding" not in self.allocator.requests:
            statistics = replace(statistics, embedding=None)  # by far the largest part of what ranks would exchange
        gathered = gather_statistics(self._ranks, statistics)
        budget = resolve_budget(statistics.budget, queries_per_sample=self.queries_per_sample, multiple=self.multiple)
        allocation = self.allocator.allocate(gathered.statistics, budget)
        allocation = with_fixed_totals(allocation, gathered.sizes, multiple=budget.multiple)
        module.set_query_counts(gathered.own(allocation.counts))
        if allocation.pilot_weight is not None:
            if not isinstance(pl_module, SupportsPilotWeights):
                raise SettingError(
                    "allocator.traces.source", "both", f"weighs reused pilots, and {type(pl_module).__name__} has no "
                    "method to take the weights.", "Add `def set_pilot_weights(self, weights: Tensor) -> None`, or "
                    "return pilots_reused=False in the statistics.",
                )  # fmt: skip
            pl_module.set_pilot_weights(gathered.own(allocation.pilot_weight))
        self._last = AllocatedBatch(gathered, allocation, budget.site_names)
        if self._monitor is not None and allocation.diagnostics:
            self._log(pl_module, allocation.diagnostics)

    @phase("allocation")
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let the allocator learn from the step's queries, and watch what the allocation was worth."""
        if self._last is None:
            return
        last, self._last = self._last, None
        observation = pl_module.trace_observation() if isinstance(pl_module, SupportsTraceFeedback) else None
        if observation is not None:
            observation = gather_observation(self._ranks, observation)
            self.allocator.observe(observation)
        # Counted over epochs, as the loggers count.
        every: int = cast("Any", trainer).log_every_n_steps
        if self._monitor is not None and every and (trainer.fit_loop.total_batch_idx + 1) % every == 0:
            gathered, sites = last.gathered, last.sites
            figures = self._monitor.watch(
                trainer, gathered.statistics, last.allocation, observation, batch,
                samples=gathered.sizes[gathered.rank], sites=sites,
            )  # fmt: skip
            self._log(pl_module, figures)

    def _log(self, pl_module: LightningModule, values: dict[str, float]) -> None:
        # The batch size is of no consequence: nothing here is averaged over an epoch.
        named = {
            f"{'allocation' if name in FIRST_PAGE else 'allocation_details'}/{name}": value
            for name, value in values.items()
        }
        pl_module.log_dict(named, on_step=True, on_epoch=False, batch_size=1)
