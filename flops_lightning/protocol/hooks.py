"""The hooks of a module that allocators use; their order is that of the package."""

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from flops_lightning.protocol.objects import GradientObservation, Metric, SampleStatistics, TraceObservation


@runtime_checkable
class SupportsQueryAllocation(Protocol):
    """The two methods that a LightningModule must have for ``QueryAllocatorCallback``.

    Example:
        >>> class MyModule:  # in practice a LightningModule
        ...     def sample_statistics(self, batch): return SampleStatistics(loss=batch.square().sum(dim=1))
        ...     def set_query_counts(self, counts): self.counts = counts  # read by training_step
        >>> isinstance(MyModule(), SupportsQueryAllocation)
        True
    """

    def sample_statistics(self, batch: Any) -> SampleStatistics:
        """Run the clean pass (and pilots, if any) and return what the allocator may see.

        Called in train mode, without autograd, under the trainer's precision: switch dropout off for clean losses.
        """

    def set_query_counts(self, counts: Tensor) -> None:
        """Keep the ``(s, b)`` int64 counts, on the CPU, for the training step that follows on the same batch."""


@runtime_checkable
class SupportsStatisticsRequests(Protocol):
    """Optional: computes only those statistics that the allocator reads.

    Example:
        >>> class Thrifty:
        ...     def request_statistics(self, names): self.needs_embedding = "embedding" in names
        >>> isinstance(Thrifty(), SupportsStatisticsRequests)
        True
    """

    def request_statistics(self, names: frozenset[str]) -> None:
        """Take, once before training, the names of the fields of :class:`SampleStatistics` that the allocator reads.

        ``predictors.<name>`` asks for one predictor, ``predictors`` for all; ``observation``: ``trace_observation``.
        """


@runtime_checkable
class SupportsPilotWeights(Protocol):
    """Optional: weighs the pilots of each sample, if they are reused in its gradient.

    Example:
        >>> class Weighing:
        ...     def set_pilot_weights(self, weights): self.weights = weights
        >>> isinstance(Weighing(), SupportsPilotWeights)
        True
    """

    def set_pilot_weights(self, weights: Tensor) -> None:
        """Keep the ``(s, b)`` weights w for the step: ``w * mean(pilots) + (1 - w) * mean(other queries)``."""


@runtime_checkable
class SupportsInclusion(Protocol):
    """Optional: takes averages of less than one query a sample, or of fewer than one for some.

    Example:
        >>> class Sampling:
        ...     def set_inclusion(self, probabilities): self.probabilities = probabilities
        >>> isinstance(Sampling(), SupportsInclusion)
        True
    """

    def set_inclusion(self, probabilities: Tensor) -> None:
        """Keep ``(s, b)`` probabilities for the step, by which the gradients of samples with queries are divided."""


@runtime_checkable
class SupportsTraceFeedback(Protocol):
    """Optional: reports the traces that each step's queries showed; required by allocators that predict traces.

    Example:
        >>> class Reporting:
        ...     def trace_observation(self): return TraceObservation(self.trace, self.counts)
        >>> isinstance(Reporting(), SupportsTraceFeedback)
        True
    """

    def trace_observation(self) -> TraceObservation | None:
        """What the queries of the training step just made showed, or None."""


@runtime_checkable
class SupportsGradientFeedback(Protocol):
    """Optional: measures signal and noise of a step's gradient; required by budgets that are chosen at every step.

    Example:
        >>> class Measuring:
        ...     def watch_gradient(self, metric): self.watched = metric
        ...     def gradient_observation(self): return GradientObservation(1.0, torch.ones(1))
        >>> isinstance(Measuring(), SupportsGradientFeedback)
        True
    """

    def watch_gradient(self, metric: Metric) -> None:
        """Measure the gradient of the training step that follows.

        ``preconditioned``: each squared derivative counts by the squared step that the optimiser makes of it.
        """

    def gradient_observation(self) -> GradientObservation | None:
        """What was measured in the step just made; None if it had no gradient."""
