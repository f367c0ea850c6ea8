"""Queries with noise in the parameters: run all rows, then regenerate their directions and sum them with weights.

Only the losses are kept. A direction is a pure function of its key, so it is generated a second time for the gradient
``sum_r c_r D_r``, once the coefficients ``c_r`` of all rows are known.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.distributed import Communicator
from flops_lightning.network.functional import FunctionalStages
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.noise.keys import NoiseKey
from flops_lightning.phases import phase
from flops_lightning.queries import CleanPass, LossFunction, RowPlan, plan_rows, row_losses, rows_of
from flops_lightning.strategies.delta import Variant, query_weights
from flops_lightning.strategies.engine import summed
from flops_lightning.strategies.sites import Site
from flops_lightning.transfers import to_device

Losses = Callable[[Tensor], Tensor]
"""``(r,)`` signed step of each row along its direction -> ``(r,)`` losses."""


@dataclass(frozen=True)
class Response:
    """Weight of a row's direction ``D``: the finite difference ``(L(theta + sigma D) - c) / sigma``.

    Attributes:
        variant: The control variate ``c``.
        in_place: Whether layers may overwrite their outputs; not where the pass is differentiated.
    """

    variant: Variant
    in_place: ClassVar[bool] = True

    def values(self, losses: Losses, sigma: float, signs: Tensor) -> Tensor:
        """``(r,)`` losses of the rows. ``signs``: -1 for the minus rows of antithetic pairs, else 1."""
        return losses(sigma * signs)

    def weights(self, values: Tensor, clean: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """``(R,)`` weights of the directions, and the mask of finite rows; ``clean`` ``(R,)``: their clean losses."""
        real = torch.ones_like(values, dtype=torch.bool)
        return query_weights(values, clean, real, sigma=sigma, variant=self.variant)


@dataclass(frozen=True, eq=False)
class RowResponses:
    """``(R,)`` values of :meth:`Response.values` and squared norms of the directions (or one number for all).

    ``kept`` is what the layout needs to draw the directions again beside their keys.
    """

    values: Tensor
    sq_norms: Tensor | float
    kept: Any = None


@dataclass(frozen=True, eq=False)
class DirectionLayout(ABC):
    """How directions are laid over rows.

    Attributes:
        key: Seed and rank of the noise.
        unit: With 2, rows ``2p`` and ``2p + 1`` of a sample take ``+D_p`` and ``-D_p``.
        chunk_rows: Upper bound of the rows in one forward pass.
        stop: Stage whose input ``(r, ...)`` is what rows give in the place of their losses; None: the losses.
    """

    network: StagedNetwork
    stages: FunctionalStages
    loss: LossFunction
    key: NoiseKey
    unit: int
    chunk_rows: int
    response: Response
    stop: int | None = field(default=None, kw_only=True)

    def read(self, h: Any, start: int, targets: Any) -> Tensor:
        """What a row gives, from the input ``h`` of stage ``start`` on: its loss ``(r,)``, or the input of ``stop``."""
        if self.stop is not None:
            entering: Tensor = self.network.run(h, start, self.stop)
            return entering
        return row_losses(self.loss, self.network.run_suffix(h, start), targets)

    def signs(self, queries: NDArray[np.int64], like: Tensor) -> Tensor:
        """-1 for the minus rows of antithetic pairs, else 1."""
        return to_device(1.0 - 2.0 * (queries % self.unit), like)

    @abstractmethod
    def run(self, site: Site, clean: CleanPass, plan: RowPlan, *, traces: bool) -> RowResponses:
        """Run all rows; with ``traces`` their squared norms are needed."""

    @abstractmethod
    def gradient(
        self, site: Site, clean: CleanPass, plan: RowPlan, coefficients: Tensor, kept: Any
    ) -> dict[str, Tensor]:
        """``sum_r c_r D_r`` by parameter name, ``coefficients`` ``(R,)``; D has the sign of an antithetic row."""


@dataclass(frozen=True, eq=False)
class ParameterQueryResult:
    """Result of the queries at a site: ``R`` rows, samples ``b``, units of 1 row or of 2 (antithetic pairs).

    Attributes:
        plan: The rows.
        sample: ``(R,)`` sample of each row.
        weights: ``(R,)`` weights of the directions, zero on rows that do not count.
        alive: ``(R,)`` rows that count.
        survivors: ``(b,)`` rows of each sample that count.
        squares: ``(b,)`` sum over units of ``w_u^2 (||D_u||^2 - 1)``. Directions have ``E D D^T = I``, so ``E w^2`` is
            the squared norm of the mean gradient where the loss is linear in sigma, and the expectation of ``w^2
            (||D||^2 - 1)`` is the trace of the covariance of ``w D``. Dense Gaussian directions share one number for
            ``||D||^2``: ``d + 2``, since ``E w^2 ||D||^2 = (d + 2) E w^2``.
        unit: Rows in a unit.
        power: ``(b,)`` sum over units of ``w_u^2``, of each sample's own weights.
        shared_power: ``(b,)`` ``B`` times the same of the mean weight of all samples, where a query is made once for
            the batch; else None.
        centred: Weights are centred on the mean of the sample's other queries (leave-one-out).
        kept: See :class:`RowResponses`.
    """

    plan: RowPlan
    sample: Tensor
    weights: Tensor
    alive: Tensor
    survivors: Tensor
    squares: Tensor
    power: Tensor
    shared_power: Tensor | None
    unit: int
    centred: bool
    kept: Any = None

    @property
    def found(self) -> Tensor:
        """``(b,)`` whether a sample has an estimate: a query that counts (leave-one-out: two)."""
        return self.survivors > (1 if self.centred else 0)

    @property
    def small(self) -> bool:
        """Whether only losses are kept (activation-guided directions need their bases too)."""
        return not self.kept

    def trace(self) -> Tensor:
        """``(b,)`` trace of the covariance of one query's gradient (of a pair's, times 2); NaN without a query.

        Unbiased if the loss is linear within sigma. Curvature and, without a control variate, the loss itself add a
        relative bias of the order of 1 / (number of parameters). A negative sum, which happens with a few factored
        directions shorter than 1, is clamped to 0.
        """
        n = self.survivors / self.unit
        return torch.where(self.found, self.unit * self.squares.clamp(min=0) / n.clamp(min=1), torch.nan)

    def sharing(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """``B |g|^2 / mean_b |g_b|^2``: variance with directions that all samples share over that with their own.

        At equal queries, of the batch's gradient; a scalar. ``g_b`` are the samples' gradients and ``g`` is their mean,
        of which ``gradients`` are the estimate from these queries. Numerator and denominator are unbiased, as far as
        traces are. NaN where a sample has no estimate.
        """
        n = self.survivors / self.unit
        own = (self.power / n.clamp(min=1)).mean()
        if self.shared_power is not None:
            shared = (self.shared_power / n.clamp(min=1)).mean()
        else:  # less what the estimate's own variance adds: the trace of a query's covariance over the queries
            rest = n - 1 if self.centred else n
            sq_norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().to(own)
            shared = sq_norm * len(n) - (self.squares / (n * rest).clamp(min=1)).mean()
        return torch.where(self.found.all() & (own > 0), shared / own, torch.nan)

    def coefficients(self, share: Tensor) -> Tensor:
        """``(R,)`` coefficients of directions in ``1/B sum_b share_b g_b``, ``g_b`` the mean of a sample's queries."""
        n = self.survivors
        weights, divisor = self.weights, n
        if self.centred:
            mean = torch.zeros_like(n).index_add_(0, self.sample, weights) / n.clamp(min=1)
            weights, divisor = torch.where(self.alive, weights - mean[self.sample], 0.0), n - 1
        per_sample = torch.where(self.found, share / divisor.clamp(min=1), 0.0) / len(n)
        return weights * per_sample[self.sample]


