"""The variance of a batch gradient as a function of the allocation, and its optimum.

With ``Tr_b`` the trace of the covariance of a single query's gradient for sample ``b`` and ``A_b`` its number of
queries, independent of each other and of the counts, the trace of the covariance of the batch gradient is
``J(A) / B^2`` (FLOPS, Ren et al., ICLR 2025, Theorem 1 and eq. 9). Antithetic pairs count as one with twice the trace.
"""

import torch
from torch import Tensor


def objective(trace: Tensor, counts: Tensor) -> Tensor:
    """``J(A) = sum_b Tr_b / A_b`` (eq. 9 for a given allocation).

    ``trace`` is ``(b,)``, nonnegative, in squared gradient units; ``counts`` ``(..., b)``, integer or not. Returns
    ``(...)`` float64. A sample of trace zero costs nothing; one without queries whose trace is positive makes J
    infinite.
    """
    trace = trace.double()
    return torch.where(trace > 0, trace / counts.double(), 0.0).sum(dim=-1)


def equal_objective(trace: Tensor, total: float) -> Tensor:
    """J of the equal allocation of ``total`` queries: ``B / total * sum_b Tr_b``, a float64 scalar."""
    return trace.double().sum() * len(trace) / total


def optimal_shares(trace: Tensor) -> Tensor:
    """``(..., b)`` float64 relative shares of the counts that minimise J: ``sqrt(Tr_b)`` (appendix A.3, Neyman).

    With unequal costs of a query, give the traces divided by the costs.
    """
    return trace.double().sqrt()


def gain_optimal(trace: Tensor) -> Tensor:
    """``J_equal / J_optimal = 1 + CV^2(sqrt(Tr))``: what the best continuous allocation gains over the equal one.

    A float64 scalar from 1 to ``b`` for ``(b,)`` nonnegative traces, 1 if all are zero. Noisy estimates of the traces
    read a gain that is too high: see :func:`estimated_gain_optimal`.
    """
    root = optimal_shares(trace)
    mean = root.mean()
    return torch.where(mean > 0, 1.0 + root.var(correction=0) / mean.square(), 1.0)


def effective_counts(counts: Tensor, pilots: Tensor, weight: Tensor) -> Tensor:
    """Queries worth as much as reused pilots and the rest together: ``1 / (w^2 / n + (1 - w)^2 / A)``.

    The estimate of a sample is ``w mean(n pilots) + (1 - w) mean(A others)``, so its variance is ``Tr`` over this. All
    are ``(..., b)``; the weight must be fixed before the pilots are seen, and has no effect where there are none.
    """
    counts, pilots = counts.double(), pilots.double()
    weight = torch.where(pilots > 0, weight.double(), 0.0)
    of_pilots = torch.where(pilots > 0, weight.square() / pilots.clamp_min(1.0), 0.0)
    of_others = torch.where(weight < 1.0, (1.0 - weight).square() / counts, 0.0)
    return 1.0 / (of_pilots + of_others)


def estimated_gain_optimal(trace: Tensor, freedom: Tensor) -> Tensor:
    """:func:`gain_optimal` from noisy traces, corrected for the noise.

    A trace estimated from queries scatters about as ``Tr chi^2_n / n`` with ``n`` degrees of freedom: a query's squared
    derivative along its noise is ``chi^2_1``. The expectation of its root is too small by a known factor, and the
    square of a sum of roots too large by their variances; both are taken off.

    ``trace`` is ``(..., b)``, NaN where there is none; ``freedom`` the queries (or antithetic pairs) less one. Returns
    ``(...)`` float64, at least 1; 1 where no trace is positive.
    """
    known = trace.isfinite() & (freedom > 0)
    n = torch.where(known, freedom, 1.0).double()
    trace = torch.where(known, trace, 0.0).double().clamp_min(0.0)
    # E sqrt(chi^2_n / n) = sqrt(2 / n) Gamma((n + 1) / 2) / Gamma(n / 2)
    root_bias = (torch.lgamma((n + 1) / 2) - torch.lgamma(n / 2)).exp() * (2.0 / n).sqrt()
    root = trace.sqrt() / root_bias
    variance = (root.square() - trace).sum(dim=-1)
    square = root.sum(dim=-1).square() - variance
    gain = known.sum(dim=-1) * trace.sum(dim=-1) / square.clamp_min(1e-300)
    return torch.where(trace.sum(dim=-1) > 0, gain, 1.0).clamp_min(1.0)
