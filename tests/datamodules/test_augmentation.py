"""Augmentation drawn by key, and mixed images with their targets."""

import math

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset
from torchvision.transforms import v2

from flops_lightning.datamodules import CIFAR10DataModule, DigitsDataModule
from flops_lightning.datamodules.augmentation import RandAugmentSettings, image_transform, mixing
from flops_lightning.datamodules.cifar import CIFAR10_STATISTICS
from flops_lightning.datamodules.files import ImageSubset, Listing
from flops_lightning.datamodules.loading import ImageKey, KeyedBatches
from flops_lightning.errors import SettingError
from flops_lightning.noise.keys import NoiseKey, row_seeds


class Draws(TensorDataset):
    """Each item is what torch's generator gives when it is asked for."""

    def __getitem__(self, index):
        return torch.rand(1, 1, 3), torch.tensor(index)


DRAWS = Draws(torch.arange(10))


def test_an_image_depends_on_seed_epoch_and_place_alone():
    keyed = KeyedBatches(DRAWS, seed=1)
    one, _ = keyed[ImageKey(2, 7)]
    torch.rand(5)
    batch, labels = keyed.__getitems__([ImageKey(2, place) for place in (3, 7, 9)])
    assert torch.equal(batch[1], one)
    assert labels.tolist() == [3, 7, 9]
    others = [batch[0], keyed[ImageKey(3, 7)][0], KeyedBatches(DRAWS, seed=2)[ImageKey(2, 7)][0]]
    assert not any(torch.equal(one, other) for other in others)
    assert torch.equal(keyed[7][0], keyed[ImageKey(0, 7)][0])


def test_torchs_own_generator_is_left_as_it_was():
    before = torch.get_rng_state()
    KeyedBatches(DRAWS, seed=1, mixing=mixing(1.0, 1.0, 10)).__getitems__([ImageKey(0, 1), ImageKey(0, 2)])
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_of_neighbouring_keys_are_independent():
    keyed = KeyedBatches(DRAWS, seed=0)
    values = torch.stack([torch.stack([keyed[ImageKey(e, i)][0] for i in range(10)]) for e in range(300)]).double()
    count = values[..., 0].numel()
    assert abs(values.mean().item() - 0.5) < 4.5 * (1 / 12 / values.numel()) ** 0.5
    centred = (values - 0.5) * 12**0.5
    for product in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert product[..., 0].mean().abs().item() < 4.5 / count**0.5


def digits(**settings) -> DigitsDataModule:
    data = DigitsDataModule(batch_size=200, **settings)
    data.setup("fit")
    return data


def batches(data: DigitsDataModule, epoch: int = 0) -> list:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_mixup_is_the_convex_combination_with_the_neighbour():
    plain, mixed = batches(digits(), 1), batches(digits(mixup_alpha=0.4), 1)
    shares = []
    for (x, y), (images, targets) in zip(plain, mixed, strict=True):
        hard = torch.nn.functional.one_hot(y, 10).float()
        other_x, other = x.roll(1, 0), hard.roll(1, 0)
        differ = (hard != other).any(1)
        share = targets[differ][hard[differ].bool()].mean().item()
        shares.append(share)
        torch.testing.assert_close(targets, share * hard + (1 - share) * other, rtol=0, atol=1e-6)
        torch.testing.assert_close(images, share * x + (1 - share) * other_x, rtol=0, atol=1e-5)
        assert (targets.dtype, targets.shape) == (torch.float32, (len(x), 10))
    assert len(set(shares)) == len(shares)  # drawn anew for each batch
    again = batches(digits(mixup_alpha=0.4), 1)
    assert all(torch.equal(a, b) for old, new in zip(mixed, again, strict=True) for a, b in zip(old, new, strict=True))


