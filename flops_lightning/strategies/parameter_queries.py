"""Queries with noise in the parameters: losses first, then the directions are drawn again and weighted.

Nothing is kept per query but its loss: a direction is a pure function of its key, so the gradient
``sum_r c_r D_r`` is made by a second drawing once the coefficients ``c_r`` of all rows are known. How directions are
laid over the rows is the business of a :class:`DirectionLayout`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.phases import phase
from flops_lightning.queries import CleanPass, RowPlan, plan_rows
from flops_lightning.strategies.base import summed
from flops_lightning.strategies.delta import Variant, query_weights
from flops_lightning.strategies.sites import Site


@dataclass(frozen=True, eq=False)
class Evaluated:
    """Losses under the directions of a plan's rows.

    Attributes:
        losses: ``(R,)`` losses; in forward mode their derivatives along the directions.
        sq_norms: ``(R,)`` squared norms of the directions, or their common mean ``d`` plus 2 (see
            :attr:`QueriedParameters.squares`).
        kept: What the layout needs to draw the directions again beside their keys.
    """

    losses: Tensor
    sq_norms: Tensor | float
    kept: Any = None


class DirectionLayout(Protocol):
    """How directions are laid over rows."""

    def evaluate(self, site: Site, clean: CleanPass, plan: RowPlan, *, traces: bool) -> Evaluated:
        """Run all rows."""

    def gradient(
        self, site: Site, clean: CleanPass, plan: RowPlan, coefficients: Tensor, kept: Any
    ) -> dict[str, Tensor]:
        """``sum_r c_r D_r`` by parameter name, ``coefficients`` ``(R,)``; the sign of an antithetic row is in D."""


@dataclass(frozen=True, eq=False)
class QueriedParameters:
    """What queries with noise in the parameters showed.

    Attributes:
        plan: The rows, ``R`` in all.
        sample: ``(R,)`` place of each row's sample.
        weights: ``(R,)`` ``(L - c) / sigma``, zero on rows that do not count.
        alive: ``(R,)`` rows that count.
        survivors: ``(b,)`` rows that count, by sample.
        squares: ``(b,)`` sum over units (queries, or antithetic pairs) of ``w_u^2 (||D_u||^2 - 1)``. Directions have
            ``E D D^T = I``, so ``E w^2`` is the squared norm of the mean gradient where the loss is linear in sigma,
            and the expectation of ``w^2 (||D||^2 - 1)`` is the trace of the covariance of ``w D``. Dense Gaussian
            directions share one number for ``||D||^2``: ``d + 2``, since ``E w^2 ||D||^2 = (d + 2) E w^2``.
        unit: Rows in a unit.
        centred: Weights are taken less the mean of the sample's other queries (leave-one-out).
        kept: Of the layout.
    """

    plan: RowPlan
    sample: Tensor
    weights: Tensor
    alive: Tensor
    survivors: Tensor
    squares: Tensor
    unit: int
    centred: bool
    kept: Any = None

    @property
    def found(self) -> Tensor:
        """``(b,)`` whether a sample has an estimate: a query that counts (leave-one-out: two)."""
        return self.survivors > (1 if self.centred else 0)

    @property
    def small(self) -> bool:
        """Whether losses are all that is kept (activation-guided directions need their bases too)."""
        return not self.kept

    def trace(self) -> Tensor:
        """``(b,)`` trace of the covariance of one query's gradient (of a pair's, times 2); NaN without a query.

        Exact on average where the loss is linear over sigma; curvature and, without a control variate, the loss itself
        make it wrong by a share of the order of one over the number of parameters. A sum that is negative, as it
        may be of few factored directions shorter than 1, counts as 0.
        """
        n = self.survivors / self.unit
        return torch.where(n > 0, self.unit * self.squares.clamp(min=0) / n.clamp(min=1), torch.nan)

    def coefficients(self, share: Tensor) -> Tensor:
        """``(R,)`` coefficients of directions in ``1/B sum_b share_b g_b``, ``g_b`` the mean of a sample's queries."""
        n = self.survivors
        weights, divisor = self.weights, n
        if self.centred:
            mean = torch.zeros_like(n).index_add_(0, self.sample, weights) / n.clamp(min=1)
            weights, divisor = torch.where(self.alive, weights - mean[self.sample], 0.0), n - 1
        per_sample = torch.where(self.found, share / divisor.clamp(min=1), 0.0) / len(n)
        return weights * per_sample[self.sample]


@dataclass(frozen=True, eq=False)
class ParameterQueries:
    """Runs the queries of a site whose parameters are perturbed; holds no state.

    Attributes:
        layout: Lays directions over rows and runs them.
        variant: The control variate.
        chunk_rows: Upper bound of rows in one forward pass.
        forward_mode: ``layout`` returns derivatives instead of losses.
    """

    layout: DirectionLayout
    variant: Variant
    chunk_rows: int
    forward_mode: bool = False

    @property
    def unit(self) -> int:
        """Rows that are independent of others only together: 2 in antithetic pairs, else 1."""
        return 2 if self.variant == "antithetic" else 1

    def query(
        self, site: Site, clean: CleanPass, counts: NDArray[np.int64], *, first_query: int = 0, traces: bool = False
    ) -> QueriedParameters | None:
        """Run queries; see :class:`QueryEngine`."""
        first = -(-first_query // self.unit) * self.unit  # a pair starts at an even index
        plan = plan_rows(counts, self.chunk_rows, first_query=first, multiple=self.unit)
        if not len(plan.samples):
            return None
        run = self.layout.evaluate(site, clean, plan, traces=traces)
        sample = torch.from_numpy(plan.samples).to(clean.loss.device)
        weights, alive = self._weights(site, run.losses, clean.loss[sample])
        by_sample = torch.zeros(clean.batch_size, dtype=weights.dtype, device=weights.device)
        survivors = by_sample.index_add(0, sample, alive.to(weights.dtype))
        signs = torch.tensor([1.0, -1.0], dtype=weights.dtype, device=weights.device)[: self.unit]
        per_unit = (weights.view(-1, self.unit) * signs).mean(1).square()
        norms = run.sq_norms.view(-1, self.unit)[:, 0] if isinstance(run.sq_norms, Tensor) else run.sq_norms
        squares = by_sample.index_add(0, sample[:: self.unit], per_unit * (norms - 1))
        centred = self.variant == "leave_one_out"
        return QueriedParameters(plan, sample, weights, alive, survivors, squares, self.unit, centred, run.kept)

    def _weights(self, site: Site, losses: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        if self.forward_mode:
            alive = torch.isfinite(losses) & torch.isfinite(clean)
            return torch.where(alive, losses, 0.0), alive
        real = torch.ones_like(losses, dtype=torch.bool)
        return query_weights(losses, clean, real, sigma=site.sigma, variant=self.variant)

    def mixed_gradient(
        self, site: Site, clean: CleanPass, parts: Sequence[tuple[QueriedParameters, Tensor]]
    ) -> dict[str, Tensor]:
        """``1/B sum_b sum_parts share_b g_b`` by parameter name, directions drawn again."""
        with phase("accumulation"):
            return summed(
                self.layout.gradient(site, clean, part.plan, part.coefficients(share.to(part.weights)), part.kept)
                for part, share in parts
            )
