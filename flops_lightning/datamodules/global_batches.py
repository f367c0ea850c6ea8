"""Training batches that are the same whatever the number of processes, and can be entered at any place."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any, NamedTuple, cast

import torch
from torch.utils.data import Dataset, DistributedSampler

from flops_lightning.errors import SettingError


class ImageKey(NamedTuple):
    """Asks a data set for an image as a certain epoch sees it.

    Attributes:
        epoch: The epoch, from 0; augmentation is drawn anew in each.
        place: Place of the image in the data set.
    """

    epoch: int
    place: int


def local_batch_size(batch_size: int, world_size: int) -> int:
    """Images of a global batch for each process.

    Raises:
        SettingError: ``batch_size`` is no multiple of ``world_size``.
    """
    if batch_size % world_size:
        below = batch_size // world_size * world_size
        sizes = f"{below} or {below + world_size}" if below else str(world_size)
        raise SettingError(
            "data.batch_size", batch_size, f"cannot be divided evenly between {world_size} processes.", f"Use {sizes}."
        )
    return batch_size // world_size


class GlobalBatches(DistributedSampler[ImageKey]):
    """One process's share of every global batch, image by image.

    An epoch's order is a function of ``seed`` and the epoch alone, and in one process that of torch's own
    ``DistributedSampler``. Global batch ``i`` is its images ``i * batch_size`` and following, and each process takes
    consecutive images of them, as many as every other. Of a last, smaller batch of ``m`` images some processes take one
    image more than others; if there are fewer images than processes, they are left out of this epoch. So every process
    has the same number of batches, and no image is seen twice.

    Attributes:
        batch_size: Images per global batch.
        first_batch: Batches to leave out at the beginning of the next iteration, and of that one only.
    """

    def __init__(self, dataset: Dataset[Any], *, batch_size: int, world_size: int, rank: int, seed: int) -> None:
        """Check the division.

        Args:
            dataset: What is sampled from; only its length is read.
            batch_size: Images per batch, all processes together.
            world_size: Number of processes.
            rank: Number of this process, from 0.
            seed: Chooses the order.

        Raises:
            SettingError: ``batch_size`` is no multiple of ``world_size``.
        """
        local_batch_size(batch_size, world_size)
        super().__init__(dataset, num_replicas=world_size, rank=rank, seed=seed)
        self.batch_size = batch_size
        self.first_batch = 0

    def __len__(self) -> int:
        """Images of this process in a whole epoch."""
        whole, rest = divmod(len(cast("Sized", self.dataset)), self.batch_size)
        more, uneven = divmod(rest, self.num_replicas)
        return whole * self.batch_size // self.num_replicas + (more + (self.rank < uneven) if more else 0)

    def __iter__(self) -> Iterator[ImageKey]:
        """Yield the keys of this process's images, in the order of the batches."""
        first, self.first_batch = self.first_batch, 0
        epoch = self.epoch
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(cast("Sized", self.dataset)), generator=generator)
        for batch in order.split(self.batch_size)[first:]:
            if len(batch) >= self.num_replicas:
                share = batch.tensor_split(self.num_replicas)[self.rank]
                yield from (ImageKey(epoch, place) for place in share.tolist())
