"""What every image data module shares: checked loader settings, statistics, and the five loaders."""

from __future__ import annotations

import os
import warnings
from typing import ClassVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from flops_lightning.datamodules.augmentation import RandAugmentSettings, check_alpha, mixing
from flops_lightning.datamodules.global_batches import GlobalBatches, local_batch_size
from flops_lightning.datamodules.keyed_batches import KeyedBatches, batched
from flops_lightning.datamodules.training_loader import TrainingLoader
from flops_lightning.errors import SettingError

ImageDataset = Dataset[tuple[Tensor, ...]]  # an item is (image, label); the type is that of torch's TensorDataset


class ImageDataModule(LightningDataModule):
    """Loaders over three labelled sets of images that a subclass puts in place in ``setup``.

    A batch is ``(images (b, in_chans, image_size, image_size) float32, labels (b,) int64)``, and the last, smaller
    batch is kept. Where ``mixup_alpha`` or ``cutmix_alpha`` is on, the labels of training batches are probabilities
    ``(b, num_classes)`` float32.

    Training batch ``i`` of an epoch is a function of the seed given to ``seed_everything`` (0 without one), the epoch
    and ``i`` alone, augmentation included, so a run resumed at any step sees what the uninterrupted run saw, whatever
    its number of workers. Under several processes each takes its share of every batch (:class:`GlobalBatches`); the
    batch has the same images as in one process. Only the mixing of images differs then, each process mixing its share.

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

    in_chans: ClassVar[int]

    # A subclass fixes these in its body, or sets them from its settings.
    class_names: tuple[str, ...]
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    train_set: ImageDataset
    val_set: ImageDataset
    test_set: ImageDataset

    def __init__(
        self,
        *,
        batch_size: int,
        num_workers: int,
        rand_augment: RandAugmentSettings | None = None,
        mixup_alpha: float = 0.0,
        cutmix_alpha: float = 0.0,
    ) -> None:
        """Check the settings that all data modules share.

        Args:
            batch_size: Images per batch, all processes together, at least 1.
            num_workers: Processes that load beside each training process; 0 loads inside it.
            rand_augment: RandAugment of training images; None for none. A subclass whose images are in 8 bits offers
                it.
            mixup_alpha: MixUp of training batches, with shares from ``Beta(alpha, alpha)``; 0 for none.
            cutmix_alpha: The same for CutMix. Where both are on, each batch draws one of the two.

        Raises:
            SettingError: a number is outside its range.
        """
        super().__init__()
        if batch_size < 1:
            raise SettingError("data.batch_size", batch_size, "is below 1.", "Give the number of images per batch.")
        if num_workers < 0:
            raise SettingError("data.num_workers", num_workers, "is negative.", "Use 0 to load in the main process.")
        if rand_augment is not None:
            rand_augment.check()
        check_alpha("data.mixup_alpha", mixup_alpha)
        check_alpha("data.cutmix_alpha", cutmix_alpha)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.rand_augment = rand_augment
        self.mixup_alpha = mixup_alpha
        self.cutmix_alpha = cutmix_alpha

    @property
    def num_classes(self) -> int:
        """Number of classes; labels run from 0 to one less."""
        return len(self.class_names)

    def train_dataloader(self) -> TrainingLoader:
        """Training batches, in a new order each epoch.

        Raises:
            SettingError: ``batch_size`` is no multiple of the number of processes.
        """
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        batches = KeyedBatches(
            self.train_set, seed=seed, mixing=mixing(self.mixup_alpha, self.cutmix_alpha, self.num_classes)
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 calls it
            loader = TrainingLoader(
                batches,
                batch_size=local_batch_size(self.batch_size, world_size),
                sampler=GlobalBatches(batches, batch_size=self.batch_size, world_size=world_size, rank=rank, seed=seed),
                num_workers=self.num_workers,
                persistent_workers=self.num_workers > 0,
                collate_fn=batched,
                pin_memory=torch.cuda.is_available(),
            )
        loader.batches_done = lambda: self._batches_done(loader)
        return loader

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Validation batches, in a fixed order."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Test batches, in a fixed order."""
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """The test batches again, in the same order, so that predictions can be lined up with labels."""
        return self._loader(self.test_set)

    def _batches_done(self, loader: TrainingLoader) -> int:
        """Batches of this epoch that an interrupted run had done, if the Trainer that resumes it reads this loader."""
        trainer = self.trainer
        if trainer is None or not trainer.training or trainer.train_dataloader is not loader:
            return 0
        done = trainer.fit_loop.batch_idx + 1
        return done if done < trainer.num_training_batches else len(loader)  # the Trainer may take a part of an epoch

    def _loader(self, dataset: ImageDataset) -> DataLoader[tuple[Tensor, ...]]:
        # A Trainer gives every process its share; no batch is larger than those of training.
        world_size = self.trainer.world_size if self.trainer else 1
        return DataLoader(
            dataset,
            batch_size=max(1, self.batch_size // world_size),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
