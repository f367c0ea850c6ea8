"""Allocation over samples and sites at once, under a budget of compute instead of a number of queries."""

import heapq
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flops_lightning.allocators.base import one_thread
from flops_lightning.allocators.inclusion import least_expected
from flops_lightning.allocators.objective import optimal_shares
from flops_lightning.allocators.rounding import next_multiple
from flops_lightning.allocators.trace_allocator import TraceAllocator, count_diagnostics
from flops_lightning.allocators.trace_estimator import TraceEstimate
from flops_lightning.errors import SettingError, check_at_least, check_choice, check_positive
from flops_lightning.protocol import Allocation, Metric, QueryBudget, SampleStatistics

Costs = Literal["flops", "measured", "given"]

LEAST_COST = 1e-4  # relative to the dearest query: counted FLOPs can be none where only a loss is computed
MOST_QUERIES = 10  # default of `max_queries`, in multiples of a site's own budget


class CostAwareAllocator(TraceAllocator):
    """Splits a compute budget between samples and sites: ``A_sb ~ sqrt(Tr_sb / c_sb)``.

    A query at site s costs the forward pass above it, ``c_s``, or ``c_sb`` if this differs between samples, such as
    captions of unequal length under a :class:`~flops_lightning.suffix_loss.SuffixLoss`. With independent sites the
    trace of the covariance of the whole gradient is ``sum_sb Tr_sb / A_sb / B^2``. Subject to
    ``sum_sb c_sb A_sb <= C`` it is least for the counts above (Neyman allocation with unequal costs; not in the paper,
    which fixes the queries of each site). ``C`` is the cost of the module's own budgets, so the compute of a step does
    not change, but the number of queries does.

    Traces of block and group sites are converted to squared units of the parameters by the module's estimate of the
    squared norm of their Jacobian (``SampleStatistics.scale``). Every site needs traces: a prediction, or pilots
    everywhere. Unlike with other allocators, the sum of a site's counts is not fixed. A site whose queries are shared
    by all samples is one item, with one count for all.

    Diagnostics: ``J_over_J_own`` (against equal counts of the module's own budget, with the estimated traces),
    ``compute_used`` (share of C), ``queries/<site>`` (average of a sample at each site), ``count_min``, ``count_max``.

    Example:
        >>> from flops_lightning.allocators import TraceSettings
        >>> statistics = SampleStatistics(
        ...     loss=torch.ones(2), trace=torch.tensor([[1.0, 4.0], [1.0, 1.0]]), scale=torch.ones(2),
        ...     counted_costs=torch.tensor([1.0, 0.25]))  # a query at the upper site is four times cheaper
        >>> allocator = CostAwareAllocator(traces=TraceSettings(source="pilots"))
        >>> allocator.allocate(statistics, QueryBudget((8, 8))).counts
        tensor([[ 5, 10],
                [10, 10]])
    """

    def __init__(
        self, *, costs: Costs = "flops", given_costs: Sequence[float] = (), compute: float = 0.0,
        metric: Metric = "parameters", max_queries: int = 0, **settings: Any,
    ) -> None:  # fmt: skip
        """Check the settings.

        Args:
            costs: ``flops``: counted. ``measured``: timed by the module before the first step. ``given``: those in
                ``given_costs`` (a paid API: 1 for each site).
            given_costs: Cost of a query at each site, from bottom to top, in any unit. Only with ``given``.
            compute: Compute of a step per sample, in the unit of the costs (forward-equivalents unless given); 0: the
                cost of the module's own budgets.
            metric: Units in which the parameters' gradients are compared: unchanged, or ``preconditioned`` by the
                optimiser (each squared derivative divided by Adam's running mean square), as an Adam step uses them.
            max_queries: Most queries of a sample at a site; 0: ten times the site's own budget. Without a limit, sites
                that cost almost nothing would get any number.
            **settings: ``traces`` and ``min_queries``, see :class:`TraceAllocator`.
        """
        super().__init__(**settings)
        check_choice("costs", costs, get_args(Costs))
        check_choice("metric", metric, get_args(Metric))
        given_costs = list(given_costs)
        if bool(given_costs) != (costs == "given"):
            remedy = "Write one cost for each site together with costs: given."
            raise SettingError("given_costs", given_costs, f"does not go with costs: {costs}.", remedy)
        for cost in given_costs:
            check_positive("given_costs", cost, "Write, for example, 1 for each site.")
        check_at_least("compute", compute, 0, "Write 0 for what the sites' own budgets cost.")
        if max_queries and max_queries < self.min_queries:
            problem = f"is below min_queries = {self.min_queries}."
            raise SettingError("max_queries", max_queries, problem, "Write 0 for the default, or more.")
        self.costs, self.given_costs, self.compute = costs, given_costs, compute
        self.metric, self.max_queries = metric, max_queries
        self._scale_name = "scale" if metric == "parameters" else "preconditioned_scale"
        source = self._traces.settings
        if source.source != "pilots" and not source.window:
            problem = "cannot tell how traces of one site compare with another's."
            raise SettingError("traces.window", 0, problem, "Write 1 or more.")

    @property
    def requests(self) -> frozenset[str]:
        """The trace estimator's, costs and scales."""
        costs = {"flops": {"counted_costs"}, "measured": {"measured_costs"}}.get(self.costs, set())
        return super().requests | frozenset(costs) | {self._scale_name}

    @one_thread()
    def allocate(self, statistics: SampleStatistics, budget: QueryBudget) -> Allocation:
        """Estimate the traces and split the compute."""
        statistics = statistics.on_cpu()
        sites, batch_size = len(budget.queries_per_sample), len(statistics.loss)
        own = torch.tensor(budget.queries_per_sample, dtype=torch.float64)
        costs = self._costs(statistics, sites).expand(sites, batch_size)
        estimate = self._traces.estimate(statistics, sites=sites, unit=budget.multiple)
        if estimate.prediction is None:
            self._check_pilots(estimate.pilots)
        scales = self._scales(statistics, sites)[:, None]
        multiple = budget.multiple
        drawn = 0 < self.min_queries < 1 or any(isinstance(n, float) for n in budget.queries_per_sample)
        least = (
            min(least_expected(budget, batch_size, self.min_queries))
            if drawn
            else float(next_multiple(max(int(self.min_queries), budget.minimum), multiple))
        )
        if 0 < self.max_queries < least:
            problem = f"is below the least count, {least:g}."
            raise SettingError("max_queries", self.max_queries, problem, f"Write {least:g} or more.")
        most = torch.full_like(own, self.max_queries) if self.max_queries else own * MOST_QUERIES
        if not drawn:
            most = (most.div(multiple).floor() * multiple).clamp_min(least)
        total = self.compute * batch_size or float((costs * own[:, None]).sum())
        if total * (1.0 + 1e-9) < float(costs.sum()) * least:
            problem = f"does not pay for {least:g} queries of every sample at each of {sites} sites."
            enough = 1.0005 * float(costs.sum()) / batch_size * least  # four digits may round down by half a thousandth
            remedy = f"Lower min_queries, or write at least {enough:.4g}."
            raise SettingError("compute", self.compute, problem, remedy)
        unit = 0 if drawn else multiple
        shared = budget.shared_sites
        cheapest = partial(
            cheapest_counts, costs=costs, total=total, least=least, most=most, multiple=unit, shared=shared
        )
        weight = estimate.pilot_weight(lambda p: cheapest(self._variance(p, estimate, scales, own, costs)))
        variance = self._variance(estimate.trace, estimate, scales, own, costs)
        if weight is not None:
            variance = variance * (1.0 - weight).square()
        used, inclusion = cheapest(variance), None
        counts = used
        if drawn:
            lines = torch.tensor(shared)[:, None]
            used = torch.where(lines, (used / budget.unit).round().clamp_min(1.0) * budget.unit, used)
            counts, inclusion, used = self._inclusion.draw(used, unit=budget.unit)
            self._check_drawn(inclusion, weight)
        equal = float((variance.sum(dim=1) / own).sum())
        values = count_diagnostics(counts, estimate)
        values["J_over_J_own"] = float((variance / used).sum()) / equal if equal > 0 else 1.0
        values["compute_used"] = float((costs * counts).sum()) / total
        averages = zip(budget.site_names, counts.double().mean(dim=1).tolist(), strict=True)
        values |= {f"queries/{name}": average for name, average in averages}
        return Allocation(counts, values, weight, most.long(), inclusion, used)

    def _variance(self, trace: Tensor, estimate: TraceEstimate, scales: Tensor, own: Tensor, costs: Tensor) -> Tensor:
        """``(s, b)`` V of :func:`cheapest_counts`: traces in units of the parameters.

        Where nothing tells how large they are at one site beside another (nothing learned yet, or all zero) sites keep
        the share of their own budgets, which V ~ own^2 cost gives.
        """
        variance = trace * scales
        if estimate.calibrated and bool((variance > 0).any()):
            return variance
        root = trace.sqrt()
        root = torch.where(root.sum(dim=1, keepdim=True) > 0, root, 1.0)
        of_site = own.square() * costs.mean(dim=1)
        return (root / root.mean(dim=1, keepdim=True)).square() * of_site[:, None]

    def _costs(self, statistics: SampleStatistics, sites: int) -> Tensor:
        """``(s, b)`` or ``(s, 1)`` positive costs."""
        remedy = "Write costs: given and one number for each site in given_costs."
        counted = statistics.counted_costs if self.costs == "flops" else statistics.measured_costs
        costs = torch.tensor(self.given_costs, dtype=torch.float64) if self.costs == "given" else counted
        if costs is None or len(costs) != sites:
            number = "and `sample_statistics` returned none." if costs is None else f"and there are {len(costs)}."
            raise SettingError("costs", self.costs, f"needs one cost for each of {sites} sites, {number}", remedy)
        if not bool((costs.isfinite() & (costs >= 0)).all()):
            problem = f"gave {costs.tolist()}; all must be finite numbers, 0 or more."
            raise SettingError("costs", self.costs, problem, remedy)
        costs = costs.clamp_min(float(costs.max()) * LEAST_COST) if float(costs.max()) > 0 else torch.ones_like(costs)
        return costs if costs.ndim == 2 else costs[:, None]

    def _scales(self, statistics: SampleStatistics, sites: int) -> Tensor:
        scale: Tensor | None = getattr(statistics, self._scale_name)
        if scale is None and sites > 1:
            problem = f"needs the statistic `{self._scale_name}` to compare {sites} sites."
            remedy = "Return it from `sample_statistics` (ones, if the traces are in squared units of the parameters)."
            raise SettingError("metric", self.metric, problem, remedy)
        scale = torch.ones(sites, dtype=torch.float64) if scale is None else scale
        if len(scale) != sites:
            name, problem = f"sample_statistics.{self._scale_name}", f"must have one factor for each of {sites} sites."
            raise SettingError(name, tuple(scale.shape), problem, "Return one number for each site.")
        return scale

    def _check_pilots(self, pilots: Tensor) -> None:
        """Traces that follow those of other sites are relative: they cannot be compared with traces that were seen."""
        known = (pilots > 0).any(dim=1)
        if bool(known.any()) and not bool(known.all()):
            problem = f"{int(known.sum())} of {len(known)} sites have pilots, and the others no traces to compare."
            remedy = "Set `strategy.pilots` for every site, or source: prediction."
            raise SettingError("traces.source", "pilots", problem, remedy)


