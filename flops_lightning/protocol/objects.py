"""The objects that pass between a module, its allocator and its strategy; shapes are those of the package."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from flops_lightning.errors import SettingError, check_at_least

Metric = Literal["parameters", "preconditioned"]
"""Units in which the parameters' gradients are compared."""
PER_SITE = (
    "counted_costs",
    "fixed_costs",
    "measured_costs",
    "scale",
    "preconditioned_scale",
)  # one number for each site
FIELDS = ("loss", "embedding", "trace", "trace_queries", *PER_SITE)  # tensors


@dataclass(frozen=True)
class QueryBudget:
    """Queries to split over the samples of a batch, for each site; refused if no allocation can meet them.

    Example:
        >>> QueryBudget((20, 8), multiple=2, sites=("lower", "upper")).site_names
        ('lower', 'upper')
        >>> QueryBudget((7,), multiple=2)
        Traceback (most recent call last):
        flops_lightning.errors.SettingError: queries_per_sample = 7: must be a positive multiple of 2. ...
    """

    # Average of a sample, one entry for each of the s sites: an int is a multiple of `multiple`, a float any number.
    queries_per_sample: tuple[float, ...]
    multiple: int = 1  # counts are multiples of this (2 if queries come in antithetic pairs)
    minimum: int = 0  # fewest that the estimator can use (2 for leave-one-out); an allocator may set a higher floor
    sites: tuple[str, ...] = field(default=(), compare=False)  # names in logs; by default their numbers
    # Sites where a query is made once for the whole batch, so that all samples have the same number; none by default.
    shared: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        check_at_least("multiple", self.multiple, 1, "Write 2 for antithetic pairs, else 1.")
        if not self.queries_per_sample:
            raise SettingError("queries_per_sample", (), "no site has a budget.", "Give at least one number.")
        for queries in self.queries_per_sample:
            if not queries > 0 or (isinstance(queries, int) and queries % self.multiple):
                problem = f"must be a positive multiple of {self.multiple}."
                remedy = f"Write, for example, {self.multiple * max(1, round(20 / self.multiple))}."
                raise SettingError("queries_per_sample", queries, problem, remedy)
        if self.shared and len(self.shared) != len(self.queries_per_sample):
            problem = f"must have one entry for each of {len(self.queries_per_sample)} sites."
            raise SettingError("budget.shared", self.shared, problem, "Give one for each site, or none.")
        for queries, shared in zip(self.queries_per_sample, self.shared, strict=False):
            if shared and not isinstance(queries, int):
                problem = "is not a whole number, but all samples of a batch get the same number."
                raise SettingError("queries_per_sample", queries, problem, "Write an int where directions are shared.")
        if self.sites and len(self.sites) != len(self.queries_per_sample):
            problem = f"must name each of {len(self.queries_per_sample)} sites."
            raise SettingError("budget.sites", self.sites, problem, "Give a name for each site, or none.")

    def totals(self, samples: int) -> list[int]:
        """Queries of a batch at each site: the multiple closest to the average of its samples, but not none."""
        units = [round(queries * samples / self.multiple) for queries in self.queries_per_sample]
        return [max(1, n) * self.multiple for n in units]

    @property
    def unit(self) -> int:
        """Fewest queries of a sample that has any: a multiple that the estimator can use."""
        return -(-max(1, self.minimum) // self.multiple) * self.multiple

    @property
    def site_names(self) -> tuple[str, ...]:
        """Name of each site, from bottom to top."""
        return self.sites or tuple(str(i) for i in range(len(self.queries_per_sample)))

    @property
    def shared_sites(self) -> tuple[bool, ...]:
        """Of each site, whether all samples have the same number of queries there."""
        return self.shared or (False,) * len(self.queries_per_sample)


@dataclass(frozen=True)
class SampleStatistics:
    """What is known about the samples of a batch before their queries are spent.

    Example:
        >>> statistics = SampleStatistics(loss=torch.tensor([0.5, 2.0]), predictors={"output_gradient": torch.ones(2)})
        >>> sorted(statistics.tensors())
        ['loss', 'predictors.output_gradient']
        >>> SampleStatistics(loss=torch.tensor(1.25))
        Traceback (most recent call last):
        flops_lightning.errors.SettingError: sample_statistics.loss = (): must have the shape (b,), with one entry ...
    """

    loss: Tensor  # (b,) clean losses
    embedding: Tensor | None = None  # (b, d) features by which samples are compared (in the paper the top CLS token)
    # (b,) or (s, b) pilot estimates of the trace of the covariance of one query's gradient (NaN: unknown), the pilots
    # behind each, and whether these enter the gradient
    trace: Tensor | None = None
    trace_queries: Tensor | None = None
    pilots_reused: bool = True
    # (b,) or (s, b) nonnegative numbers from the clean pass that predict the trace (by their logarithms), by name
    predictors: Mapping[str, Tensor] | None = None
    # (s,) or (s, b) cost of one query at each site, counted in forward-equivalents; (s, b) where samples differ
    counted_costs: Tensor | None = None
    fixed_costs: Tensor | None = None  # (s,) what a step costs a sample without any query, each site's share
    measured_costs: Tensor | None = None  # (s,) the same, measured
    scale: Tensor | None = None  # (s,) factors that convert traces to squared units of each site's parameters
    preconditioned_scale: Tensor | None = None  # (s,) the same, in the metric of the optimiser's steps
    budget: QueryBudget | None = None  # the module's own; None: the callback's setting

    def __post_init__(self) -> None:
        for name, value in self.tensors().items():
            shape, fits = "(b,) or (s, b)", value.ndim in (1, 2) and value.shape[-1:] == self.loss.shape
            entries = ", with one entry for each sample as in `loss`"
            remedy = "Return what belongs to each sample, not reduced over the batch."
            if name == "loss":
                shape, fits = "(b,)", value.ndim == 1
            elif name == "embedding":
                shape, fits = "(b, d)", value.ndim == 2 and value.shape[:1] == self.loss.shape
            elif name in PER_SITE and not (name == "counted_costs" and value.ndim == 2 and fits):
                shape, fits, entries, remedy = "(s,)", value.ndim == 1, "", "Return one number for each site."
            if not fits:
                problem = f"must have the shape {shape}{entries}."
                raise SettingError(f"sample_statistics.{name}", tuple(value.shape), problem, remedy)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; predictors as ``predictors.<name>``."""
        named = {name: getattr(self, name) for name in FIELDS if getattr(self, name) is not None}
        return named | {f"predictors.{name}": value for name, value in (self.predictors or {}).items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "SampleStatistics":
        """A copy with other tensors, named as by :meth:`tensors`."""
        fields: dict[str, Any] = {name: value for name, value in tensors.items() if name in FIELDS}
        predictors = {name.removeprefix("predictors."): v for name, v in tensors.items() if name not in FIELDS}
        return replace(self, **fields, predictors=None if self.predictors is None else predictors)

    def on_cpu(self) -> "SampleStatistics":
        """A detached copy in float64 on the CPU; takes one transfer from an accelerator."""
        tensors = {name: value.detach().to(self.loss.device) for name, value in self.tensors().items()}
        flat = torch.cat([value.flatten() for value in tensors.values()]).cpu().double()
        parts = zip(tensors, flat.split([value.numel() for value in tensors.values()]), strict=True)
        return self.with_tensors({name: part.view(tensors[name].shape) for name, part in parts})


@dataclass(frozen=True)
class Allocation:
    """What an allocator returns for one batch.

    Example:
        >>> Allocation(torch.tensor([[2, 6]]), {"count_max": 6.0}).counts.sum(dim=1)
        tensor([8])
    """

    counts: Tensor  # (s, b) int64 on the CPU; row s sums exactly to budget.totals(b)[s]
    diagnostics: dict[str, float] = field(default_factory=dict)  # numbers to log, by name
    # (s, b) weight of reused pilots in each sample's gradient, chosen before they are seen; None: their budget share
    pilot_weight: Tensor | None = None
    most: Tensor | None = None  # (s,) upper bound of a sample's counts at each site
    # (s, b) probability with which the sample has queries at the site: where it has some, its gradient is divided by
    # this; None: 1 for all
    inclusion: Tensor | None = None
    expected: Tensor | None = None  # (s, b) float64 expectation of the counts, where samples are drawn


@dataclass(frozen=True)
class TraceObservation:
    """What the queries of a step, spent after the allocation, tell about the traces.

    Example:
        >>> gradients = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])  # (b = 1 sample, 2 queries, 2 parameters)
        >>> TraceObservation(trace=gradients.var(dim=1).sum(dim=-1)[None], queries=torch.tensor([[2.0]])).trace
        tensor([[2.]])
    """

    # (s, b) unbiased estimates of the trace of the covariance of one query's gradient (the sum of the variances of its
    # entries); NaN if none is known
    trace: Tensor
    queries: Tensor  # (s, b) surviving queries behind each
    unit: int = 1  # queries that are independent of others only as a group (2 in antithetic pairs)
    # (s,) variance of the gradient if all samples shared directions, over that with directions of their own, at equal
    # queries; NaN where it is unknown
    sharing: Tensor | None = None

    @property
    def freedom(self) -> Tensor:
        """``(s, b)`` degrees of freedom of each trace: queries (or pairs) less one; 1 of a single one, 0 of none."""
        known = self.trace.isfinite() & (self.queries > 0)
        return torch.where(known, (self.queries / self.unit - 1.0).clamp_min(1.0), 0.0)

    def joined(self, other: "TraceObservation") -> "TraceObservation":
        """All known traces of both; those of ``other`` where both have one."""
        newer = other.trace.isfinite()
        newest = (torch.where(newer, other.trace, self.trace), torch.where(newer, other.queries, self.queries))
        sharing = other.sharing
        if sharing is not None and self.sharing is not None:
            sharing = torch.where(sharing.isnan(), self.sharing, sharing)
        return TraceObservation(*newest, self.unit, sharing)

    def on_cpu(self) -> "TraceObservation":
        """A copy in float64 on the CPU; takes one transfer."""
        trace, queries = torch.stack([self.trace.detach(), self.queries.to(self.trace)]).cpu().double()
        return replace(self, trace=trace, queries=queries)


@dataclass(frozen=True)
class GradientObservation:
    """What the gradient estimate of a step showed about signal and noise, over the samples of all ranks.

    ``along`` is the derivative of the mean clean loss in the direction of the estimate. The queries are independent of
    the clean loss, so its expectation is the squared norm of the exact gradient of the batch.

    Example:
        >>> exact, noise = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])
        >>> estimate = exact + noise
        >>> GradientObservation(float(exact @ estimate), sq_norms=estimate.square().sum()[None]).along
        6.0
    """

    along: float
    sq_norms: Tensor  # (s,) squared norm of the estimate at each site that spends queries
    exact_sq_norm: float = 0.0  # and of what is exact: an exact head

    def plus(self, other: "GradientObservation") -> "GradientObservation":
        """Both together, where sites are updated one after the other."""
        exact = self.exact_sq_norm + other.exact_sq_norm
        return GradientObservation(self.along + other.along, self.sq_norms + other.sq_norms, exact)
