"""Which allocators the allocation study compares, and what each is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from flops_lightning.allocators import (
    BernoulliAllocator,
    CostAwareAllocator,
    EqualAllocator,
    GaussianAllocator,
    OptimalAllocator,
    QueryAllocator,
    TraceSettings,
)

MOST_PILOTS = 4


@dataclass(frozen=True)
class Case:
    """An allocator as it is compared.

    Attributes:
        name: In tables and plots.
        make: Makes a new one.
        pilots: Sites with pilots: ``lowest``, ``deepest``, ``all``, or none. Pilots are paid from the same budget and
            reused.
        best_linear: Name of the case with the best allocation linear in tanh(loss) under the same traces.
    """

    name: str
    make: Callable[[], QueryAllocator]
    pilots: str = ""
    best_linear: str = "best linear"

    def pilot_queries(self, budget: int, *, unit: int, minimum: int) -> int:
        """Pilots of a sample at each of its sites: four, or what a small budget leaves beside the minimum."""
        if not self.pilots:
            return 0
        most = min(MOST_PILOTS * unit, (budget - max(minimum, unit)) // unit * unit)
        return most if most >= 2 * unit else 0


predicted = partial(TraceSettings, source="prediction")

CASES: Sequence[Case] = (
    Case("equal", EqualAllocator),
    Case("bernoulli", lambda: BernoulliAllocator(traces=predicted())),
    Case("bernoulli, p = 0.5", lambda: BernoulliAllocator(optimise=False)),
    Case("gaussian", lambda: GaussianAllocator(traces=predicted())),
    Case("gaussian, score gradient", lambda: GaussianAllocator(traces=predicted(), gradient="score")),
    Case("gaussian, diagonal", lambda: GaussianAllocator(traces=predicted(), covariance="diagonal")),
    Case("gaussian, pilots lowest", GaussianAllocator, pilots="lowest", best_linear="best linear, pilots lowest"),
    Case("gaussian, pilots deepest", GaussianAllocator, pilots="deepest", best_linear="best linear, pilots deepest"),
    Case("best linear", lambda: GaussianAllocator(traces=predicted(), gradient="exact")),
    Case(
        "best linear, pilots lowest", lambda: GaussianAllocator(gradient="exact"), pilots="lowest",
        best_linear="best linear, pilots lowest",
    ),
    Case(
        "best linear, pilots deepest", lambda: GaussianAllocator(gradient="exact"), pilots="deepest",
        best_linear="best linear, pilots deepest",
    ),
    Case("optimal", lambda: OptimalAllocator(traces=predicted())),
    Case("optimal, loss only", lambda: OptimalAllocator(traces=TraceSettings(predictors=["loss"]))),
    Case("optimal, pilots everywhere", lambda: OptimalAllocator(traces=TraceSettings("pilots")), pilots="all"),
    Case("optimal, both", lambda: OptimalAllocator(traces=TraceSettings("both")), pilots="lowest"),
    Case("cost-aware", lambda: CostAwareAllocator(traces=predicted())),
)  # fmt: skip
