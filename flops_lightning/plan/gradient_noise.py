"""The batch size at which a step costs twice the least number of samples, from gradients at the same weights.

With ``g`` the gradient of the mean loss of all samples, a batch of ``B`` has ``E|G_hat|^2 = |g|^2 + N / B`` for
independent samples, where ``N = V + T / A`` is the noise of samples and queries (``allocators/budget.py``). The
products of different batches' gradients have the expectation ``|g|^2``. Then ``B* = N / |g|^2``, the simple noise scale
of McCandlish et al. (2018, arXiv 1812.06162, appendix A.1) with the noise of the queries added.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

STEPS = 32
"""Gradients that are read, at most."""
ENTRIES = 2**20
"""Entries of the gradient that are read, about: every n-th of each parameter."""


class GradientNoise:
    """Sums over the gradients of batches of one size.

    Example:
        >>> noise = GradientNoise()
        >>> for gradient in ([1.0, 0.5], [1.0, -0.5], [1.0, 0.5], [1.0, -0.5]):
        ...     noise.add([torch.tensor(gradient)], samples=8)
        >>> noise.batch_size  # |g|^2 = (|sum|^2 - sum of |.|^2) / 12 = 11 / 12, E|G_hat|^2 = 1.25
        2.90...
    """

    def __init__(self) -> None:
        self.steps, self._samples, self._squares, self._sum = 0, 0, 0.0, torch.zeros(0)

    def add(self, gradients: Iterable[Tensor], samples: int) -> None:
        """Read the gradient of a batch, if it is whole: as many samples and entries as the first one has."""
        if self.steps == STEPS:
            return
        parts = [gradient.detach().flatten() for gradient in gradients]
        stride = max(1, sum(part.numel() for part in parts) // ENTRIES)
        some = torch.cat([part[::stride] for part in parts]).double().cpu() if parts else torch.zeros(0)
        whole = not self.steps or (samples, len(some)) == (self._samples, len(self._sum))
        if not len(some) or not whole:
            return
        self._samples, self.steps = samples, self.steps + 1
        self._squares += float(some.square().sum())
        self._sum = some if self.steps == 1 else self._sum + some

    @property
    def batch_size(self) -> float | None:
        """``B*`` in samples; None where the gradients do not tell (fewer than four, or products that cancel)."""
        pairs = self.steps * (self.steps - 1)
        signal = (float(self._sum.square().sum()) - self._squares) / pairs if pairs else 0.0
        noise = self._squares / max(1, self.steps) - signal
        return self._samples * noise / signal if self.steps >= 4 and signal > 0 and noise > 0 else None
