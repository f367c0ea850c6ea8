"""Random traces and estimates of them, in float64, by seed."""

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def traces(*shape: int, seed: int = 0) -> Tensor:
    return normal(*shape, seed=seed).exp()


def chi_square(freedom: Tensor, seed: int = 0) -> Tensor:
    """Independent chi^2 variables with the given whole numbers of degrees of freedom."""
    squares = normal(*freedom.shape, int(freedom.max()), seed=seed).square()
    return torch.where(torch.arange(squares.shape[-1]) < freedom[..., None], squares, 0.0).sum(dim=-1)


def estimates(trace: Tensor, freedom: Tensor | int, seed: int = 0) -> Tensor:
    """Unbiased estimates of traces with so many degrees of freedom each: ``Tr chi^2_n / n``."""
    freedom = torch.as_tensor(freedom).expand_as(trace)
    return trace * chi_square(freedom, seed) / freedom
