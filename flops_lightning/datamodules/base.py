"""What every image data module shares: checked loader settings, statistics, and the five loaders."""

from __future__ import annotations

import os
from typing import ClassVar

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from flops_lightning.errors import SettingError

ImageDataset = Dataset[tuple[Tensor, ...]]  # an item is (image, label); the type is that of torch's TensorDataset


class ImageDataModule(LightningDataModule):
    """Loaders over three labelled sets of images that a subclass puts in place in ``setup``.

    A batch is ``(images (b, in_chans, image_size, image_size) float32, labels (b,) int64)``, and the last, smaller
    batch is kept. Each epoch's order is a function of the seed given to ``seed_everything`` (0 without one) and of the
    epoch's number alone, so a run resumed at an epoch sees what the uninterrupted run saw. Under several processes each
    loads its own share.

    Attributes:
        class_names: One name per class, in the order of the labels.
        in_chans: Channels of an image.
        image_size: Height and width of an image, in pixels.
        mean: Mean per channel, subtracted from values between 0 and 1.
        std: Standard deviation per channel, by which they are divided.
        train_set: Labelled images to learn from; a subclass sets it in ``setup``, like the next two.
        val_set: Labelled images to choose by.
        test_set: Labelled images to report on; ``predict`` reads them too.
    """

    class_names: ClassVar[tuple[str, ...]]
    in_chans: ClassVar[int]

    # A subclass fixes these in its body, or sets them from its settings.
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    train_set: ImageDataset
    val_set: ImageDataset
    test_set: ImageDataset

    def __init__(self, *, batch_size: int, num_workers: int) -> None:
        """Check the loaders' settings.

        Args:
            batch_size: Images per batch and process, at least 1.
            num_workers: Processes that load beside the training process; 0 loads inside it.

        Raises:
            SettingError: ``batch_size`` is below 1, or ``num_workers`` below 0.
        """
        super().__init__()
        if batch_size < 1:
            raise SettingError("data.batch_size", batch_size, "is below 1.", "Give the number of images per batch.")
        if num_workers < 0:
            raise SettingError("data.num_workers", num_workers, "is negative.", "Use 0 to load in the main process.")
        self.batch_size = batch_size
        self.num_workers = num_workers

    @property
    def num_classes(self) -> int:
        """Number of classes; labels run from 0 to one less."""
        return len(self.class_names)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Training batches, in a new order each epoch."""
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        # Also in one process: its order depends on seed and epoch alone, and Lightning announces the epoch to it.
        sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(
            self.train_set, num_replicas=world_size, rank=rank, seed=int(os.environ.get("PL_GLOBAL_SEED", "0"))
        )
        return self._loader(self.train_set, sampler)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Validation batches, in a fixed order."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Test batches, in a fixed order."""
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The test batches again, in the same order, so that predictions can be lined up with labels."""
        return self._loader(self.test_set)

    def _loader(
        self, dataset: ImageDataset, sampler: DistributedSampler[tuple[Tensor, ...]] | None = None
    ) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(
            dataset,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )
