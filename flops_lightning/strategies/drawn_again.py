"""Noise at the output of a block or group that is never stored: kernels draw it where it is used, twice.

The first kernel moves the rows that enter the suffix, the second adds the noise, weighted by the losses, to the sums of
the samples (:mod:`flops_lightning.noise.philox_triton`). Memory holds the rows and the sums alone.
"""

from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from flops_lightning.noise.generators import generator_on, kernels_on
from flops_lightning.noise.keys import NoiseKey, row_keys
from flops_lightning.noise.kinds import NoiseSpec, tokens_and_features
from flops_lightning.queries import Chunk
from flops_lightning.strategies.delta import DeltaSums, signed, spread
from flops_lightning.strategies.widths import SiteWidth, by_token
from flops_lightning.transfers import to_device


@dataclass(frozen=True, eq=False)
class DrawnAgain:
    """Noise of the rows of a chunk by their keys.

    Attributes:
        kernels: What draws it.
        keys: ``(u,)`` one for each unit of ``unit`` rows, 2 in antithetic pairs.
        bounds: ``(n + 1,)`` where the keys of each sample that the chunk touches begin.
        shape: Shape of a row's noise.
        sigma: Its width.
        relative: ``(t,)`` relative widths of the tokens; None: all are 1.
        signs: Whether it is +1 and -1.
    """

    kernels: ModuleType
    keys: Tensor
    bounds: Tensor
    shape: tuple[int, ...]
    unit: int
    sigma: float
    relative: Tensor | None
    signs: bool

    @property
    def like(self) -> Tensor:
        """``(1, *shape)`` in the memory of one number: dtype, device and shape of the noise."""
        return torch.zeros((), device=self.keys.device).expand(1, *self.shape)

    def added_to(self, h: Tensor, index: Tensor, tokens: slice | None) -> Tensor:
        """``(r, ...)`` rows of the samples ``index`` of ``h``, moved at ``tokens``."""
        moved: Tensor = self.kernels.draw_and_add(
            h, index, self.keys, sigma=self.sigma, tokens=tokens, relative=self.relative, unit=self.unit,
            signs=self.signs,
        )  # fmt: skip
        return moved

    def add_to(
        self, sums: DeltaSums, chunk: Chunk, lines: Tensor, weights: Tensor, alive: Tensor, changes: Tensor | None, *,
        traces: bool,
    ) -> None:  # fmt: skip
        """Add one chunk, as :meth:`DeltaSums.add` does; norms are those in activation space.

        All are ``(r,)``: ``lines`` of :func:`spread`, and ``changes`` ``L - L_clean`` where slopes are asked for.
        """
        span, size = chunk.span, self.like[0].numel()
        weights, alive = weights.float(), alive.float()
        by_unit, wanted = signed(weights, self.unit), traces or sums.token_squares is not None
        of_unit = by_unit.mean(1).square() if wanted else None
        squares = self._accumulate(sums.weighted[span], by_unit.sum(1), of_unit)
        sums.survivors[span] += spread(lines, chunk, alive).sum(1)
        if squares is not None and traces:
            sums.squares[span] += squares.flatten(1).sum(1)
        if squares is not None and sums.token_squares is not None:
            sums.token_squares[span] += by_token(squares).sum(2)
        if sums.slopes is not None and changes is not None:
            of_noise = self._accumulate(None, None, changes.float().view(-1, self.unit).sum(1), scaled=False)
            if of_noise is not None:
                own = spread(lines, chunk, changes.float()).sum(1)
                sums.slopes[span] += of_noise.flatten(1).sum(1) - size * own
        if sums.noise is not None and sums.weights is not None:
            self._accumulate(sums.noise[span], signed(alive, self.unit).sum(1), None)
            sums.weights[span] += spread(lines, chunk, weights).sum(1)

    def _accumulate(
        self, total: Tensor | None, weights: Tensor | None, squares: Tensor | None, *, scaled: bool = True
    ) -> Tensor | None:
        summed: Tensor | None = self.kernels.draw_and_accumulate(
            self.keys, self.bounds, self.shape, total=total, weights=weights, square_weights=squares,
            relative=self.relative if scaled else None, signs=self.signs,
        )  # fmt: skip
        return summed


def drawn_again(
    key: NoiseKey, chunk: Chunk, spec: NoiseSpec, h: Tensor, tokens: slice | None, width: SiteWidth, *, unit: int
) -> DrawnAgain | None:
    """Noise for rows of ``h`` ``(b, ...)`` at ``tokens`` that needs no memory; None where it has to be stored.

    Kernels draw dense noise for activations in float32 or half precision, laid out sample by sample.
    """
    kernels = kernels_on(h.device)
    if kernels is None or generator_on(h.device, key.generator) == "torch" or spec.orthogonal:
        return None
    shape = tuple(h.shape[1:])
    if tokens is not None:
        first, last, step = tokens.indices(shape[0])
        if step != 1:
            return None
        shape = (last - first, *shape[1:])
    factored = spec.layout == "factored" and min(tokens_and_features(shape)) > 1
    suits = h.dtype in (torch.float32, torch.bfloat16, torch.float16) and h[:1].is_contiguous()
    if factored or not suits or isinstance(width.sigma, Tensor):
        return None
    samples = chunk.samples[::unit]
    bounds = np.searchsorted(samples, np.arange(chunk.span.start, chunk.span.stop + 1))
    keys = row_keys(key, samples, chunk.queries[::unit] // unit)
    packed = to_device(np.concatenate((keys, bounds)), h.device)
    relative = None if width.relative is None else width.relative.to(h.device, torch.float32)
    signs = spec.distribution == "rademacher"
    return DrawnAgain(kernels, packed[: len(keys)], packed[len(keys) :], shape, unit, width.sigma, relative, signs)
