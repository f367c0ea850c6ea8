"""Floating-point operations of a computation, counted by running it."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def flops(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, Tensor]:
    """Floating-point operations of matrix products, convolutions and attention in ``run(x)``, and its output."""
    # Fused attention is not counted on every device and by every version of torch; as plain products it is.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            output = run(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return float(counter.get_total_flops()), output