def cheapest_counts(
    variance: Tensor, costs: Tensor, total: float, *, least: float, most: Tensor, multiple: int,
    shared: Sequence[bool] = (),
) -> Tensor:  # fmt: skip
    """Integer counts that make ``sum_sb V_sb / A_sb`` small at a cost of at most ``total``.

    The continuous optimum ``A = clamp(k sqrt(V / c), least, most)`` is rounded down to multiples, and what is left is
    spent one multiple at a time where it lowers the sum most for its cost. That is as good as any integer table which
    costs less by one multiple at the dearest site.

    Samples of a ``shared`` site have one count, whose V and cost are the sums of theirs.

    For ``(s, b)`` nonnegative V and ``(s,)`` or ``(s, b)`` positive costs; ``least`` and the ``(s,)`` ``most`` are
    multiples of ``multiple``, and ``total`` pays for ``least`` everywhere. Returns ``(s, b)`` int64; with ``multiple``
    0 the continuous optimum, float64.
    """
    lines = torch.tensor(tuple(shared) or (False,) * len(costs))[:, None]
    first = torch.arange(variance.shape[1]) == 0
    items = ~lines | first  # all entries, but one of a shared line
    size = torch.where(lines, variance.shape[1], 1).double()
    costs = costs if costs.ndim == 2 else costs[:, None]
    each = torch.where(lines, costs.mean(dim=1, keepdim=True), costs)
    price = (each * size).expand_as(variance)[items]
    bound_of = most[:, None].expand_as(variance)[items]
    table, variance = variance, torch.where(lines, variance.sum(dim=1, keepdim=True), variance)[items]
    share = optimal_shares(variance / price)
    share = share / share.max().clamp_min(1e-300)

    def at(log_scale: float) -> Tensor:
        return (share * math.exp(log_scale)).clamp_min(least).minimum(bound_of)

    def of_samples(found: Tensor) -> Tensor:
        counts = torch.zeros_like(table, dtype=found.dtype).masked_scatter(items, found)
        return torch.where(lines, counts[:, :1], counts)

    low, high = -60.0, 60.0  # exp(60) queries are more than any budget
    for _ in range(50):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if float((price * at(middle)).sum()) <= total else (low, middle)
    if not multiple:
        return of_samples(at(low))
    counts = (at(low) / multiple).floor().mul(multiple).clamp_min(least)
    left = total * (1.0 + 1e-12) - float((price * counts).sum())
    flat, value = counts.flatten().tolist(), variance.flatten().tolist()
    step, bound = (price * multiple).tolist(), bound_of.tolist()

    def saving(i: int) -> float:
        return value[i] * (1.0 / flat[i] - 1.0 / (flat[i] + multiple)) / step[i]

    heap = [(-saving(i), i) for i in range(len(flat)) if flat[i] + multiple <= bound[i]]
    heapq.heapify(heap)
    while heap:
        gain, i = heapq.heappop(heap)
        if gain == 0:
            break  # only samples without variance are left
        if step[i] > left:
            continue  # nor will it be affordable later
        flat[i] += multiple
        left -= step[i]
        if flat[i] + multiple <= bound[i]:
            heapq.heappush(heap, (-saving(i), i))
    return of_samples(torch.tensor(flat, dtype=torch.float64)).long()
