"""What an allocator is told: the budget, the samples of a batch before their queries, and what the queries showed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

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

    Only ``loss`` is always there. What else is worth computing, a module learns from ``request_statistics(names)``, if
    it has such a method (see :class:`SupportsTraceFeedback`).

    Attributes:
        loss: ``(b,)`` clean losses.
        embedding: ``(b, d)`` features by which samples are compared (the paper: the top CLS token), or None.
        trace: ``(b,)``, or ``(s, b)`` with one line a site, pilot estimates of the trace of the covariance of one
            query's gradient, or None. NaN: not known there.
        trace_queries: ``(b,)`` or ``(s, b)``, as ``trace``, the pilots behind each estimate, or None.
        pilots_reused: Whether the pilots enter the gradient.
        predictors: ``(b,)`` or ``(s, b)`` nonnegative numbers of the clean pass that tell of the trace, by name, or
            None. They enter a regression by their logarithm.
        query_flops: ``(s,)`` cost of one query at each site, counted, in forward-equivalents, or None.
        query_seconds: ``(s,)`` the same, measured, or None.
        scale: ``(s,)`` factor that takes traces of each site to squared units of its parameters, or None.
        preconditioned_scale: ``(s,)`` the same in the metric in which the optimiser steps, or None.
        budget: The budget of the module that trains, or None where the callback's own setting rules.
    """

    loss: Tensor
    embedding: Tensor | None = None
    trace: Tensor | None = None
    trace_queries: Tensor | None = None
    pilots_reused: bool = True
    predictors: Mapping[str, Tensor] | None = None
    query_flops: Tensor | None = None
    query_seconds: Tensor | None = None
    scale: Tensor | None = None
    preconditioned_scale: Tensor | None = None
    budget: QueryBudget | None = None

    def __post_init__(self) -> None:
        """Refuse shapes that do not give one entry a sample, or a site."""
        for name, value in self.tensors().items():
            if name in PER_SITE:
                shape, fits = "(s,)", value.ndim == 1
            elif name == "embedding":
                shape, fits = "(b, d)", value.ndim == 2 and value.shape[:1] == self.loss.shape
            elif name == "loss":
                shape, fits = "(b,)", value.ndim == 1
            else:
                shape, fits = "(b,) or (s, b)", value.ndim in (1, 2) and value.shape[-1:] == self.loss.shape
            if not fits:
                raise SettingError(
                    f"sample_statistics.{name}",
                    tuple(value.shape),
                    f"must have the shape {shape}"
                    + ("." if name in PER_SITE else ", with one entry for each sample as in `loss`."),
                    "Return what belongs to each sample, not reduced over the batch."
                    if name not in PER_SITE
                    else "Return one number for each site.",
                )

    def on_cpu(self) -> SampleStatistics:
        """The same statistics in float64 on the CPU, detached; from an accelerator in one transfer."""
        tensors = {name: value.detach().to(self.loss.device) for name, value in self.tensors().items()}
        flat = torch.cat([value.flatten() for value in tensors.values()]).cpu().double()
        parts = flat.split([value.numel() for value in tensors.values()])
        return self.with_tensors(
            {name: part.view(tensors[name].shape) for name, part in zip(tensors, parts, strict=True)}
        )

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> SampleStatistics:
        """The same statistics with other tensors, named as by :meth:`tensors`."""
        fields: dict[str, Any] = {name: value for name, value in tensors.items() if name in FIELDS}
        predictors = {name.removeprefix("predictors."): v for name, v in tensors.items() if name not in FIELDS}
        return replace(self, **fields, predictors=None if self.predictors is None else predictors)

    def tensors(self) -> dict[str, Tensor]:
        """All that are tensors by name; predictors as ``predictors.<name>``."""
        named = {name: getattr(self, name) for name in FIELDS if getattr(self, name) is not None}
        return named | {f"predictors.{name}": value for name, value in (self.predictors or {}).items()}


PER_SITE = ("query_flops", "query_seconds", "scale", "preconditioned_scale")
FIELDS = ("loss", "embedding", "trace", "trace_queries", *PER_SITE)
"""Those statistics that are a tensor."""


@dataclass(frozen=True)
class TraceObservation:
    """What a step's own queries, spent after the allocation, tell about the traces.

    Attributes:
        trace: ``(s, b)`` unbiased estimates of the trace of the covariance of one query's gradient; NaN where fewer
            than two queries survived.
        queries: ``(s, b)`` surviving queries behind each.
        unit: Queries that are independent of others only together (2 in antithetic pairs).
    """

    trace: Tensor
    queries: Tensor
    unit: int = 1

    def joined(self, other: TraceObservation) -> TraceObservation:
        """What either saw; ``other`` where both did."""
        newer = other.trace.isfinite()
        trace = torch.where(newer, other.trace, self.trace)
        return replace(self, trace=trace, queries=torch.where(newer, other.queries, self.queries))

    def on_cpu(self) -> TraceObservation:
        """The same in float64 on the CPU, in one transfer."""
        both = torch.stack([self.trace.detach(), self.queries.to(self.trace)]).cpu().double()
        return replace(self, trace=both[0], queries=both[1])