def normalized(
    result: ParameterQueryResult | None, clean: CleanPass, communicator: Communicator
) -> ParameterQueryResult | None:
    """Weights divided by their standard deviation over the samples of all ranks; traces stay as they are.

    With ``w_bu`` the weight of the unit ``u`` of sample ``b`` and ``n_b`` units that count::

        s^2 = mean_b 1/n_b sum_u (w_bu - m)^2        m = mean_b 1/n_b sum_u w_bu

    so that samples count alike, whatever their queries. Zero where ``s`` is: a single unit has no scatter.
    """
    weight = share = clean.loss.new_zeros(0)
    if result is not None:
        weight = _slopes(result.weights, result.unit)
        sample = result.sample[:: result.unit]
        share = result.alive[:: result.unit] * result.unit / result.survivors[sample].clamp(min=1)
    samples, total = communicator.sum(torch.stack([share.sum(), (share * weight).sum()]).double())
    mean = total / samples.clamp(min=1)
    square = communicator.sum((share * (weight.double() - mean).square()).sum()) / samples.clamp(min=1)
    if result is None:
        return None
    scaled = result.weights / square.sqrt().to(result.weights)
    unknown = torch.full_like(result.power, torch.nan)  # the gradient has another length than the power tells
    return replace(result, weights=torch.where(square > 0, scaled, 0.0), power=unknown)