def test_the_share_has_the_beta_distribution():
    alpha, draws = 0.5, 1000
    keyed = KeyedBatches(TensorDataset(torch.zeros(2, 1, 2, 2), torch.arange(2)), seed=0, mixing=mixing(alpha, 0, 2))
    share = torch.stack([keyed.__getitems__([ImageKey(e, 0), ImageKey(e, 1)])[1][0, 0] for e in range(draws)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(share.mean().item() - 0.5) < 4.5 * (variance / draws) ** 0.5
    assert abs(share.var().item() - variance) < 4.5 * variance * (2 / draws) ** 0.5


def test_cutmix_pastes_a_box_and_the_targets_are_its_area():
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([2, 0, 1, 0])
    hard, cut = torch.nn.functional.one_hot(labels, 3).float(), set()
    keyed = KeyedBatches(TensorDataset(images, labels), seed=0, mixing=mixing(0.0, 1.0, 3))
    for epoch in range(60):
        mixed, targets = keyed.__getitems__([ImageKey(epoch, place) for place in range(4)])
        pasted = (mixed != images).any(0)[0]
        rows, columns = pasted.any(1), pasted.any(0)
        assert torch.equal(pasted, rows[:, None] & columns)
        assert torch.equal(mixed, torch.where(pasted, images.roll(1, 0), images))
        share = 1 - pasted.float().mean().item()
        torch.testing.assert_close(targets, share * hard + (1 - share) * hard.roll(1, 0), rtol=0, atol=1e-6)
        cut.add(share)
    assert len(cut) > 10


def test_with_both_each_is_drawn_half_the_time():
    draws, black_and_white = 400, torch.stack((torch.zeros(1, 8, 8), torch.ones(1, 8, 8)))
    keyed = KeyedBatches(TensorDataset(black_and_white, torch.arange(2)), seed=0, mixing=mixing(1.0, 1.0, 2))
    mixed = torch.stack([keyed.__getitems__([ImageKey(e, 0), ImageKey(e, 1)])[0] for e in range(draws)])
    blended = ((mixed > 0.001) & (mixed < 0.999)).flatten(1).any(1).float().mean().item()
    # A share of MixUp so near to 0 or 1 that no pixel shows it has probability 0.002.
    assert abs(blended - 0.5) < 4.5 * 0.5 / draws**0.5 + 0.002


def test_rand_augment_is_torchvisions_by_the_key_of_the_image():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    settings, (mean, std) = RandAugmentSettings(num_ops=2, magnitude=12), CIFAR10_STATISTICS
    subset = ImageSubset(Listing(pixels, [0] * 6), image_transform([settings.transform()], mean, std))
    found = KeyedBatches(subset, seed=4).__getitems__([ImageKey(5, place) for place in range(6)])[0]

    reference = v2.RandAugment(num_ops=2, magnitude=12)
    changed = 0
    for place, image in enumerate(torch.from_numpy(pixels).permute(0, 3, 1, 2)):
        (seed,) = row_seeds(NoiseKey(4, 5, "image"), np.array([place]), np.array([0]))
        torch.manual_seed(seed)
        augmented = reference(image)
        changed += not torch.equal(augmented, image)
        expected = (augmented.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        torch.testing.assert_close(found[place].double(), expected, rtol=0, atol=1e-5)
    assert changed >= 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup_alpha": -0.1}, "data.mixup_alpha = -0.1: must be 0 or more. Use for example 0.2 or 1.0, or 0 for"),
        ({"cutmix_alpha": math.inf}, "data.cutmix_alpha = inf: must be 0 or more."),
        (
            {"rand_augment": RandAugmentSettings(num_ops=0)},
            "data.rand_augment.num_ops = 0: must be a whole number, 1 or more.",
        ),
        ({"rand_augment": RandAugmentSettings(magnitude=31)}, "data.rand_augment.magnitude = 31: is not in 0 to 30."),
    ],
)
def test_settings_out_of_range_are_refused(settings, message, tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(SettingError) as caught:
        CIFAR10DataModule(root=str(tmp_path), **settings)
    assert str(caught.value).startswith(message)
