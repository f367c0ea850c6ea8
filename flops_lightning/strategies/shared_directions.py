"""The ``shared`` noise layout: one dense direction for each query index, used by every sample that has such a query.

Directions are drawn again from their keys instead of being kept, one stage at a time, so memory stays near that of
inference: one stage's parameters (two copies in antithetic pairs) beside the activations. Parameters are never written.

Estimates of samples with the same query index are dependent: the variance of the batch's gradient is *not* the
``1/B^2 sum_b Tr_b / A_b`` of FLOPS, theorem 1 (its eq. 20 assumes independence); it has in addition the covariances
between samples, ``1/B^2 sum_{b != c} min(A_b, A_c) / (A_b A_c) Cov_bc``.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flops_lightning.distributed import Communicator, gather_lines
from flops_lightning.network.rows import gather
from flops_lightning.noise.keys import split_into
from flops_lightning.noise.kinds import NoiseSpec, draw_noise
from flops_lightning.phases import phase
from flops_lightning.queries import CleanPass, RowPlan
from flops_lightning.strategies.parameter_queries import DirectionLayout, RowResponses
from flops_lightning.strategies.sites import Site
from flops_lightning.transfers import to_device


@dataclass(frozen=True, eq=False)
class SharedDirections(DirectionLayout):
    """Lays shared directions over rows.

    Attributes:
        ranks: Ranks that exchange the scalars of their directions and each draw those of all; None: this one only.
        noise: Kind of noise, dense.
    """

    ranks: Communicator | None = None
    noise: NoiseSpec = field(default=NoiseSpec(), kw_only=True)

    def run(self, site: Site, clean: CleanPass, plan: RowPlan, *, traces: bool) -> RowResponses:
        """Run direction by direction, all its samples in chunks, both signs of a pair stage by stage."""
        del traces  # the norms they take are known without a look at the directions
        values = clean.loss.new_empty(0)
        direction, sample = plan.queries // self.unit, to_device(plan.samples, clean.loss.device)
        signs = to_device([1.0, -1.0][: self.unit], clean.loss)
        number = np.unique(direction).tolist()
        contexts = self._contexts(site, clean.draw, number, site.sigma * signs)
        for p in number:
            rows = np.flatnonzero(direction == p)[:: self.unit]
            for some in np.split(rows, range(self.chunk_rows, len(rows), self.chunk_rows)):
                at = to_device(some, sample.device)
                losses = partial(self._losses, site, clean, sample[at], plan.samples[some], p, contexts.get(p))
                with phase("suffix"):
                    for offset, found in enumerate(self.response.values(losses, site.sigma, signs)):
                        if not len(values):
                            values = found.new_empty(len(plan.samples), *found.shape[1:])
                        values[at + offset] = found
        # E w^2 ||z||^2 over E w^2: signs have one length, Gaussian directions are longer where they matter.
        numbers = sum(math.prod(self.drawn_shape(p)) for p in site.parameters.values())
        return RowResponses(values, numbers + (2 if self.noise.distribution == "gaussian" else 0))

    def _contexts(self, site: Site, draw: int, directions: list[int], sigmas: Tensor) -> dict[int, Tensor]:
        """``(unit, ...)`` contexts of the site's stage at ``theta + sigma z``, by direction, all in one call."""
        if not site.per_batch or not self.response.in_place:  # a derivative must see how they come about
            return {}
        noise = [self._noise(site, draw, site.first, site.parameters, p) for p in directions]
        values = {
            name: torch.stack([(p.detach() + s * z[name]).to(p.dtype) for z in noise for s in sigmas])
            for name, p in site.parameters.items()
        }
        with phase("suffix"):
            found = self.stages.context(site.first, values).unflatten(0, (-1, len(sigmas)))
        return dict(zip(directions, found, strict=True))

    def _losses(
        self, site: Site, clean: CleanPass, index: Tensor, samples: NDArray[np.int64], direction: int,
        contexts: Tensor | None, sigmas: Tensor,
    ) -> Tensor:  # fmt: skip
        """``(unit, r)`` losses of samples at ``theta + sigma z`` for every sigma; each stage's ``z`` is drawn once.

        ``index`` ``(r,)`` are the places of the samples, ``samples`` the same on the host.
        """
        # A copy for each, since a stage may work in place; nothing else holds them while the stages above run.
        streams = [clean.activations[site.first].index_select(0, index) for _ in sigmas]
        stage = self.network.stages[site.first].context
        if contexts is not None and stage is not None:
            streams = [stage.apply(h, context) for h, context in zip(streams, contexts, strict=True)]
        for i, own in self._by_stage(site).items() if contexts is None else ():
            noise = self._noise(site, clean.draw, i, own, direction) if own else {}
            for k, sigma in enumerate(sigmas):
                values = {name: (p.detach() + sigma * noise[name]).to(p.dtype) for name, p in own.items()}
                streams[k] = self.stages.run(i, streams[k], values)
        targets = gather(clean.targets, index, samples)
        return torch.stack([self.read(h, site.last + 1, targets) for h in streams])

    def _by_stage(self, site: Site) -> dict[int, dict[str, nn.Parameter]]:
        stages = range(site.first, site.last + 1)
        return {i: {n: p for n, p in site.parameters.items() if self.network.stages[i].owns(n)} for i in stages}

    def drawn_shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Shape of the random numbers from which a parameter's direction is made: its own."""
        return tuple(parameter.shape)

    def direction(self, drawn: Mapping[str, Tensor], own: Mapping[str, nn.Parameter], draw: int) -> dict[str, Tensor]:
        """The directions made of these numbers, a linear function of them: the numbers themselves."""
        del own, draw
        return dict(drawn)

    def _noise(
        self, site: Site, draw: int, stage: int, own: Mapping[str, nn.Parameter], direction: int
    ) -> dict[str, Tensor]:
        """The ``z`` of a stage's parameters in one direction."""
        with phase("noise"):
            flat = self._drawn(site, draw, stage, own, direction, self.key.rank)
            return self.direction(split_into(flat, self._shapes(own)), own, draw)

    def _drawn(
        self, site: Site, draw: int, stage: int, own: Mapping[str, nn.Parameter], direction: int, rank: int
    ) -> Tensor:
        key = replace(self.key, draw=draw, site=f"{site.name}/{self.network.stages[stage].name}", rank=rank)
        row, like = (np.zeros(1, dtype=np.int64), np.array([direction])), next(iter(own.values()))
        size = sum(map(math.prod, self._shapes(own).values()))  # at once: seeding costs as much as a few numbers do
        return draw_noise(self.noise, key, *row, (size,), device=like.device, dtype=like.dtype)[0]

    def _shapes(self, own: Mapping[str, nn.Parameter]) -> dict[str, tuple[int, ...]]:
        return {name: self.drawn_shape(p) for name, p in own.items()}

    def gradient(
        self, site: Site, clean: CleanPass, plan: RowPlan, coefficients: Tensor, kept: Any
    ) -> dict[str, Tensor]:
        """``sum_p s_p z_p``, ``s_p`` the signed sum of the coefficients of all rows with direction p.

        Where ranks exchange scalars, the sum goes over the directions of all of them, weighted by their samples; it has
        the same bits on every rank.
        """
        del kept
        directions, place = np.unique(plan.queries // self.unit, return_inverse=True)
        signs = self.signs(plan.queries, coefficients)
        index = to_device(place, coefficients.device)
        by_direction = coefficients.new_zeros(len(directions)).index_add_(0, index, coefficients * signs)
        terms = [(self.key.rank, int(p), scalar) for p, scalar in zip(directions, by_direction, strict=True)]
        if self.ranks is not None and self.ranks.size > 1:
            terms = _of_all(self.ranks, directions, by_direction, clean.batch_size)
        gradients: dict[str, Tensor] = {}
        for i, own in self._by_stage(site).items():
            if own:
                total: Tensor | None = None
                for rank, p, scalar in terms:
                    with phase("noise"):
                        z = self._drawn(site, clean.draw, i, own, p, rank)
                    total = z.mul_(scalar) if total is None else total.addcmul_(z, scalar.to(z.dtype))
                if total is not None:
                    gradients |= self.direction(split_into(total, self._shapes(own)), own, clean.draw)
        return gradients


def _of_all(
    ranks: Communicator, directions: NDArray[np.int64], scalars: Tensor, samples: int
) -> list[tuple[int, int, Tensor]]:
    """``(rank, direction, scalar)`` of all ranks, for the mean over the samples of all; ours ``(p,)``."""
    places = to_device(directions, scalars.device, torch.float64)
    own = torch.stack([places, scalars.double(), torch.full_like(places, samples)], dim=1)
    lines = gather_lines(ranks, own)
    total = sum(float(rank[0, 2]) for rank in lines)
    weighted = [(rank[:, 0].tolist(), (rank[:, 1] * rank[:, 2] / total).to(scalars.dtype)) for rank in lines]
    return [(r, int(p), scalar) for r, (ps, s) in enumerate(weighted) for p, scalar in zip(ps, s, strict=True)]
