"""The Gaussian allocator of FLOPS (Ren et al., ICLR 2025, sections 4.1 to 4.3)."""

from __future__ import annotations

import math
from dataclasses import astuple, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flops_lightning.allocators.base import QueryAllocator, batch_generator
from flops_lightning.allocators.correlation import Covariance, embedding_distance
from flops_lightning.allocators.gaussian_objective import AllocationProblem, make_draws
from flops_lightning.allocators.gaussian_optimisation import Optimum, descend, search
from flops_lightning.allocators.gaussian_parameters import GaussianParameters, from_coordinates, to_coordinates
from flops_lightning.allocators.objective import equal_objective, objective
from flops_lightning.allocators.rounding import check_budget, next_multiple, round_at_sites
from flops_lightning.allocators.threads import one_thread
from flops_lightning.allocators.trace_estimator import TraceEstimator, TraceSettings
from flops_lightning.errors import SettingError
from flops_lightning.protocol import Allocation, QueryBudget, SampleStatistics, TraceObservation

Gradient = Literal["pathwise", "score", "exact"]

DRAWS = 32
MAX_ITERATIONS = 100


CONSTANT_FEATURE = 1e-6
"""Standard deviation of tanh(loss) over a batch below which it is taken as constant."""


class GaussianAllocator(QueryAllocator):
    """Draws the allocation from a Gaussian whose four parameters are optimised on every batch before it is used.

    ``A ~ N(mu, Sigma)`` with ``mu_b = beta0 + beta1 tanh(L_b)`` and ``Sigma_ij = sigma^2 exp(-d_ij / (2 gamma^2))``,
    where ``d`` compares the embeddings of samples. The draw is normalised to the budget, floored at ``min_queries`` and
    rounded by largest remainder. The parameters minimise ``J = E sum_b Tr_b / A_b`` (eq. 9) of the normalised
    allocation, starting from those of the last batch (or from the paper's initial values where these are better).

    Because of the normalisation one parameter is redundant: the root mean square of ``mu`` over the batch is kept at
    the average number of queries. J is least without randomness (Jensen), so sigma runs to its floor, 1 % of that
    average, where gamma hardly matters; what is learned is the ratio of ``beta0`` and ``beta1``. Where sites have
    different budgets, the optimisation looks at the first, and the same draw is rounded for each.

    Samples whose loss, trace or embedding is not finite get the minimum and take no part in the optimisation; negative
    trace estimates count as zero; if no trace is positive (a flat loss), the allocation is equal.

    Diagnostics: ``beta0, beta1, sigma, gamma``; ``iterations``, ``converged`` (0 or 1) and ``not_converged_total`` (so
    many batches so far); ``J_over_J_equal`` (of the integer counts of the first site, with the traces given);
    ``count_min``, ``count_max``.
    """

    def __init__(
        self,
        *,
        traces: TraceSettings | None = None,
        gradient: Gradient = "pathwise",
        covariance: Covariance = "cosine_distance",
        min_queries: int = 1,
        draws: int = DRAWS,
        max_iterations: int = MAX_ITERATIONS,
        seed: int = 0,
    ) -> None:
        """Choose how the four parameters are optimised.

        Args:
            traces: Where the traces in J come from; None: from pilots, as in the paper. Where several sites have
                traces, a sample's is the mean over them, each in units of its own mean over the batch.
            gradient: ``"pathwise"``: through the draws ``mu + chol(Sigma) eps``. ``"score"``: the likelihood-ratio
                gradient of eq. 11 with a leave-one-out baseline; noisier, much so where the embeddings of a batch are
                alike. ``"exact"``: a one-dimensional search for the best ratio of beta0 and beta1 with sigma at its
                floor; fastest and never worse.
            covariance: ``"cosine_distance"``: ``d = 1 - cos``. ``"cosine_similarity"``: ``d = cos``, as the paper
                prints it; similar samples then vary *less* together, and the matrix is replaced by the nearest positive
                semi-definite one. ``"diagonal"``: independent draws, no embedding needed.
            min_queries: Least queries of a sample, raised to the next multiple of the budget's ``multiple``. 0 is the
                paper's choice: a sample whose draw is negative gets no query at all, which biases the batch gradient;
                J is evaluated as if it got one.
            draws: Draws K over which J and its gradient are averaged. Not with ``"exact"``.
            max_iterations: Gradient steps on a batch after which it counts as not converged. Not with ``"exact"``.
            seed: Seed of the draws, at least 0. The draws of a batch depend on it and on the number of batches before.

        Raises:
            SettingError: A value is out of its range, or has no effect with this ``gradient``.
        """
        for name, value, choices in (
            ("gradient", gradient, get_args(Gradient)),
            ("covariance", covariance, get_args(Covariance)),
        ):
            if value not in choices:
                raise SettingError(name, value, "is not known.", f"Choose one of {', '.join(choices)}.")
        for name, number, least in (
            ("min_queries", min_queries, 0),
            ("draws", draws, 2),
            ("max_iterations", max_iterations, 1),
            ("seed", seed, 0),
        ):
            if number < least:
                raise SettingError(name, number, f"must be at least {least}.", f"Write {least} or more.")
        for name, number, default in (("draws", draws, DRAWS), ("max_iterations", max_iterations, MAX_ITERATIONS)):
            if gradient == "exact" and number != default:
                raise SettingError(name, number, "has no effect with gradient = 'exact'.", f"Remove `{name}`.")
        self.gradient: Gradient = gradient
        self.covariance: Covariance = covariance
        self.min_queries, self.draws, self.max_iterations, self.seed = min_queries, draws, max_iterations, seed
        self._traces = TraceEstimator(traces or TraceSettings(source="pilots"))
        self._parameters: GaussianParameters | None = None
        self._batches = 0
        self._not_converged = 0

    @property
    def parameters(self) -> GaussianParameters | None:
        """Lambda as the last batch left it, or None before the first."""
        return self._parameters

    @property
    def requests(self) -> frozenset[str]:
        """What the trace estimator reads, and the embedding where the covariance is made of it."""
        return self._traces.requests | frozenset(() if self.covariance == "diagonal" else {"embedding"})

    @property
    def learns(self) -> bool:
        """Whether the traces come from a regression."""
        return self._traces.learns

    def observe(self, observation: TraceObservation) -> None:
        """Teach the regression."""
        self._traces.observe(observation)

    def state_dict(self) -> dict[str, Any]:
        """Lambda (None before the first batch), the counters of batches and of those not converged, and the traces."""
        return {
            "traces": self._traces.state_dict(),
            "parameters": None if self._parameters is None else list(astuple(self._parameters)),
            "batches": self._batches,
            "not_converged": self._not_converged,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        parameters = state["parameters"]
        if "traces" in state:  # older checkpoints have none
            self._traces.load_state_dict(state["traces"])
        self._parameters = None if parameters is None else GaussianParameters(*parameters)
        self._batches, self._not_converged = int(state["batches"]), int(state["not_converged"])

    def check(self, statistics: SampleStatistics) -> None:
        """Raise if the embedding is missing where the covariance is made of it.

        Raises:
            SettingError: As said, with the remedy.
        """
        super().check(statistics)
        if self.covariance != "diagonal" and statistics.embedding is None:
            raise SettingError(
                "covariance",
                self.covariance,
                "compares the embeddings of samples, and `sample_statistics` returned none.",
                "Return `embedding` from `sample_statistics`, or set covariance = 'diagonal'.",
            )

    @one_thread()
    def allocate(self, statistics: SampleStatistics, budget: QueryBudget) -> Allocation:
        """Optimise lambda on this batch and draw the allocation.

        Args:
            statistics: ``loss`` and ``trace``, and ``embedding`` unless the covariance is diagonal.
            budget: Queries per sample at each site.

        Returns:
            ``(s, b)`` counts and the diagnostics listed above.

        Raises:
            SettingError: A statistic is missing, or the budget is too small for ``min_queries``.
        """
        self.check(statistics)
        if self.covariance == "diagonal":
            statistics = replace(statistics, embedding=None)
        statistics = statistics.on_cpu()
        totals = [queries * len(statistics.loss) for queries in budget.queries_per_sample]
        minimum = max(self.min_queries, budget.minimum)
        for total in totals:
            check_budget(total, len(statistics.loss), minimum=minimum, multiple=budget.multiple)
        usable, trace = self._usable_traces(statistics, budget)
        generator = batch_generator(self.seed, self._batches)
        self._batches += 1
        shares, optimum = usable.double(), None
        if bool((trace > 0).any()):
            shares[usable], optimum = self._draw(statistics, usable, trace[usable], budget, generator)
        counts = round_at_sites(shares.expand(len(totals), -1), totals, minimum=minimum, multiple=budget.multiple)
        return Allocation(counts=counts, diagnostics=self._diagnostics(trace, counts[0], optimum))

    def _draw(
        self,
        statistics: SampleStatistics,
        usable: Tensor,
        trace: Tensor,
        budget: QueryBudget,
        generator: torch.Generator,
    ) -> tuple[Tensor, Optimum | None]:
        queries = budget.queries_per_sample[0]
        least = next_multiple(max(self.min_queries, budget.minimum), budget.multiple)
        feature = statistics.loss[usable].tanh()
        centre, spread = float(feature.mean()), float(feature.std(correction=0))
        if spread < CONSTANT_FEATURE:  # equal or saturated losses: there is no slope to learn, and none is remembered
            return torch.ones_like(feature), None
        embedding = statistics.embedding
        problem = AllocationProblem(
            feature=(feature - centre) / spread,
            trace=trace,
            distance=None if embedding is None else embedding_distance(embedding[usable], self.covariance),
            project=self.covariance == "cosine_similarity",
            total=queries * len(usable) - least * int((~usable).sum()),
            floor=max(least, budget.multiple),
        )
        normal = torch.randn(1, len(feature), dtype=torch.float64, generator=generator)
        initial = GaussianParameters.initial(queries)
        last = self._parameters or initial
        if self.gradient == "exact":
            optimum = search(problem, math.log(last.gamma))
        else:
            optimum = descend(
                problem,
                [to_coordinates(each, centre, spread) for each in dict.fromkeys((last, initial))],
                gradient=self.gradient,
                draws=self.draws,
                max_iterations=self.max_iterations,
                generator=generator,
            )
        self._not_converged += not optimum.converged
        self._parameters = from_coordinates(optimum.coordinates, centre, spread, queries)
        correlation = problem.correlation(optimum.coordinates)
        return make_draws(problem, optimum.coordinates, correlation, normal)[0], optimum

    def _usable_traces(self, statistics: SampleStatistics, budget: QueryBudget) -> tuple[Tensor, Tensor]:
        # Which samples' statistics are finite, (b,) bool, and the traces over their maximum, with those of the others
        # at zero: their scale does not matter, and squares and sums of the largest must not overflow.
        sites = len(budget.queries_per_sample)
        estimate = self._traces.estimate(statistics, sites=sites, unit=budget.multiple)
        usable, trace = estimate.usable, estimate.combined()
        if statistics.embedding is not None:
            usable = usable & statistics.embedding.isfinite().all(dim=1)
        trace = torch.where(usable, trace, 0.0)
        return usable, trace / trace.max().clamp_min(torch.finfo(torch.float64).tiny)

    def _diagnostics(self, trace: Tensor, counts: Tensor, optimum: Optimum | None) -> dict[str, float]:
        equal = equal_objective(trace, int(counts.sum()))
        values = {
            "iterations": float(optimum.iterations if optimum else 0),
            "converged": float(optimum.converged if optimum else True),
            "not_converged_total": float(self._not_converged),
            "J_over_J_equal": float(objective(trace, counts) / equal) if equal > 0 else 1.0,
            "count_min": float(counts.min()),
            "count_max": float(counts.max()),
        }
        if self._parameters is not None:
            values |= {name: float(value) for name, value in vars(self._parameters).items()}
        return values
