"""Coordinates measured in a step, a random mask whose density differs from tensor to tensor, and their losses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.network.functional import FunctionalStages
from flops_lightning.network.rows import gather, joined, value_of
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.noise.keys import NoiseKey, row_seeds
from flops_lightning.queries import CleanPass, LossFunction, row_losses
from flops_lightning.strategies.zo_grasp import Values
from flops_lightning.transfers import to_device

Masks = Mapping[str, NDArray[np.int64]]
"""Ascending indices into each flattened tensor, by name, of the tensors that are in the mask."""

Scheme = Literal["forward", "central"]


def inclusion_probabilities(
    sizes: Mapping[str, int], ratios: Mapping[str, float], coordinates: int
) -> dict[str, float]:
    """Probability with which each entry of a tensor is in the mask: ``c r_l / sum_m r_m n_m``.

    Tensors have ``n`` entries and relative densities ``r`` between 0 and 1; the mask has ``c <= sum_m r_m n_m``.
    """
    total = sum(ratios[name] * size for name, size in sizes.items())
    return {name: coordinates * ratios[name] / total for name in sizes}


def draw_masks(sizes: Mapping[str, int], probabilities: Mapping[str, float], *, seed: int, draw: int) -> Masks:
    """A mask of a fixed size, a pure function of ``(seed, draw)``.

    How many coordinates a tensor gets is its expected number rounded down or up at random (systematic sampling: one
    uniform number for all tensors), so that an entry is in the mask with exactly its probability. Rounding by largest
    remainder would never measure a tensor whose expected number stays small, such as a bias. Within a tensor,
    coordinates are drawn uniformly and without replacement.
    """
    expected = np.array([probabilities[name] * size for name, size in sizes.items()])
    # Rounded, because a sum that misses a whole number by 1e-12 could ask a full tensor for one entry too many.
    edges = np.floor(np.round(expected.cumsum(), 9) + _generator(seed, draw, "").random()).astype(np.int64)
    counts = np.diff(edges, prepend=0)
    return {
        name: np.sort(_generator(seed, draw, name).choice(size, count, replace=False, shuffle=False))
        for (name, size), count in zip(sizes.items(), counts.tolist(), strict=True)
        if count
    }


def _generator(seed: int, draw: int, name: str) -> np.random.Generator:
    # Without the rank: the mean over ranks of gradients under one mask is the gradient of all samples under that mask.
    first = np.zeros(1, dtype=np.int64)
    return np.random.default_rng(row_seeds(NoiseKey(seed, draw, f"coordinates.{name}"), first, first))


class Probe(NamedTuple):
    """One entry of a flattened parameter, and how far it is moved."""

    name: str
    entry: int
    move: float


@dataclass(frozen=True, eq=False)
class CoordinateProbes:
    """Runs a network in eval mode with moved parameters, without writing to them.

    ``stage_of`` is the index of the stage that owns each parameter.
    """

    network: StagedNetwork
    loss: LossFunction
    stages: FunctionalStages
    stage_of: Mapping[str, int]
    chunk_rows: int

    def slopes(self, clean: CleanPass, masks: Masks, *, step: float, scheme: Scheme) -> dict[str, Tensor]:
        """``(n, b)`` finite differences of each sample's loss at the ``n`` masked coordinates of each tensor.

        They are not finite where a loss is not.
        """
        moves = (step, -step) if scheme == "central" else (step,)
        found: dict[str, Tensor] = {}
        for stage in range(len(self.network)):
            here = {name: index.tolist() for name, index in masks.items() if self.stage_of[name] == stage}
            if not here:
                continue
            probes = [Probe(name, i, move) for name, indices in here.items() for i in indices for move in moves]
            losses = self._probe_losses(clean, stage, probes).unflatten(0, (-1, len(moves)))
            other, width = (losses[:, 1], 2 * step) if scheme == "central" else (clean.loss, step)
            parts = ((losses[:, 0] - other) / width).split([len(indices) for indices in here.values()])
            found |= dict(zip(here, parts, strict=True))
        return found

    def _probe_losses(self, clean: CleanPass, stage: int, probes: Sequence[Probe]) -> Tensor:
        """``(n, b)`` losses of a stage's probes, which share passes above it as far as ``chunk_rows`` allows."""
        trainable = self.network.trainable()
        copies = {p.name: trainable[p.name].clone(memory_format=torch.contiguous_format) for p in probes}
        together = max(1, self.chunk_rows // clean.batch_size)
        lines = []
        for start in range(0, len(probes), together):
            pack = probes[start : start + together]
            losses = []
            for rows in torch.arange(clean.batch_size).split(self.chunk_rows):
                index, samples = to_device(rows, clean.loss.device), rows.repeat(len(pack)).numpy()
                x = clean.activations[stage].index_select(0, index)
                y = gather(clean.targets, index.repeat(len(pack)), samples)
                h = joined([self._moved_output(stage, x, copies[probe.name], probe) for probe in pack])
                output = self.network.run(h, stage + 1)
                losses.append(row_losses(self.loss, output, y).unflatten(0, (len(pack), -1)))
            lines.append(torch.cat(losses, dim=1))
        return torch.cat(lines)

    def _moved_output(self, stage: int, x: Tensor, copy: Tensor, probe: Probe) -> Tensor:
        entry = copy.view(-1)[probe.entry]
        before = entry.clone()
        entry += probe.move
        output = self.stages.run(stage, x.clone(), {probe.name: copy})  # the stage may work in place
        entry.copy_(before)
        return output

    def losses_at(self, clean: CleanPass, values: Values) -> Tensor:
        """``(b,)`` losses of the batch with every trainable parameter at ``values(name)``, held a stage at a time."""
        trainable = self.network.trainable()
        chunks = [x.clone() for x in clean.activations[0].split(self.chunk_rows)]  # the first stage may work in place
        for stage in range(len(self.network)):
            moved = {name: values(name) for name in trainable if self.stage_of[name] == stage}
            chunks = [self.stages.run(stage, x, moved) for x in chunks]
        return row_losses(self.loss, value_of(joined(chunks)), clean.targets)
