"""A task as :mod:`flops_lightning.protocol` wants it: what it tells an allocator of a batch, and what it takes."""

from abc import ABC
from typing import Any, cast

import lightning.pytorch as pl
from torch import Tensor
from torch.optim import Optimizer

from flops_lightning.errors import SettingError
from flops_lightning.objectives import naming_the_loss
from flops_lightning.optim.optimizers import squared_step_sizes
from flops_lightning.protocol import GradientObservation, Metric, SampleStatistics, TraceObservation
from flops_lightning.queries import CleanPass
from flops_lightning.strategies.base import ForwardGradientStrategy
from flops_lightning.tasks.mean_gradient import MeanGradient
from flops_lightning.tasks.step import StepState, Unstaged

Batch = Any


class AllocatedModule(pl.LightningModule, ABC):
    """The hooks of ``QueryAllocatorCallback`` for a module with a staged network and a strategy."""

    network = Unstaged()
    strategy: ForwardGradientStrategy | None
    loss_path = ""  # by which error messages name the loss
    _state: StepState
    _requested: frozenset[str]
    _gradient: MeanGradient

    def split(self, batch: Any) -> tuple[Any, Any]:
        """Inputs and targets of a batch; override it where batches are not ``(inputs, targets)`` pairs.

        Both may be nested tuples, mappings and dataclasses of tensors whose first dimension is the sample. A tuple of
        inputs becomes the network's positional arguments, a mapping its keyword arguments.
        """
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            problem = "a batch must be a pair (inputs, targets)."
            remedy = "Return one from the dataset or collate_fn, or override `split(batch)`."
            raise SettingError("data", type(batch).__name__, problem, remedy)
        return batch[0], batch[1]

    def check_inputs(self, inputs: Any) -> None:
        """Override to refuse inputs that the network cannot take."""

    def sample_statistics(self, batch: Batch) -> SampleStatistics:
        """Run the clean pass and the pilots; ``training_step`` reuses both."""
        strategy, metric = self._training_strategy(), None
        if "preconditioned_scale" in self._requested:
            metric = self._squared_steps()
        return strategy.sample_statistics(self._clean_pass(batch), self._requested, metric)

    def set_query_counts(self, counts: Tensor) -> None:
        """Take the ``(s, b)`` counts of the batch whose statistics were asked for."""
        self._state.counts = counts

    def set_pilot_weights(self, weights: Tensor) -> None:
        """Take the ``(s, b)`` weights of that batch's pilots."""
        self._state.pilot_weights = weights

    def set_inclusion(self, probabilities: Tensor) -> None:
        """Take the ``(s, b)`` probabilities with which that batch's samples have queries."""
        self._state.inclusion = probabilities

    def watch_gradient(self, metric: Metric) -> None:
        """Measure signal and noise of the next step's gradient."""
        if self._gradient.batches > 1:
            problem = "takes one step for several batches, but a budget is chosen for the gradient of one batch."
            remedy = "Write 1 and a larger batch_size, or budget: {rule: fixed}."
            raise SettingError("optimizer.accumulate_grad_batches", self._gradient.batches, problem, remedy)
        self._state.watched = metric

    def gradient_observation(self) -> GradientObservation | None:
        """Signal and noise of the last step's gradient, if it was watched."""
        return self._state.gradient

    def request_statistics(self, names: frozenset[str]) -> None:
        """Take the names of the statistics that the allocator reads; refuse pilots that it does not."""
        if "trace" not in names:
            self._refuse_pilots(
                "spends pilot queries that this allocator does not read.",
                "Write 0, or use an allocator with traces: {source: pilots} or {source: both}.",
            )
        self._requested = names

    def trace_observation(self) -> TraceObservation | None:
        """Traces seen in the queries of the last step, if ``observation`` was requested."""
        return self._state.observation

    def _clean_pass(self, batch: Batch) -> CleanPass:
        if self._state.batch is not batch:
            inputs, targets = self.split(batch)
            self.check_inputs(inputs)
            with naming_the_loss(self.loss_path):
                self._state.run_clean_pass(self._training_strategy(), batch, inputs, targets)
        return cast("CleanPass", self._state.clean)

    def _training_strategy(self) -> ForwardGradientStrategy:
        if self.strategy is None:
            raise SettingError("strategy", None, "training needs a strategy.", "Write, for example, LikelihoodRatio().")
        return self.strategy

    def _refuse_pilots(self, problem: str, remedy: str) -> None:
        pilots = getattr(self.strategy, "pilots", None)
        if pilots is not None and pilots.queries:
            raise SettingError("model.strategy.pilots.queries", pilots.queries, problem, remedy)

    def _squared_steps(self) -> dict[str, Tensor] | None:
        return squared_step_sizes(self._optimizer(), dict(self.network.module.named_parameters())) or None

    def _optimizer(self) -> Optimizer:
        return cast("Optimizer", self.optimizers(use_pl_optimizer=False))
