"""Image features that no prompt moves, computed once a run instead of at every step."""

from collections.abc import Callable, Sized
from typing import Any, cast

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from flops_lightning.datamodules import ImageDataModule
from flops_lightning.datamodules.loading import WHOLE, KeyedBatches


def keep_features(data: ImageDataModule, encode: Callable[[Tensor], Tensor]) -> None:
    """Replace the images that a data module trains and validates with by ``encode``'s features ``(b, e)`` of them.

    Augmented images stay, which the log says: they are others in every epoch.
    """
    if data.rand_augment or data.mixup_alpha or data.cutmix_alpha or getattr(data, "augment", False):
        rank_zero_info("training images are augmented, so their features are computed at every step")
        return
    for part in ("train_set", "val_set"):
        images: Any = getattr(data, part)
        if len(images):
            loader = DataLoader(images, batch_size=data.batch_size or WHOLE, num_workers=data.num_workers)
            features, labels = zip(*((encode(batch), of_batch) for batch, of_batch in loader), strict=True)
            setattr(data, part, TensorDataset(torch.cat(features), torch.cat(labels)))


def some_images(images: Dataset[Any], most: int) -> Tensor:
    """``(n, c, h, w)`` images of a data set, evenly spaced, the same whatever was drawn before."""
    size = len(cast("Sized", images))
    places = torch.linspace(0, size - 1, min(most, size)).round().long().tolist()
    return torch.stack([KeyedBatches(images, seed=0)[i][0] for i in places])
