"""The Gaussian allocator of FLOPS (Ren et al., ICLR 2025, sections 4.1 to 4.3)."""

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flops_lightning.allocators import gaussian_search
from flops_lightning.allocators.gaussian_search import AllocationProblem, Covariance, Optimum, make_draws
from flops_lightning.allocators.trace_allocator import SearchAllocator, count_diagnostics
from flops_lightning.errors import SettingError, check_choice
from flops_lightning.protocol import Allocation, QueryBudget, SampleStatistics

Gradient = Literal["pathwise", "score", "exact"]

CONSTANT_FEATURE = 1e-6  # standard deviation of tanh(loss) over a batch below which it is taken as constant


class GaussianAllocator(SearchAllocator):
    """Draws the allocation from a Gaussian whose four parameters are optimised on every batch before it is used.

    ``A ~ N(mu, Sigma)`` with ``mu_b = beta0 + beta1 tanh(L_b)`` and ``Sigma_ij = sigma^2 exp(-d_ij / (2 gamma^2))``,
    where ``d`` compares the embeddings of samples. The draw is normalised to the budget, floored at ``min_queries`` and
    rounded by largest remainder. The parameters minimise ``J = E sum_b Tr_b / A_b`` (eq. 9) of the normalised
    allocation, starting from those of the last batch (or from the paper's initial values if these are better).

    The normalisation makes one parameter redundant: the root mean square of ``mu`` over the batch is kept at the
    average number of queries. J is least without randomness (Jensen's inequality), so sigma falls to its lower bound,
    1 % of that average; what is learned is the ratio of ``beta0`` and ``beta1``. With several sites, the optimisation
    uses the budget of the first, and the same draw is rounded for each.

    Samples whose loss, trace or embedding is not finite get the minimum and take no part; negative trace estimates
    count as zero; if no trace is positive (a flat loss), the allocation is equal. ``min_queries: 0`` is the paper's
    choice: a sample whose draw is negative gets no query, which biases the batch gradient; J is computed as if it got
    one.

    Diagnostics: ``beta0, beta1, sigma, gamma``; ``count_min`` and ``count_max`` of the first site; those of
    :class:`SearchAllocator`.

    Example:
        >>> statistics = SampleStatistics(loss=torch.tensor([0.1, 0.5, 2.0]), trace=torch.tensor([1.0, 4.0, 9.0]))
        >>> allocator = GaussianAllocator(gradient="exact", covariance="diagonal")
        >>> allocator.allocate(statistics, QueryBudget((8,))).counts  # close to the optimum, 4, 8 and 12
        tensor([[ 4,  8, 12]])
    """

    least_min_queries = 0

    def __init__(
        self, *, gradient: Gradient = "pathwise", covariance: Covariance = "cosine_distance", **settings: Any
    ) -> None:
        """Check the settings.

        Args:
            gradient: ``"pathwise"``: through the draws ``mu + chol(Sigma) eps``. ``"score"``: the likelihood-ratio
                gradient of eq. 11 with a leave-one-out baseline; noisier, much so if the embeddings of a batch are
                alike. ``"exact"``: a one-dimensional search for the best ratio of beta0 and beta1 with sigma at its
                floor; fastest and never worse.
            covariance: ``"cosine_distance"``: ``d = 1 - cos``. ``"cosine_similarity"``: ``d = cos``, as the paper
                prints it; similar samples then vary *less* together, and the matrix is replaced by the nearest positive
                semi-definite one. ``"diagonal"``: independent draws, no embedding needed.
            **settings: Those of :class:`SearchAllocator`; ``draws`` and ``max_iterations`` not with ``"exact"``.
        """
        super().__init__(**settings)
        check_choice("gradient", gradient, get_args(Gradient))
        check_choice("covariance", covariance, get_args(Covariance))
        if gradient == "exact":
            self._check_no_search("gradient = 'exact'")
        self.gradient, self.covariance = gradient, covariance
        self.parameters: GaussianParameters | None = None  # after the last batch

    @property
    def requests(self) -> frozenset[str]:
        """The trace estimator's, and the embedding unless the covariance is diagonal."""
        return super().requests | frozenset(() if self.covariance == "diagonal" else {"embedding"})

    def state_dict(self) -> dict[str, Any]:
        """Lambda (None before the first batch), and the state of the search."""
        parameters = None if self.parameters is None else list(astuple(self.parameters))
        return super().state_dict() | {"parameters": parameters}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        self.parameters = None if state["parameters"] is None else GaussianParameters(*state["parameters"])

    def check(self, statistics: SampleStatistics) -> None:
        """Raise a :class:`SettingError` also if the covariance needs the embedding and there is none."""
        super().check(statistics)
        if self.covariance != "diagonal" and statistics.embedding is None:
            problem = "compares the embeddings of samples, and `sample_statistics` returned none."
            remedy = "Return `embedding` from `sample_statistics`, or set covariance = 'diagonal'."
            raise SettingError("covariance", self.covariance, problem, remedy)

    def _split(self, statistics: SampleStatistics, budget: QueryBudget) -> Allocation:
        """Optimise lambda on this batch and draw the allocation."""
        self.check(statistics)
        if self.covariance == "diagonal":
            statistics = replace(statistics, embedding=None)
        statistics = statistics.on_cpu()
        least = self._least(statistics, budget)
        usable, trace = self._usable_traces(statistics, budget)
        shares, optimum, generator = usable.double(), None, self._generator()
        if bool((trace > 0).any()):
            shares[usable], optimum = self._draw(statistics, usable, trace[usable], budget, least[0], generator)
        counts, inclusion, expected = self._inclusion.split(shares.expand(len(least), -1), budget, least)
        values = self._search_diagnostics(trace, expected[0], optimum) | count_diagnostics(counts[0])
        if self.parameters is not None:
            values |= {name: float(value) for name, value in vars(self.parameters).items()}
        return Allocation(counts, values, inclusion=inclusion, expected=expected)

    def _draw(
        self, statistics: SampleStatistics, usable: Tensor, trace: Tensor, budget: QueryBudget, least: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, Optimum | None]:  # fmt: skip
        queries = budget.queries_per_sample[0]
        feature = statistics.loss[usable].tanh()
        centre, spread = float(feature.mean()), float(feature.std(correction=0))
        if spread < CONSTANT_FEATURE:  # equal or saturated losses: there is no slope to learn, and none is remembered
            return torch.ones_like(feature), None
        embedding = statistics.embedding
        distance = None if embedding is None else gaussian_search.embedding_distance(embedding[usable], self.covariance)
        total = queries * len(usable) - least * int((~usable).sum())
        floor = least if least < budget.unit else max(least, budget.multiple)
        project = self.covariance == "cosine_similarity"
        problem = AllocationProblem((feature - centre) / spread, trace, distance, project, total, floor)
        normal = torch.randn(1, len(feature), dtype=torch.float64, generator=generator)
        initial = GaussianParameters.initial(queries)
        last = self.parameters or initial
        if self.gradient == "exact":
            optimum = gaussian_search.search(problem, math.log(last.gamma))
        else:
            starts = [to_coordinates(each, centre, spread) for each in dict.fromkeys((last, initial))]
            optimum = gaussian_search.descend(
                problem, starts, gradient=self.gradient, draws=self.draws, max_iterations=self.max_iterations,
                generator=generator,
            )  # fmt: skip
        self._not_converged += not optimum.converged
        self.parameters = from_coordinates(optimum.place, centre, spread, queries)
        return make_draws(problem, optimum.place, problem.correlation(optimum.place), normal)[0], optimum


