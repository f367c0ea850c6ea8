"""Batches whose random transforms are drawn by key: a function of seed, epoch and image, of nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from flops_lightning.datamodules.global_batches import ImageKey
from flops_lightning.noise.keys import NoiseKey, row_seeds

Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(images (b, ...), labels (b,)) -> (images (b, ...), targets (b, c))``."""


class KeyedBatches(Dataset[Any]):
    """Loads whole batches, with torch's generator of the CPU seeded for every image and put back afterwards.

    So a resumed run draws what the uninterrupted one did, whatever the number of workers and whatever else was drawn.
    """

    def __init__(self, images: Dataset[Any], *, seed: int, mixing: Mixing | None = None) -> None:
        """Wrap.

        Args:
            images: Items are ``(image, label)``; they may draw from torch's generator.
            seed: Shared part of all keys.
            mixing: Mixes the images of a batch; drawn by the seed, the epoch and the batch's first image.
        """
        self._images = images
        self._seed = seed
        self._mixing = mixing

    def __len__(self) -> int:
        return len(self._images)  # type: ignore[arg-type]

    def __getitem__(self, key: ImageKey | int) -> Any:
        """One image and its label, not mixed."""
        with torch.random.fork_rng(devices=[]):
            return self._drawn([key])[0]

    def __getitems__(self, keys: Sequence[ImageKey | int]) -> Any:
        """The batch ``(images (b, ...), labels (b,))``, or targets ``(b, c)`` where images are mixed."""
        with torch.random.fork_rng(devices=[]):
            batch = default_collate(self._drawn(keys))
            if self._mixing is None:
                return batch
            (seed,) = self._seeds("mixing", keys[:1])
            torch.default_generator.manual_seed(seed)
            return self._mixing(*batch)

    def _drawn(self, keys: Sequence[ImageKey | int]) -> list[Any]:
        items = []
        for key, seed in zip(keys, self._seeds("image", keys), strict=True):
            # torch.manual_seed would reseed the generators of all devices as well.
            torch.default_generator.manual_seed(seed)
            items.append(self._images[_key(key).place])
        return items

    def _seeds(self, kind: str, keys: Sequence[ImageKey | int]) -> list[int]:
        epoch = _key(keys[0]).epoch  # a batch is of one epoch
        places = np.array([_key(key).place for key in keys])
        return row_seeds(NoiseKey(self._seed, epoch, kind), places, np.zeros_like(places))


def _key(key: ImageKey | int) -> ImageKey:
    # Samplers other than ours, for example the Trainer's for overfit_batches, yield plain places.
    return key if isinstance(key, ImageKey) else ImageKey(0, key)


def batched(batch: Any) -> Any:
    """The batch that :class:`KeyedBatches` has put together already: what a loader collates with."""
    return batch
