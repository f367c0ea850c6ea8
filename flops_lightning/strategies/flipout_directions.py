"""The ``flipout`` noise layout: one dense direction for each query index, turned for each sample by signs of its own.

For the weight ``(o, i)`` of a linear, sample ``b`` moves along ``Z_b = (s_b r_b^T) * Z`` (elementwise) with the signs
``s_b`` on its outputs and ``r_b`` on its inputs (Flipout: Wen et al., ICLR 2018, arXiv 1803.04386; for
zeroth-order estimates GRZO, arXiv 2606.02857, which also divides by the weights' spread: ``normalize: std``). ``Z`` is
that of all samples, so a query is one more matrix product for a whole chunk, whatever its samples::

    y_b = W x_b + sigma s_b * (Z (r_b * x_b))

The entries of ``Z`` are signs too. Then those of every ``Z_b`` are uncorrelated signs, ``E[w_b Z_b | Z] = G_b`` for
``w_b = <G_b, Z_b>``, and estimates of two samples are *uncorrelated*, as FLOPS, theorem 1 (its eq. 20) assumes: an
allocator can work. With a Gaussian ``Z`` the trace of their cross-covariance would be ``2 <G_b, G_c>``, and without
signs ``(d + 1) <G_b, G_c>`` in ``d`` dimensions; a single sign a sample would cancel in ``w_b Z_b``. As all directions
of signs, they are unbiased only as sigma -> 0.

Kernels of convolutions see each sign at several positions, which would correlate them: they have a rank-one matrix of
signs a row, as in ``layout: factored``. Biases, norms and all other parameters have signs of their own a row, which are
the shared ones times those of the row in distribution.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from flops_lightning.network.compilation import CompiledNetwork
from flops_lightning.noise.keys import split_into
from flops_lightning.noise.kinds import NoiseSpec, draw_noise
from flops_lightning.queries import Chunk, CleanPass, RowPlan
from flops_lightning.strategies.factored_directions import Bases, Directions, FactoredDirections
from flops_lightning.strategies.sites import Site


@dataclass(frozen=True, eq=False)
class FlipoutDirections(FactoredDirections):
    """Lays shared directions with signs by sample over rows; ``rank`` is 1 and ``guided`` false."""

    noise: ClassVar[NoiseSpec] = NoiseSpec("rademacher")

    def chunks(self, plan: RowPlan) -> Iterator[tuple[NDArray[np.int64], Chunk]]:
        """Direction by direction, all its samples in chunks.

        A compiled network gets few shapes, which padding fills up: powers of two.
        """
        compiled = isinstance(self.network, CompiledNetwork)
        direction, size = plan.queries // self.unit, max(self.unit, self.chunk_rows // self.unit * self.unit)
        for p in np.unique(direction).tolist():
            rows = np.flatnonzero(direction == p)
            for some in np.split(rows, range(size, len(rows), size)):
                whole = min(size, self.unit * 2 ** (len(some) // self.unit - 1).bit_length()) if compiled else len(some)
                samples, queries = (
                    np.pad(part[some], (0, whole - len(some)), "edge") for part in (plan.samples, plan.queries)
                )
                yield some, Chunk(samples, queries, len(some))

    def _directions(self, site: Site, clean: CleanPass, chunk: Chunk, index: Tensor, bases: Bases) -> Directions:
        """Signs of the rows, and on linears the matrices that they share."""
        found = super()._directions(site, clean, chunk, index, bases)
        layers = [x for x in self.parts[site.name].layers if x.has_matrix and isinstance(x.module, nn.Linear)]
        shapes = {x.name: tuple(x.module.get_parameter("weight").shape) for x in layers}
        key = replace(self.key, draw=clean.draw, site=f"{site.name}/shared")
        row, like = (np.zeros(1, dtype=np.int64), chunk.queries[:1] // self.unit), next(iter(site.parameters.values()))
        size = sum(o * i for o, i in shapes.values())
        flat = draw_noise(self.noise, key, *row, (size,), device=like.device, dtype=like.dtype)[0]
        return found | {name: replace(found[name], shared=z) for name, z in split_into(flat, shapes).items()}