@dataclass(frozen=True)
class GaussianParameters:
    """The parameters lambda of the Gaussian allocator; a common factor of the first three, in queries, changes nothing.

    Example:
        >>> GaussianParameters.initial(20)
        GaussianParameters(beta0=20, beta1=10.0, sigma=4.0, gamma=1.0)
    """

    beta0: float
    beta1: float
    sigma: float
    gamma: float

    @classmethod
    def initial(cls, queries_per_sample: float) -> "GaussianParameters":
        """The starting values of section 4.3, from the average number of queries ``Abar``."""
        return cls(queries_per_sample, queries_per_sample / 2, queries_per_sample / 5, 1.0)


def to_coordinates(parameters: GaussianParameters, centre: float, spread: float) -> Tensor:
    """``(3,)`` ``angle, ln(sigma), ln(gamma)`` for a batch whose feature has this mean and standard deviation."""
    # The mean of mu is `level`, its standard deviation `tilt`, and its root mean square their hypotenuse.
    level, tilt = parameters.beta0 + parameters.beta1 * centre, parameters.beta1 * spread
    sigma = parameters.sigma / math.hypot(level, tilt)
    return torch.tensor([math.atan2(tilt, level), math.log(sigma), math.log(parameters.gamma)], dtype=torch.float64)


def from_coordinates(coordinates: Tensor, centre: float, spread: float, queries: float) -> GaussianParameters:
    """Lambda in the scale in which ``mu`` has the root mean square ``queries`` over the batch."""
    angle, log_sigma, log_gamma = coordinates.tolist()
    beta1 = queries * math.sin(angle) / spread
    beta0, sigma = queries * math.cos(angle) - beta1 * centre, queries * math.exp(log_sigma)
    return GaussianParameters(beta0, beta1, sigma, gamma=math.exp(log_gamma))
