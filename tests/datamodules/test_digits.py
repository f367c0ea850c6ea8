import math

import pytest
import torch
from lightning.pytorch import seed_everything
from sklearn.datasets import load_digits

from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.datamodules.digits import turn
from flops_lightning.errors import SettingError


def prepared(**settings) -> DigitsDataModule:
    data = DigitsDataModule(**settings)
    data.setup("fit")
    return data


def test_splits_partition_the_real_digits_and_keep_the_share_of_every_class():
    data = prepared()
    digits = load_digits()
    parts = [data.train_set, data.val_set, data.test_set]
    assert [len(part) for part in parts] == [1257, 180, 360]

    whole = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
    whole = (whole - data.mean[0]) / data.std[0]
    # Sorted by bytes, so that equality means the same multiset of (image, label).
    expected = sorted((x.numpy().tobytes(), int(y)) for x, y in zip(whole, digits.target, strict=True))
    got = sorted((x.numpy().tobytes(), int(y)) for part in parts for x, y in zip(*part.tensors, strict=True))
    assert got == expected

    share = torch.bincount(torch.from_numpy(digits.target), minlength=10) / 1797
    for part in parts:
        counts = torch.bincount(part.tensors[1], minlength=10)
        assert (counts - share * len(part)).abs().max() < 1.5


def test_upright_pixels_have_mean_0_and_standard_deviation_1():
    data = prepared()
    values = torch.cat([part.tensors[0] for part in (data.train_set, data.val_set, data.test_set)])
    assert abs(values.mean().item()) < 1e-3
    assert abs(values.std(correction=0).item() - 1) < 1e-3


def test_split_depends_on_its_own_seed_only():
    seed_everything(1)
    first = prepared()
    seed_everything(2)
    again, other = prepared(), prepared(split_seed=1)
    assert torch.equal(first.test_set.tensors[0], again.test_set.tensors[0])
    assert not torch.equal(first.test_set.tensors[1], other.test_set.tensors[1])


def test_rotation_keeps_split_and_labels_and_turns_counter_clockwise():
    upright, turned = prepared(), prepared(rotation=90.0)
    assert torch.equal(upright.test_set.tensors[1], turned.test_set.tensors[1])
    expected = upright.test_set.tensors[0].rot90(1, (2, 3))
    torch.testing.assert_close(turned.test_set.tensors[0], expected, rtol=0, atol=1e-5)
    assert turn(torch.ones(1, 1, 9, 9), 45.0)[0, 0, 0, 0] == 0.0  # corners fill with background


def test_batches_have_the_promised_shapes_and_the_last_one_is_kept():
    data = prepared(batch_size=100)
    sizes = []
    for images, labels in data.train_dataloader():
        assert images.shape == (len(labels), data.in_chans, data.image_size, data.image_size)
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        sizes.append(len(labels))
    assert sizes == [100] * 12 + [57]
    assert (data.num_classes, data.class_names) == (10, tuple("0123456789"))


def test_prediction_reads_the_test_images_in_order():
    data = prepared()
    images = torch.cat([images for images, _ in data.predict_dataloader()])
    assert torch.equal(images, data.test_set.tensors[0])
    assert torch.equal(images, torch.cat([images for images, _ in data.test_dataloader()]))


@pytest.mark.parametrize(("name", "value"), [("rotation", math.nan), ("rotation", math.inf), ("split_seed", -1)])
def test_a_setting_out_of_range_is_named_with_its_remedy(name, value):
    with pytest.raises(SettingError, match=rf"^data\.{name} = {value}: is not .*\. (Give|Use) "):
        DigitsDataModule(**{name: value})
