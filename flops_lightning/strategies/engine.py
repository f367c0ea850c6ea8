"""What runs the queries of one site: the part of a strategy that knows where noise enters and what gradient follows."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.queries import CleanPass
from flops_lightning.strategies.sites import Site


@dataclass(frozen=True, eq=False)
class SiteGradient:
    """Gradient estimate of one site.

    Attributes:
        gradients: Returns the gradients by parameter name. Directions that are drawn again are drawn when it is called,
            after the queries of all sites: until then the gradients take no memory beside the activations.
        survivors: ``(b,)`` queries that count.
        queries: Queries that ran, repetitions after a loss included.
        sharing: :meth:`QueryResult.sharing` of these gradients.
    """

    gradients: Callable[[], Mapping[str, Tensor]]
    survivors: Tensor
    queries: int
    sharing: Callable[[Mapping[str, Tensor]], Tensor | float] = lambda _: math.nan


class QueryResult(Protocol):
    """What the queries of a site showed, sample by sample."""

    @property
    def survivors(self) -> Tensor:
        """``(b,)`` queries with finite losses (and finite antithetic partners)."""

    @property
    def found(self) -> Tensor:
        """``(b,)`` whether they give an estimate of the sample's gradient."""

    @property
    def small(self) -> bool:
        """Whether it holds no more than a few numbers a query, so that its gradient can be made late."""

    def trace(self) -> Tensor:
        """``(b,)`` trace of the covariance of one query's gradient; NaN where it is unknown."""

    def sharing(self, gradients: Mapping[str, Tensor]) -> Tensor | float:
        """Variance of these ``gradients`` with directions that all samples share over that with their own.

        ``gradients`` are the estimate from these queries. NaN where it is unknown.
        """


Q = TypeVar("Q", bound=QueryResult)


class QueryEngine(Protocol[Q]):
    """Runs the queries of a site; holds no state of its own."""

    def query(
        self, site: Site, clean: CleanPass, counts: NDArray[np.int64], *, first_query: int = 0, traces: bool = False
    ) -> Q | None:
        """Run queries.

        ``counts`` is ``(b,)``, and ``first_query`` the index of the first query (earlier ones were pilots).
        ``traces``: also compute what :meth:`QueryResult.trace` needs. None if no sample has a query.
        """

    def mixed_gradient(self, site: Site, clean: CleanPass, parts: Sequence[tuple[Q, Tensor]]) -> dict[str, Tensor]:
        """``1/B sum_b sum_parts share_b g_b`` by parameter name, ``g_b`` the mean gradient of a part's queries.

        ``parts`` are results of queries, each with its ``(b,)`` shares of the samples' estimates.
        """


def summed(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Sum of gradients by name, in the tensors of the first part that has them."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, gradient in part.items():
            total[name] = total[name].add_(gradient) if name in total else gradient
    return total
