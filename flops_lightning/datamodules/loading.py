"""Training batches that are a function of seed, epoch and batch number, for any number of processes."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, default_collate, default_convert
from torchdata.stateful_dataloader import StatefulDataLoader

from flops_lightning.errors import SettingError, check_whole
from flops_lightning.noise.keys import NoiseKey, row_seeds

Mixing = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(images (b, ...), labels (b,)) -> (images (b, ...), targets (b, c))``."""
WHOLE = 256
"""Samples of a batch outside of training where training takes all at once."""


class ImageKey(NamedTuple):
    """Asks a data set for an image as a certain epoch sees it: augmentation is drawn anew in each epoch."""

    epoch: int
    place: int


def local_batch_size(batch_size: int, world_size: int) -> int:
    """Images of a global batch for each process."""
    if batch_size % world_size:
        below = batch_size // world_size * world_size
        sizes = f"{below} or {below + world_size}" if below else str(world_size)
        problem = f"cannot be divided evenly between {world_size} processes."
        raise SettingError("data.batch_size", batch_size, problem, f"Use {sizes}.")
    return batch_size // world_size


class GlobalBatches(DistributedSampler[ImageKey]):
    """One process's share of every global batch, image by image.

    The order of an epoch is a function of ``seed`` and the epoch alone; in one process it is that of torch's own
    ``DistributedSampler``. Each process takes consecutive images of every global batch, as many as every other. Of a
    last, smaller batch some processes take one image more than others; if it has fewer images than there are
    processes, this epoch leaves it out. So every process has the same number of batches, and no image is seen twice.

    Attributes:
        batch_size: Images per global batch.
        first_batch: Number of batches to skip at the beginning of the next iteration, and of that one only.
    """

    def __init__(self, dataset: Dataset[Any], *, batch_size: int, world_size: int, rank: int, seed: int) -> None:
        local_batch_size(batch_size, world_size)
        super().__init__(dataset, num_replicas=world_size, rank=rank, seed=seed)
        self.batch_size, self.first_batch = batch_size, 0

    def __len__(self) -> int:
        whole, rest = divmod(len(cast("Sized", self.dataset)), self.batch_size)
        more, uneven = divmod(rest, self.num_replicas)
        return whole * self.batch_size // self.num_replicas + (more + (self.rank < uneven) if more else 0)

    def __iter__(self) -> Iterator[ImageKey]:
        first, self.first_batch = self.first_batch, 0
        epoch = self.epoch
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order = torch.randperm(len(cast("Sized", self.dataset)), generator=generator)
        for batch in order.split(self.batch_size)[first:]:
            if len(batch) >= self.num_replicas:
                share = batch.tensor_split(self.num_replicas)[self.rank]
                yield from (ImageKey(epoch, place) for place in share.tolist())


class KeyedBatches(Dataset[Any]):
    """Loads whole batches, with torch's CPU generator seeded for every image and restored afterwards.

    A resumed run therefore draws what the uninterrupted one did, whatever else was drawn.
    """

    def __init__(
        self, images: Dataset[Any], *, seed: int, mixing: Mixing | None = None,
        collate: Callable[[list[Any]], Any] = default_collate,
    ) -> None:  # fmt: skip
        """Wrap ``images``.

        Items of ``images`` are ``(image, label)``, or whatever ``collate`` makes a batch of; ``mixing`` mixes those of
        a batch, seeded by its first image.
        """
        self.images, self._seed, self._mixing, self._collate = images, seed, mixing, collate

    def __len__(self) -> int:
        return len(cast("Sized", self.images))

    def __getitem__(self, key: ImageKey | int) -> Any:
        with torch.random.fork_rng(devices=[]):
            return self._drawn([key])[0]

    def __getitems__(self, keys: Sequence[ImageKey | int]) -> Any:
        with torch.random.fork_rng(devices=[]):
            batch = self._collate(self._drawn(keys))
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
            items.append(self.images[_key(key).place])
        return items

    def _seeds(self, kind: str, keys: Sequence[ImageKey | int]) -> list[int]:
        epoch = _key(keys[0]).epoch  # a batch is of one epoch
        places = np.array([_key(key).place for key in keys])
        return row_seeds(NoiseKey(self._seed, epoch, kind), places, np.zeros_like(places))


