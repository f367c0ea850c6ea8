"""Which allocators the allocation study compares, and what each is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from flops_lightning import allocators
from flops_lightning.allocators import GaussianAllocator, OptimalAllocator, QueryAllocator, TraceSettings

MOST_PILOTS = 4


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], QueryAllocator]
    pilots: str = ""  # at the lowest, the deepest or all sites; paid from the same budget and reused
    best_linear: str = "best linear"  # the case of the best allocation linear in tanh(loss) under the same traces

    def pilot_queries(self, budget: int, *, multiple: int, minimum: int) -> int:
        """Pilots of a sample at each of its sites: four, or what a small budget leaves beside the minimum."""
        if not self.pilots:
            return 0
        most = min(MOST_PILOTS * multiple, (budget - max(minimum, multiple)) // multiple * multiple)
        return most if most >= 2 * multiple else 0


predicted = partial(TraceSettings, source="prediction")
exact = partial(GaussianAllocator, gradient="exact")

CASES: Sequence[Case] = (
    Case("equal", allocators.EqualAllocator),
    Case("bernoulli", lambda: allocators.BernoulliAllocator(traces=predicted())),
    Case("bernoulli, p = 0.5", lambda: allocators.BernoulliAllocator(optimise=False)),
    Case("gaussian", lambda: GaussianAllocator(traces=predicted())),
    Case("gaussian, score gradient", lambda: GaussianAllocator(traces=predicted(), gradient="score")),
    Case("gaussian, diagonal", lambda: GaussianAllocator(traces=predicted(), covariance="diagonal")),
    Case("gaussian, pilots lowest", GaussianAllocator, "lowest", "best linear, pilots lowest"),
    Case("gaussian, pilots deepest", GaussianAllocator, "deepest", "best linear, pilots deepest"),
    Case("best linear", lambda: GaussianAllocator(traces=predicted(), gradient="exact")),
    Case("best linear, pilots lowest", exact, "lowest", "best linear, pilots lowest"),
    Case("best linear, pilots deepest", exact, "deepest", "best linear, pilots deepest"),
    Case("optimal", lambda: OptimalAllocator(traces=predicted())),
    Case("optimal, loss only", lambda: OptimalAllocator(traces=TraceSettings(predictors=["loss"]))),
    Case("optimal, pilots everywhere", lambda: OptimalAllocator(traces=TraceSettings("pilots")), pilots="all"),
    Case("optimal, both", lambda: OptimalAllocator(traces=TraceSettings("both")), pilots="lowest"),
    Case("cost-aware", lambda: allocators.CostAwareAllocator(traces=predicted())),
)
