"""The ``subspace`` noise layout: shared directions ``P U`` in a subspace of each matrix that is kept for many steps.

For a matrix ``(m, n)`` with more rows than ``rank`` (a convolution's kernel is flattened), ``P`` ``(m, rank)`` has
orthonormal columns and ``U`` ``(rank, n)`` is standard normal, drawn anew for each direction; all other parameters have
dense noise, as in ``layout: shared``. ``P`` is drawn from its key every ``refresh`` batches and is that of all ranks
and samples. With one-sided queries and ``optimizer: {name: muon}`` this is ZO-Muon (arXiv 2602.17155).

The estimate is unbiased for the *projected* gradient ``P P^T g``, in as many dimensions as ``U`` has entries: its
variance is ``rank / m`` of a dense direction's. It is biased for ``g``: what is not in the span of ``P`` is missing
until the next refresh, and the mean over ``P`` is ``rank / m g``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from flops_lightning.noise.keys import NoiseKey, normal_rows
from flops_lightning.queries import full_precision
from flops_lightning.strategies.shared_directions import SharedDirections

Bases = dict[str, tuple[tuple[int, int, torch.device], Tensor]]
"""By parameter name: what a basis was drawn for (seed, number of the refresh, device), and the basis ``(m, rank)``."""


@dataclass(frozen=True, eq=False)
class SubspaceDirections(SharedDirections):
    """Lays shared directions in subspaces over rows.

    Attributes:
        rank: Dimensions of the columns' subspaces.
        refresh: Batches for which a subspace is kept.
        bases: Those of the present period, the strategy's: ``rank`` entries for each row of a matrix.
    """

    rank: int = 1
    refresh: int = 1
    bases: Bases = field(default_factory=dict)

    def drawn_shape(self, parameter: Tensor) -> tuple[int, ...]:
        """``(rank, n)`` of a matrix."""
        shape = super().drawn_shape(parameter)
        return (self.rank, parameter[0].numel()) if len(shape) > 1 and shape[0] > self.rank else shape

    def direction(self, drawn: Mapping[str, Tensor], own: Mapping[str, nn.Parameter], draw: int) -> dict[str, Tensor]:
        """``P U`` where ``U`` is smaller than the parameter."""
        return {
            name: z if z.shape == own[name].shape else self._product(name, own[name], z, draw)
            for name, z in drawn.items()
        }

    def _product(self, name: str, parameter: Tensor, u: Tensor, draw: int) -> Tensor:
        at = (self.key.seed, draw // self.refresh, parameter.device)
        known, basis = self.bases.get(name, (None, u))
        if known != at:
            basis = orthonormal(
                NoiseKey(self.key.seed, at[1], f"{name}/basis", generator=self.key.generator), parameter, self.rank
            )
            self.bases[name] = at, basis
        with full_precision(u):
            return (basis @ u).view(parameter.shape)


def orthonormal(key: NoiseKey, parameter: Tensor, rank: int) -> Tensor:
    """``(m, rank)`` orthonormal columns of uniform distribution: Q of normal noise, the diagonal of R positive."""
    first, shape = np.zeros(1, dtype=np.int64), (len(parameter), rank)
    (normal,) = normal_rows(key, first, first, shape, device=parameter.device, dtype=parameter.dtype)
    with full_precision(normal):
        q, r = torch.linalg.qr(normal)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
