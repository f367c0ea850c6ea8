"""The callback that lets an allocator choose the queries of every training batch, for any LightningModule."""

import re
from dataclasses import replace
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from flops_lightning.allocators import QueryAllocator, ranks
from flops_lightning.allocators.budget import BudgetRule, BudgetSettings
from flops_lightning.allocators.ranks import GatheredStatistics
from flops_lightning.callbacks.allocation_monitor import AllocationMonitor
from flops_lightning.distributed import Communicator, present_communicator
from flops_lightning.errors import SettingError
from flops_lightning.phases import phase
from flops_lightning.protocol import (
    Allocation,
    QueryBudget,
    SampleStatistics,
    SupportsGradientFeedback,
    SupportsInclusion,
    SupportsPilotWeights,
    SupportsQueryAllocation,
    SupportsStatisticsRequests,
    SupportsTraceFeedback,
)
from flops_lightning.settings import read_settings
from flops_lightning.transfers import on_host

SIGNATURES = {
    "sample_statistics": "def sample_statistics(self, batch) -> SampleStatistics",
    "set_query_counts": "def set_query_counts(self, counts: Tensor) -> None",
}
# Figures logged as `allocation/<name>`; the others are `allocation_details/<name>`.
ON_FIRST_PAGE = "J_over_J_(equal|equal_seen|optimal_seen|own)|count_(min|max)"


class AllocatedBatch(NamedTuple):
    """What the callback keeps from the start of a batch to its end."""

    gathered: GatheredStatistics
    allocation: Allocation
    sites: tuple[str, ...]


