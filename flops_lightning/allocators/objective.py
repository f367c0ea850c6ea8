"""The variance of a batch gradient as a function of the allocation, and its optimum.

With ``Tr_b`` the trace of the covariance of a single query's gradient for sample ``b`` and ``A_b`` its number of
independent queries, the trace of the covariance of the batch gradient is ``J(A) / B^2`` (FLOPS, Ren et al., ICLR 2025,
Theorem 1 and eq. 9). This needs queries that are independent of each other and of the counts; where they come in
antithetic pairs the unit is the pair, and ``Tr_b`` twice the trace of its covariance.
"""

from __future__ import annotations

import torch
from torch import Tensor


def objective(trace: Tensor, counts: Tensor) -> Tensor:
    """``J(A) = sum_b Tr_b / A_b`` (eq. 9 for a given allocation).

    Args:
        trace: ``(b,)`` nonnegative traces, in squared gradient units.
        counts: ``(..., b)`` queries of each sample, integer or not. A sample of trace zero costs nothing; a sample
            without queries whose trace is positive makes J infinite.

    Returns:
        ``(...)`` float64 J, in squared gradient units.
    """
    trace = trace.double()
    return torch.where(trace > 0, trace / counts.double(), 0.0).sum(dim=-1)


def equal_objective(trace: Tensor, total: float) -> Tensor:
    """J of the equal allocation of ``total`` queries: ``B / total * sum_b Tr_b``, a float64 scalar."""
    return trace.double().sum() * len(trace) / total


def optimal_shares(trace: Tensor) -> Tensor:
    """Shares that minimise J: ``sqrt(Tr_b) / sum sqrt(Tr)`` (appendix A.3; Neyman allocation).

    Args:
        trace: ``(b,)`` nonnegative traces. If all are zero every allocation is optimal and the equal one is returned.

    Returns:
        ``(b,)`` float64 shares that sum to one.
    """
    root = trace.double().sqrt()
    total = root.sum()
    return torch.where(total > 0, root / total, 1.0 / len(root))


def gain_optimal(trace: Tensor) -> Tensor:
    """``J_equal / J_optimal = 1 + CV^2(sqrt(Tr))``: what the best continuous allocation gains over the equal one.

    Args:
        trace: ``(b,)`` nonnegative traces. If all are zero there is nothing to gain, and the gain is 1. Noisy estimates
            of the traces read a gain that is too high.

    Returns:
        float64 scalar, at least 1 and at most ``b``.
    """
    root = trace.double().sqrt()
    mean = root.mean()
    return torch.where(mean > 0, 1.0 + root.var(correction=0) / mean.square(), 1.0)
