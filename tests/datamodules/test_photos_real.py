"""The data modules on subsets of the real data sets."""

import json
from pathlib import Path

import pytest
import torch
from torchvision.datasets import Caltech101, Flowers102

from flops_lightning.datamodules import (
    Caltech101DataModule,
    Flowers102DataModule,
    ImageNetDataModule,
)
from flops_lightning.errors import SettingError

PARTS = ("train", "val", "test")
ALL = {"normalization": "imagenet", "batch_size": 16, "image_size": 32}


def prepared(data, stage="fit"):
    data.prepare_data()
    data.setup(stage)
    return data


def pairs(data, *parts: str) -> list[tuple[str, int]]:
    sets = [getattr(data, f"{part}_set") for part in parts]
    return [(str(file), int(label)) for part in sets for file, label in zip(part.files, part.labels, strict=True)]


def check_pixels(data) -> None:
    """Natural images, normalised: every image is read, none is flat, and means and squares are near 0 and 1."""
    images = torch.cat([images for images, _ in data.test_dataloader()])[:200]
    assert images.shape[1:] == (3, 32, 32)
    assert images.std((1, 2, 3)).min() > 0.05
    assert images.mean().abs() < 0.7
    assert 0.5 < images.square().mean() < 2.5


def test_caltech101_by_seed(shared_data):
    root = shared_data("data/caltech101").parent
    data = prepared(Caltech101DataModule(root=str(root), **ALL))
    assert [len(getattr(data, f"{part}_set")) for part in PARTS] == [404, 162, 242]  # of 808: the half, 20 %, 30 %
    theirs = Caltech101(root)
    assert sorted(label for _, label in pairs(data, *PARTS)) == theirs.y
    assert all(Path(file).parent.name == theirs.categories[label] for file, label in pairs(data, *PARTS))
    assert len({*pairs(data, *PARTS)}) == 808
    for part in PARTS:
        counts = getattr(data, f"{part}_set").labels.bincount(minlength=101)
        assert counts.max() - counts.min() <= 1
    check_pixels(data)


def test_caltech101_by_the_split_of_coop(shared_data):
    root, file = shared_data("data/caltech101").parent, shared_data("data/coop/split_zhou_Caltech101.json")
    data = Caltech101DataModule(root=str(root), split_file=str(file), **ALL)
    with pytest.raises(SettingError, match=r"\d+ listed images are missing, .* data\.allow_missing: true"):
        data.setup("fit")
    with pytest.warns(UserWarning, match=r"listed images are missing under .*, and \d+ of 100 classes"):
        data = prepared(Caltech101DataModule(root=str(root), split_file=str(file), allow_missing=True, **ALL))
    listed = json.loads(file.read_text())
    folder = root / "caltech101" / "101_ObjectCategories"
    for part in PARTS:
        expected = [(str(folder / image), label) for image, label, _ in listed[part] if (folder / image).exists()]
        assert pairs(data, part) == expected
    assert len(pairs(data, *PARTS)) == 800  # 8 of each of its 100 classes
    assert data.num_classes == 100
    names = {label: name for image, label, name in listed["train"]}
    assert data.class_names == tuple(names[label] for label in range(100))
    check_pixels(data)
    few = {"images_per_class": 16, "val_images_per_class": 4, "allow_missing": True}  # 8 of a class are here at most
    with pytest.warns(UserWarning, match=r"images_per_class = 16: 100 of 100 classes .* 393 training images are used"):
        data = prepared(Caltech101DataModule(root=str(root), split_file=str(file), **few, **ALL))
    assert len(data.train_set) == 393
    assert data.val_set.labels.bincount().max() == 4


def test_flowers102(shared_data):
    root = shared_data("data/flowers-102").parent
    with pytest.raises(SettingError, match=r"\d+ listed images are missing, the first is .*\.jpg"):
        prepared(Flowers102DataModule(root=str(root), **ALL))
    with pytest.warns(UserWarning, match=r"listed images are missing under .*, and \d+ of 102 classes"):
        data = prepared(Flowers102DataModule(root=str(root), allow_missing=True, **ALL))
    assert len(pairs(data, *PARTS)) == 713
    for part in PARTS:
        theirs = Flowers102(root, split=part)
        shown = []
        theirs.loader = lambda file, shown=shown: shown.append(str(file))
        labels = [theirs[i][1] for i in range(len(theirs))]
        expected = [(file, label) for file, label in zip(shown, labels, strict=True) if Path(file).exists()]
        assert pairs(data, part) == expected
    assert data.num_classes == 102
    check_pixels(data)


def test_imagenet_with_nothing_but_the_validation_images_tests_and_does_not_train(shared_data):
    root = shared_data("data/imagenet")
    data = prepared(ImageNetDataModule(root=str(root), **ALL), "test")
    assert (len(data.test_set), data.num_classes) == (100, 100)
    wnids = sorted(folder.name for folder in (root / "val").iterdir())
    assert data.class_names == tuple(wnids)
    assert [Path(file).parent.name for file, _ in pairs(data, "test")] == wnids
    assert [label for _, label in pairs(data, "test")] == list(range(100))
    check_pixels(data)
    with pytest.raises(SettingError) as caught:
        data.setup("fit")
    assert (caught.value.setting, caught.value.value) == ("data.root", str(root))
    assert caught.value.problem == "has no images to train with."
    assert "train/WNID/*.JPEG" in caught.value.remedy
