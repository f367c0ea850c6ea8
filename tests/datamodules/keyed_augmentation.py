"""What augmentation may depend on: the seed, the epoch and the image."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import seed_everything

from flops_lightning.datamodules.base import ImageDataModule


def assert_repeated_by_the_seed(prepared: Callable[[int], ImageDataModule], *, num_workers: int) -> None:
    """A seed gives the same images with and without workers, and others in each epoch; so does another seed.

    Args:
        prepared: From a number of workers to a module that augments its training images.
        num_workers: Those that are compared with none.
    """

    def two_epochs(seed: int, num_workers: int = 0) -> list[torch.Tensor]:
        seed_everything(seed)
        loader, epochs = prepared(num_workers).train_dataloader(), []
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            places = [key.place for key in loader.sampler]
            images = torch.cat([images for images, _ in loader])
            epochs.append(torch.stack([images[places.index(place)] for place in range(len(places))]))
        return epochs

    first, again, workers, other = two_epochs(3), two_epochs(3), two_epochs(3, num_workers), two_epochs(4)
    for epoch in (0, 1):
        assert torch.equal(first[epoch], again[epoch])
        assert torch.equal(first[epoch], workers[epoch])
    same = [(a == b).flatten(1).all(1).float().mean() for a, b in ((first[0], first[1]), (first[0], other[0]))]
    assert max(same) < 0.1
