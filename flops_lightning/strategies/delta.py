"""Weights of the noise and sums over queries: the likelihood-ratio estimator of FLOPS (Ren et al., ICLR 2025), eq. 1.

At a site with activation ``h_b``, noise ``z ~ N(0, I)`` and noise width ``sigma``, for sample ``b`` with ``A_b``
queries::

    delta_b = 1 / A_b  sum_q (L_b(h_b + sigma z_q) - c_bq) z_q / sigma

where ``c_bq`` is 0 (``plain``), the clean loss (``baseline``), or the mean of the sample's other queries
(``leave_one_out``). ``antithetic`` takes ``z_{2p+1} = -z_{2p}``, which turns the sum into
``1 / n_b  sum_p [L_b(h_b + sigma z_p) - L_b(h_b - sigma z_p)] z_p / (2 sigma)`` with ``n_b = A_b / 2``.
The weights, loss minus baseline over sigma, realise the paper's likelihood-ratio estimator (eq. 1) for ``z ~ N(0, I)``,
and in pairs its two-sided form (eq. 3, printed for ``z ~ N(0, sigma^2)``, where its factor is off by sigma).

Every sample enters the batch's gradient with ``1 / (B A_b)``: neither the expanded rows nor the tokens are averaged.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from flops_lightning.queries import Chunk
from flops_lightning.strategies.widths import by_token

Variant = Literal["plain", "baseline", "leave_one_out", "antithetic"]


def query_weights(
    losses: Tensor, clean: Tensor, real: Tensor, *, sigma: float | Tensor, variant: Variant
) -> tuple[Tensor, Tensor]:
    """Weights of the rows' noise, and which rows count.

    ``losses``, ``clean`` (the clean loss of each row's sample) and ``real`` (False on padding) are ``(r,)``.
    ``leave_one_out`` gets the weights of ``baseline`` here; :meth:`DeltaSums.delta` centres them.

    Returns:
        ``(r,)`` weights ``(L - c) / sigma``, zero on rows that do not count, and the ``(r,)`` mask of rows that do:
        real, with finite losses, and with a finite antithetic partner.
    """
    control = torch.zeros_like(clean) if variant == "plain" else clean
    weights = (losses - control) / sigma
    alive = torch.isfinite(weights) & torch.isfinite(clean) & real
    if variant == "antithetic":
        alive = alive.view(-1, 2).all(dim=1).repeat_interleave(2)
    return torch.where(alive, weights, 0.0), alive


def spread(lines: Tensor, chunk: Chunk, values: Tensor) -> Tensor:
    """``(n, r)`` matrix with each row's value in the line of its sample, ``n`` the samples that the chunk touches.

    Multiplied with ``(r, ...)`` it sums rows by sample, in one product and in a fixed order. ``lines`` ``(r,)``: places
    of the rows' samples among these.
    """
    matrix = values.new_zeros(chunk.span.stop - chunk.span.start, values.shape[0])
    matrix[lines, torch.arange(values.shape[0], device=values.device)] = values
    return matrix


@dataclass(eq=False)
class DeltaSums:
    """Sums over the queries of each sample, from which ``delta`` and the trace follow; nothing is kept per query.

    Attributes:
        weighted: ``(b, ...)`` ``sum_q w_q z_q``.
        survivors: ``(b,)`` number of queries that count.
        squares: ``(b,)`` sum over units (queries, or antithetic pairs) of the squared norm of the unit's gradient.
        noise: ``(b, ...)`` ``sum_q z_q`` (``leave_one_out`` only).
        weights: ``(b,)`` ``sum_q w_q`` (``leave_one_out`` only).
        token_squares: ``(b, t)`` as ``squares``, of the unit's ``delta`` at each token, where they are asked for.
        slopes: ``(b,)`` ``sum_q (L_q - L_clean) (||z_q||^2 - d)``, where they are asked for: the likelihood-ratio
            derivative of the sample's smoothed loss in log sigma, times its queries.
    """

    weighted: Tensor
    survivors: Tensor
    squares: Tensor
    noise: Tensor | None = None
    weights: Tensor | None = None
    token_squares: Tensor | None = None
    slopes: Tensor | None = None

    @classmethod
    def empty(
        cls, batch_size: int, like: Tensor, *, variant: Variant, tokens: bool = False, slopes: bool = False
    ) -> "DeltaSums":
        """Zeros for rows of noise shaped like those of ``like`` ``(r, ...)``."""
        sums = cls(like.new_zeros(batch_size, *like.shape[1:]), like.new_zeros(batch_size), like.new_zeros(batch_size))
        if variant == "leave_one_out":
            sums.noise, sums.weights = torch.zeros_like(sums.weighted), torch.zeros_like(sums.survivors)
        number = by_token(like[:1]).shape[1]
        if tokens and number > 1:
            sums.token_squares = like.new_zeros(batch_size, number)
        if slopes:
            sums.slopes = torch.zeros_like(sums.survivors)
        return sums

    def add(
        self, chunk: Chunk, lines: Tensor, z: Tensor, weights: Tensor, alive: Tensor, sq_norms: Tensor | None,
        unit: int, slopes: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Add one chunk.

        ``z`` is ``(r, ...)``, all else ``(r,)``: ``lines`` of :func:`spread`, ``weights`` and ``slopes`` zero on rows
        that do not count, and ``sq_norms`` of the gradient that each row's ``z`` stands for, if traces are wanted.
        ``unit`` rows are independent only together.
        """
        weights, alive = weights.to(z.dtype), alive.to(z.dtype)
        by_sample = spread(lines, chunk, weights)
        self.weighted[chunk.span].flatten(1).addmm_(by_sample, z.flatten(1))
        by_life = spread(lines, chunk, alive)
        self.survivors[chunk.span] += by_life.sum(1)
        if sq_norms is not None or self.token_squares is not None:
            # Rows of a unit have the same norms, so each brings its share of the unit's square.
            per_row = signed(weights, unit).mean(1).square().repeat_interleave(unit) / unit
            if sq_norms is not None:
                self.squares[chunk.span] += spread(lines, chunk, per_row * sq_norms).sum(1)
            if self.token_squares is not None:
                self.token_squares[chunk.span].addmm_(spread(lines, chunk, per_row), by_token(z).square().sum(2))
        if self.slopes is not None and slopes is not None:
            self.slopes[chunk.span] += spread(lines, chunk, slopes.to(z.dtype)).sum(1)
        if self.noise is not None and self.weights is not None:
            self.noise[chunk.span].flatten(1).addmm_(by_life, z.flatten(1))
            self.weights[chunk.span] += by_sample.sum(1)

    @property
    def found(self) -> Tensor:
        """``(b,)`` whether a sample has an estimate: a query that counts (leave-one-out: two)."""
        return self.survivors > (0 if self.noise is None else 1)

    def delta(self) -> Tensor:
        """``(b, ...)`` mean over the surviving queries; zero for a sample without one (leave-one-out: two)."""
        n = column(self.survivors, self.weighted)
        if self.noise is None or self.weights is None:
            return self.weighted / n.clamp(min=1)
        # sum_q (w_q - mean of the others) z_q / n  =  sum_q (w_q - mean of all) z_q / (n - 1)
        centred = self.weighted - column(self.weights, self.weighted) / n.clamp(min=1) * self.noise
        return torch.where(n > 1, centred / (n - 1).clamp(min=1), 0.0)

    def trace(self, sum_sq_norm: Tensor, unit: int) -> Tensor:
        """``(b,)`` unbiased trace of the covariance of one query's gradient.

        ``unit * (sum_u ||g_u||^2 - ||sum_u g_u||^2 / n) / (n - 1)`` over ``n`` independent units with mean gradient
        ``g_u``. A single unit has no scatter, and gives ``unit ||g||^2 (d + 1) / (d + 2)``: for a loss that is linear
        within sigma, the mean square of ``w z`` is ``d + 2`` times ``||E w z||^2`` for Gaussian ``z`` in ``d``
        dimensions.

        NaN for samples without a unit (leave-one-out: with one). ``sum_sq_norm`` ``(b,)`` is that of the gradient that
        ``weighted`` stands for.
        """
        n, d = self.survivors / unit, self.weighted[0].numel()
        scatter = self.squares - sum_sq_norm / unit**2 / n.clamp(min=1)
        single = torch.where(self.found, unit * self.squares * (d + 1) / (d + 2), torch.nan)
        return torch.where(n > 1, unit * scatter / (n - 1).clamp(min=1), single)

    def token_mean_squares(self, unit: int) -> Tensor:
        """``(b, t)`` unbiased ``||E delta_t||^2``: the mean product of the ``delta`` of two different units.

        ``(||sum_u g_ut||^2 - sum_u ||g_ut||^2) / (n (n - 1))`` over ``n`` independent units; it may be negative.

        NaN for samples with fewer than two units.
        """
        if self.token_squares is None:
            raise TypeError("the squares of each token were not asked for.")
        n = (self.survivors / unit)[:, None]
        products = by_token(self.weighted).square().sum(2) / unit**2 - self.token_squares
        return torch.where(n > 1, products / (n * (n - 1)).clamp(min=1), torch.nan)

    def slope(self) -> Tensor:
        """Derivative of the batch's mean smoothed loss in log sigma; a sample without queries counts as flat."""
        if self.slopes is None:
            raise TypeError("derivatives in log sigma were not asked for.")
        return (self.slopes / self.survivors.clamp(min=1)).mean()


def signed(weights: Tensor, unit: int) -> Tensor:
    """``(u, unit)`` weights of the rows of each unit, those of the minus rows of antithetic pairs negated."""
    rows = weights.view(-1, unit)
    return torch.stack((rows[:, 0], -rows[:, 1]), dim=1) if unit > 1 else rows


def column(vector: Tensor, like: Tensor) -> Tensor:
    """``(r, 1, ...)``: one number for each line of ``like`` ``(r, ...)``."""
    return vector.view(-1, *(1,) * (like.dim() - 1))