@dataclass(frozen=True, eq=False)
class ParameterQueries:
    """Runs the queries of a site whose parameters are perturbed; holds no state.

    Attributes:
        layouts: How the directions of a site are laid over its rows.
    """

    layouts: Callable[[Site], DirectionLayout]

    def query(
        self, site: Site, clean: CleanPass, counts: NDArray[np.int64], *, first_query: int = 0, traces: bool = False
    ) -> ParameterQueryResult | None:
        """Run queries; see :class:`QueryEngine`."""
        layout = self.layouts(site)
        first = -(-first_query // layout.unit) * layout.unit  # a pair starts at an even index
        plan = plan_rows(counts, layout.chunk_rows, first_query=first, multiple=layout.unit)
        if not len(plan.samples):
            return None
        with rows_of(layout.network, layout.loss, replace(layout.key, draw=clean.draw, site=site.name)):
            rows = layout.run(site, clean, plan, traces=traces)
        return self.result(site, clean, plan, layout, rows)

    def result(
        self, site: Site, clean: CleanPass, plan: RowPlan, layout: DirectionLayout, rows: RowResponses
    ) -> ParameterQueryResult:
        """What the values of a site's rows show."""
        sample, unit = to_device(plan.samples, clean.loss.device), layout.unit
        by_sample = torch.zeros(clean.batch_size, dtype=rows.values.dtype, device=clean.loss.device)
        centred = layout.response.variant == "leave_one_out"
        control = _means_of_samples(rows.values, sample, by_sample)[sample] if centred else clean.loss[sample]
        weights, alive = layout.response.weights(rows.values, control, site.sigma)
        survivors = by_sample.index_add(0, sample, alive.to(weights.dtype))
        of_unit, slopes = sample[::unit], _slopes(weights, unit)
        # The sum of squares about a mean of n falls short by (n - 1) / n.
        bessel = torch.where(survivors > 1, survivors / (survivors - 1).clamp(min=1), 0.0) if centred else by_sample + 1
        power, shared = by_sample.index_add(0, of_unit, slopes.square()) * bessel, None
        if site.per_batch:
            slopes = _mean_of_direction(slopes, plan.queries[::unit], clean.batch_size) * clean.batch_size**0.5
            shared = by_sample.index_add(0, of_unit, slopes.square()) * bessel
        norms = rows.sq_norms.view(-1, unit)[:, 0] if isinstance(rows.sq_norms, Tensor) else rows.sq_norms
        squares = by_sample.index_add(0, of_unit, slopes.square() * (norms - 1)) * bessel
        return ParameterQueryResult(
            plan, sample, weights, alive, survivors, squares, power, shared, unit, centred, rows.kept
        )

    def mixed_gradient(
        self, site: Site, clean: CleanPass, parts: Sequence[tuple[ParameterQueryResult, Tensor]]
    ) -> dict[str, Tensor]:
        """``1/B sum_b sum_parts share_b g_b`` by parameter name, directions drawn again."""
        with phase("accumulation"):
            return summed(
                self.layouts(site).gradient(
                    site, clean, part.plan, part.coefficients(share.to(part.weights)), part.kept
                )
                for part, share in parts
            )


def _means_of_samples(values: Tensor, sample: Tensor, by_sample: Tensor) -> Tensor:
    """``(b,)`` mean of the finite ``(R,)`` values of each sample, ``by_sample`` zeros; 0 where there is none."""
    finite = values.isfinite()
    total = by_sample.index_add(0, sample, torch.where(finite, values, 0.0))
    return total / by_sample.index_add(0, sample, finite.to(values.dtype)).clamp(min=1)


def _slopes(weights: Tensor, unit: int) -> Tensor:
    """Difference quotient of each query, or of each antithetic pair, along its direction, from the queries' weights."""
    return (weights.view(-1, unit) * to_device([1.0, -1.0][:unit], weights)).mean(1)


def _mean_of_direction(slopes: Tensor, queries: NDArray[np.int64], samples: int) -> Tensor:
    """The mean over the samples of the slopes along a direction that they share, in the place of each.

    The batch's gradient is the mean over directions of ``w u``, ``w`` this mean; ``B Tr(w u)`` in the place of every
    sample's trace makes ``sum_b Tr_b / A_b / B^2`` its variance.
    """
    directions, index = np.unique(queries, return_inverse=True)
    place = to_device(index, slopes.device)
    total = slopes.new_zeros(len(directions)).index_add_(0, place, slopes)
    return (total / samples)[place]