def resolve_budget(own: QueryBudget | None, *, queries_per_sample: int, multiple: int) -> QueryBudget:
    """The budget that holds: the module's ``own``, or the callback's settings if there is none; refused if they differ.

    ``queries_per_sample`` 0 and ``multiple`` 1 stand for the module's.
    """
    if own is None:
        if not queries_per_sample:
            problem = "neither the callback nor the module sets a budget."
            remedy = "Set it in QueryAllocatorCallback, or return `budget=QueryBudget(...)` in `sample_statistics`."
            raise SettingError("queries_per_sample", queries_per_sample, problem, remedy)
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
    """Splits the budget of queries between the samples of the batch before every training step.

    Works with every LightningModule that has the two methods of
    :class:`~flops_lightning.protocol.SupportsQueryAllocation`; :mod:`flops_lightning.protocol` also lists the optional
    ones. The allocator's diagnostics are logged at every step, and the figures of :class:`AllocationMonitor` every
    ``log_every_n_steps``. The allocator's state is saved in checkpoints. With several processes, all compute the same
    allocation from the statistics of all, and each spends a share of the budget in proportion to its samples.

    Args:
        allocator: Splits the budget.
        queries_per_sample: Average number of queries per sample. 0: the module's own, from
            ``SampleStatistics.budget``.
        multiple: Counts are multiples of this (2 if queries come in antithetic pairs). 1: the module's own.
        log: Whether to log the allocator's diagnostics and to monitor the allocation.
        budget: Chooses the average number of queries at every step; None: it is fixed.

    Example:
        >>> from flops_lightning import EqualAllocator
        >>> callback = QueryAllocatorCallback(allocator=EqualAllocator(), queries_per_sample=20)  # give it to a Trainer
        >>> callback.state_key
        'QueryAllocatorCallback[EqualAllocator]'
    """

    def __init__(
        self, *, allocator: QueryAllocator, queries_per_sample: int = 0, multiple: int = 1, log: bool = True,
        budget: BudgetSettings | None = None,
    ) -> None:  # fmt: skip
        if not isinstance(allocator, QueryAllocator):
            remedy = "Write, for example, EqualAllocator()."
            raise SettingError("allocator", allocator, "is not a QueryAllocator.", remedy)
        if queries_per_sample or multiple != 1:
            QueryBudget((queries_per_sample or multiple,), multiple)
        self.allocator, self.queries_per_sample, self.multiple = allocator, queries_per_sample, multiple
        self.budget = read_settings(BudgetSettings, budget, "budget")
        self._rule = BudgetRule(self.budget) if self.budget.rule != "fixed" else None
        self._monitor = AllocationMonitor() if log else None
        self._last: AllocatedBatch | None = None
        self._ranks: Communicator = Communicator()

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; another class of allocator does not find it."""
        return f"{type(self).__qualname__}[{type(self.allocator).__qualname__}]"

    def state_dict(self) -> dict[str, Any]:
        """The allocator's state, and that of the budget's rule."""
        state = self.allocator.state_dict()
        return state if self._rule is None else state | {"budget": self._rule.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; a rule that a checkpoint does not know starts anew."""
        state = dict(state_dict)
        rule = state.pop("budget", None)
        if rule is not None and self._rule is not None:
            self._rule.load_state_dict(rule)
        self.allocator.load_state_dict(state)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before training, a module without the required methods and a second allocator."""
        if stage != "fit":
            return
        from flops_lightning.callbacks.forward_only import ForwardOnly

        callbacks = cast("Any", trainer).callbacks  # an attribute that Lightning does not declare
        if any(isinstance(each, ForwardOnly) for each in callbacks):
            raise SettingError(
                "trainer.callbacks", type(self).__name__, "has nothing to allocate beside ForwardOnly: a query runs "
                "training_step on a whole batch, so every sample has as many queries as every other, also where the "
                "step returns the losses of each.", "Remove it, or use a ForwardModule.",
            )  # fmt: skip
        missing = [line for name, line in SIGNATURES.items() if not callable(getattr(pl_module, name, None))]
        if missing:
            problem, remedy = "lacks methods that QueryAllocatorCallback needs.", "; ".join(missing)
            raise SettingError("model", type(pl_module).__name__, problem, f"Add to the module: {remedy}.")
        self._ranks = present_communicator()
        self._request(pl_module)
        rivals = [type(each.allocator).__name__ for each in callbacks if isinstance(each, QueryAllocatorCallback)]
        if len(rivals) > 1:
            problem = "more than one QueryAllocatorCallback; each would overwrite the other's counts."
            raise SettingError("trainer.callbacks", rivals, problem, "Keep one.")

    def _request(self, pl_module: LightningModule) -> None:
        feeds_back = isinstance(pl_module, SupportsTraceFeedback)
        if self.allocator.learns and not feeds_back:
            problem = f"learns from each step's queries, which {type(pl_module).__name__} does not report."
            remedy = "Add `def trace_observation(self) -> TraceObservation | None`, or write traces: {source: pilots}."
            raise SettingError("allocator", type(self.allocator).__name__, problem, remedy)
        if self._rule is not None and not isinstance(pl_module, SupportsGradientFeedback):
            problem = f"needs the signal and noise of each gradient, which {type(pl_module).__name__} does not report."
            remedy = "Add watch_gradient and gradient_observation (flops_lightning.protocol), or write rule: fixed."
            raise SettingError("budget.rule", self.budget.rule, problem, remedy)
        if isinstance(pl_module, SupportsStatisticsRequests):
            names = self.allocator.requests | (self._rule.requests if self._rule else frozenset())
            watched = feeds_back and (self.allocator.learns or self._monitor is not None)
            pl_module.request_statistics(names | frozenset({"observation"} if watched else ()))

    @phase("allocation")
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask for the statistics of the batch, allocate, and hand the counts over."""
        module = cast("SupportsQueryAllocation", pl_module)
        # The hook runs with autograd on and without the autocast that the training step has.
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            statistics: object = module.sample_statistics(batch)
        if not isinstance(statistics, SampleStatistics):
            remedy = "Return `flops_lightning.allocators.SampleStatistics(loss=..., embedding=..., trace=...)`."
            raise SettingError("sample_statistics", type(statistics).__name__, "must return SampleStatistics.", remedy)
        self.allocator.check(statistics)
        if "embedding" not in self.allocator.requests:
            statistics = replace(statistics, embedding=None)  # by far the largest part of what ranks would exchange
        gathered = ranks.gather_statistics(self._ranks, statistics)
        budget = resolve_budget(statistics.budget, queries_per_sample=self.queries_per_sample, multiple=self.multiple)
        if self._rule is not None:
            budget = self._choose(self._rule, pl_module, gathered.statistics, budget)
        allocation = self.allocator.allocate(gathered.statistics, budget)
        allocation = ranks.with_fixed_totals(allocation, gathered.sizes, multiple=budget.multiple)
        module.set_query_counts(gathered.own(allocation.counts))
        if allocation.pilot_weight is not None:
            if not isinstance(pl_module, SupportsPilotWeights):
                raise SettingError(
                    "allocator.traces.source", "both", f"weighs reused pilots, and {type(pl_module).__name__} has no "
                    "method to take the weights.", "Add `def set_pilot_weights(self, weights: Tensor) -> None`, or "
                    "return pilots_reused=False in the statistics.",
                )  # fmt: skip
            pl_module.set_pilot_weights(gathered.own(allocation.pilot_weight))
        if allocation.inclusion is not None:
            if not isinstance(pl_module, SupportsInclusion):
                raise SettingError(
                    "queries_per_sample", budget.queries_per_sample, "leaves samples without queries, and "
                    f"{type(pl_module).__name__} has no method to take their probabilities.",
                    "Add `def set_inclusion(self, probabilities: Tensor) -> None`, or spend one query or more on each.",
                )  # fmt: skip
            pl_module.set_inclusion(gathered.own(allocation.inclusion))
        self._last = AllocatedBatch(gathered, allocation, budget.site_names)
        if self._monitor is not None and allocation.diagnostics:
            self._log(pl_module, allocation.diagnostics)

    def _choose(
        self, rule: BudgetRule, pl_module: LightningModule, statistics: SampleStatistics, own: QueryBudget
    ) -> QueryBudget:
        """The budget of this step, and whether its gradient is watched for those that follow."""
        if statistics.trace is not None:
            problem = "chooses how many queries a sample has, and pilots are a fixed part of them."
            remedy = "Set pilots.queries: 0 and traces: {source: prediction}, or rule: fixed."
            raise SettingError("budget.rule", self.budget.rule, problem, remedy)
        budget = rule.choose(own, statistics)
        if rule.due():
            cast("SupportsGradientFeedback", pl_module).watch_gradient(self.budget.metric)
        if self._monitor is not None:
            figures = {f"budget/{name}": value for name, value in rule.figures(budget).items()}
            pl_module.log_dict(on_host(figures), on_step=True, on_epoch=False, batch_size=1)
        return budget

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
            observation = ranks.gather_observation(self._ranks, observation)
            self.allocator.observe(observation)
        measured = pl_module.gradient_observation() if isinstance(pl_module, SupportsGradientFeedback) else None
        if measured is not None and self._rule is not None:
            self._rule.observe(measured, last.allocation.counts.double().mean(dim=1))
        # Counted over epochs, as the loggers count.
        every: int = cast("Any", trainer).log_every_n_steps
        if self._monitor is not None and every and (trainer.fit_loop.total_batch_idx + 1) % every == 0:
            figures = self._monitor.watch(
                trainer, last.gathered.statistics, last.allocation, observation, batch,
                samples=last.gathered.sizes[last.gathered.rank], sites=last.sites,
            )  # fmt: skip
            self._log(pl_module, figures)

    def _log(self, pl_module: LightningModule, values: dict[str, float]) -> None:
        details = {name: "" if re.fullmatch(ON_FIRST_PAGE, name) else "_details" for name in values}
        named = {f"allocation{details[name]}/{name}": value for name, value in values.items()}
        # The batch size is of no consequence: nothing here is averaged over an epoch.
        pl_module.log_dict(on_host(named), on_step=True, on_epoch=False, batch_size=1)
