"""Training batches that do not depend on the number of processes."""

from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler, TensorDataset

from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.datamodules.loading import GlobalBatches, ImageKey, local_batch_size
from flops_lightning.errors import SettingError


def dataset(images: int) -> TensorDataset:
    return TensorDataset(torch.arange(images))


def shares(images: int, batch_size: int, world_size: int, seed: int, epoch: int) -> list[list[list[int]]]:
    """Places by rank and batch, batched as a loader batches what the sampler yields."""
    found = []
    for rank in range(world_size):
        sampler = GlobalBatches(dataset(images), batch_size=batch_size, world_size=world_size, rank=rank, seed=seed)
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert len(keys) == len(sampler)
        assert {key.epoch for key in keys} <= {epoch}
        size = batch_size // world_size
        found.append([[key.place for key in keys[i : i + size]] for i in range(0, len(keys), size)])
    return found


@given(
    images=st.integers(1, 60), share=st.integers(1, 6), world_size=st.integers(1, 5), seed=st.integers(0, 3),
    epoch=st.integers(0, 3),
)  # fmt: skip
def test_every_number_of_processes_has_the_batches_of_one(images, share, world_size, seed, epoch):
    batch_size = share * world_size
    (alone,) = shares(images, batch_size, 1, seed, epoch)
    by_rank = shares(images, batch_size, world_size, seed, epoch)
    left_out = 0 < images % batch_size < world_size
    together = [list(chain(*parts)) for parts in zip(*by_rank, strict=True)]  # strict: as many batches on every rank
    assert together == (alone[:-1] if left_out else alone)
    for parts in zip(*by_rank, strict=True):
        sizes = [len(part) for part in parts]
        assert max(sizes) - min(sizes) <= (0 if sum(sizes) == batch_size else 1)
        assert min(sizes) >= 1
    assert sorted(chain(*alone)) == list(range(images))


def test_in_one_process_the_order_is_that_of_torch():
    ours = GlobalBatches(dataset(50), batch_size=8, world_size=1, rank=0, seed=7)
    reference = DistributedSampler(dataset(50), num_replicas=1, rank=0, seed=7)
    for epoch in (0, 3):
        ours.set_epoch(epoch)
        reference.set_epoch(epoch)
        assert list(ours) == [ImageKey(epoch, place) for place in reference]


def test_an_iteration_can_begin_at_any_batch_and_only_that_one_does():
    sampler = GlobalBatches(dataset(20), batch_size=6, world_size=2, rank=1, seed=0)
    whole = list(sampler)
    for first, rest in ((0, whole), (2, whole[6:]), (3, whole[9:]), (4, [])):
        sampler.first_batch = first
        assert list(sampler) == rest
        assert list(sampler) == whole


@pytest.mark.parametrize(
    ("batch_size", "world_size", "message"),
    [
        (64, 3, "data.batch_size = 64: cannot be divided evenly between 3 processes. Use 63 or 66."),
        (5, 8, "data.batch_size = 5: cannot be divided evenly between 8 processes. Use 8."),
    ],
)
def test_an_uneven_division_is_refused_with_the_nearest_sizes(batch_size, world_size, message):
    data = DigitsDataModule(batch_size=batch_size)
    data.setup("fit")
    data.trainer = SimpleNamespace(world_size=world_size, global_rank=0, training=True)
    with pytest.raises(SettingError) as caught:
        data.train_dataloader()
    assert str(caught.value) == message


def test_the_batch_size_is_that_of_all_processes_together():
    assert local_batch_size(64, 4) == 16
    data = DigitsDataModule(batch_size=400)
    data.setup("fit")
    alone = list(data.train_dataloader())
    parts = []
    for rank in range(4):
        data.trainer = SimpleNamespace(world_size=4, global_rank=rank, training=False)
        parts.append(list(data.train_dataloader()))
        assert [len(labels) for _, labels in data.val_dataloader()] == [100, 80]  # the Trainer divides these
    assert [[len(labels) for _, labels in part] for part in parts] == [[100, 100, 100, n] for n in (15, 14, 14, 14)]
    for batch, shared in zip(alone, zip(*parts, strict=True), strict=True):
        assert torch.equal(torch.cat([images for images, _ in shared]), batch[0])
        assert torch.equal(torch.cat([labels for _, labels in shared]), batch[1])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_batch_size_of_0_is_all_training_images(world_size):
    held = []
    for rank in range(world_size):
        data = DigitsDataModule(batch_size=0)
        data.trainer = SimpleNamespace(world_size=world_size, global_rank=rank, training=False)
        data.setup("fit")
        ((images, _),) = data.train_dataloader()
        held.append(len(images))
        assert sum(len(labels) for _, labels in data.val_dataloader()) == 180
    assert sum(held) == 1257