def _key(key: ImageKey | int) -> ImageKey:
    # Samplers other than ours, for example the Trainer's for overfit_batches, yield plain places.
    return key if isinstance(key, ImageKey) else ImageKey(0, key)


class TrainingLoader(StatefulDataLoader[tuple[Tensor, ...]]):  # type: ignore[misc]  # torchdata has no types
    """torchdata's loader, which decides where to begin when the first batch is requested.

    A Trainer saves the loader's state with every checkpoint but does not always restore it: not where the length of
    the schedule was asked for first, and not at the end of an epoch. It also requests the first batches, on which
    workers begin to load, before the sampler knows the epoch. Since batch ``i`` of an epoch is a function of the seed,
    the epoch and ``i``, the Trainer's own count of batches suffices; the number of workers and of processes may then
    differ from the interrupted run's.

    Attributes:
        batches_done: Called on the first request of an iteration: how many batches of the epoch are done already. None
            leaves that to torchdata: a custom loop sets the sampler's epoch and calls ``load_state_dict()``.
    """

    batches_done: Callable[[], int] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        if self.batches_done is not None and isinstance(self.sampler, GlobalBatches):
            if self.next_iter_state is not None:  # type: ignore[has-type]
                self.load_state_dict({})  # what a Trainer restored, and what had begun before
                self.next_iter_state = None
            self.sampler.first_batch = self.batches_done()
        yield from super().__iter__()


class KeyedLoaders(LightningDataModule):
    """The loaders over ``train_set``, ``val_set`` and ``test_set``, which a subclass sets in ``setup``.

    Training batch ``i`` of an epoch is a function of the seed given to ``seed_everything`` (0 without one), the epoch
    and ``i`` alone. Several processes share the samples of each batch (:class:`GlobalBatches`).
    """

    train_set: Any
    val_set: Any
    test_set: Any

    def __init__(self, *, batch_size: int, num_workers: int) -> None:
        """``batch_size``: samples of a batch, all processes together; 0: all training samples in every batch."""
        super().__init__()
        check_whole("data.batch_size", batch_size, 0, "Give the number of samples per batch, or 0 for all of them.")
        check_whole("data.num_workers", num_workers, 0, "Use 0 to load in the main process.")
        self.batch_size, self.num_workers = batch_size, num_workers

    @property
    def mixing(self) -> Mixing | None:
        """What mixes the samples of a training batch; None: nothing."""
        return None

    def collate(self, samples: list[Any]) -> Any:
        """A batch of samples."""
        return default_collate(samples)

    def train_dataloader(self) -> TrainingLoader:
        """Training batches, in a new order each epoch."""
        world_size, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        batches = KeyedBatches(self.train_set, seed=seed, mixing=self.mixing, collate=self.collate)
        # Of all samples, processes take as many each, up to one.
        share = local_batch_size(self.batch_size, world_size) or -(-len(batches) // world_size)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 calls it
            loader = TrainingLoader(
                batches,
                batch_size=share,
                sampler=GlobalBatches(
                    batches, batch_size=share * world_size, world_size=world_size, rank=rank, seed=seed
                ),
                collate_fn=default_convert,  # the data set collates
                **self._loading(),
            )
        loader.batches_done = lambda: self._batches_done(loader)
        return loader

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation batches, in a fixed order."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader[Any]:
        """Test batches, in a fixed order."""
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader[Any]:
        """The test batches again, in the same order, so that predictions line up with labels."""
        return self._loader(self.test_set)

    def _batches_done(self, loader: TrainingLoader) -> int:
        """Batches of this epoch that an interrupted run has done, if the Trainer that resumes it reads this loader."""
        trainer = self.trainer
        if trainer is None or not trainer.training or trainer.train_dataloader is not loader:
            return 0
        done = trainer.fit_loop.batch_idx + 1
        return done if done < trainer.num_training_batches else len(loader)  # the Trainer may take a part of an epoch

    def _loader(self, dataset: Any) -> DataLoader[Any]:
        # A Trainer divides the samples between processes; no batch is larger than those of training.
        world_size = self.trainer.world_size if self.trainer else 1
        size = max(1, (self.batch_size or WHOLE) // world_size)
        return DataLoader(dataset, batch_size=size, collate_fn=self.collate, **self._loading())

    def _loading(self) -> dict[str, Any]:
        workers = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
        return {**workers, "pin_memory": torch.cuda.is_available()}
