"""The hooks of a module that allocators use, and the objects that pass through them.

:class:`~flops_lightning.callbacks.QueryAllocatorCallback` serves every ``LightningModule`` that has the two methods of
:class:`SupportsQueryAllocation`. At each batch it calls, in this order:

==================================  ====================================================================================
``sample_statistics(batch)``        Required. Before the training step: what is known of the samples.
``set_query_counts(counts)``        Required. The ``(s, b)`` queries to spend in the training step on this batch.
``set_pilot_weights(weights)``      Optional (:class:`SupportsPilotWeights`). Weights of pilots that are reused.
``set_inclusion(probabilities)``    Optional (:class:`SupportsInclusion`). The probability that a sample has queries.
``training_step(batch)``            Lightning's own: spend the queries and update the parameters.
``trace_observation()``             Optional (:class:`SupportsTraceFeedback`). What the queries showed.
``gradient_observation()``          Optional (:class:`SupportsGradientFeedback`). What the whole gradient showed.
==================================  ====================================================================================

and once, before training, optionally ``request_statistics(names)`` (:class:`SupportsStatisticsRequests`).

Shapes: ``b`` samples in the batch; ``s`` sites, the places where a method adds noise (1 for a module without such
places); ``d`` features. A tensor ``(b,)`` has one entry per sample; ``(s, b)`` has one row per site, from bottom to
top, with one entry per sample. Where both are allowed, ``(b,)`` holds at every site.
"""

from flops_lightning.protocol.hooks import (
    SupportsGradientFeedback,
    SupportsInclusion,
    SupportsPilotWeights,
    SupportsQueryAllocation,
    SupportsStatisticsRequests,
    SupportsTraceFeedback,
)
from flops_lightning.protocol.objects import (
    PER_SITE,
    Allocation,
    GradientObservation,
    Metric,
    QueryBudget,
    SampleStatistics,
    TraceObservation,
)

__all__ = [
    "PER_SITE",
    "Allocation",
    "GradientObservation",
    "Metric",
    "QueryBudget",
    "SampleStatistics",
    "SupportsGradientFeedback",
    "SupportsInclusion",
    "SupportsPilotWeights",
    "SupportsQueryAllocation",
    "SupportsStatisticsRequests",
    "SupportsTraceFeedback",
    "TraceObservation",
]
