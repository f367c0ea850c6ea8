"""Muon's orthogonalisation on singular values, as slowly and obviously as possible."""

import torch
from torch import Tensor


def orthogonalised(matrix: Tensor, steps: int) -> Tensor:
    """``U f(f(...f(S / |S|))) V^T`` with ``f(s) = 3.4445 s - 4.775 s^3 + 2.0315 s^5``, in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ s.diag() @ vh
