"""CIFAR-100 in both layouts, and what the check before training finds and says."""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.datasets import CIFAR100

from flops_lightning.cli.command import main
from flops_lightning.datamodules import CIFAR10DataModule, CIFAR100DataModule
from flops_lightning.datamodules.cifar100 import STATISTICS
from flops_lightning.errors import DamagedImageError, SettingError

NAMES = CIFAR100DataModule.class_names
TRAIN, TEST = 3, 2  # images of each class in the fixtures
SIZE = 32


def picture(label: int, number: int) -> np.ndarray:
    """An image of noise whose first pixel is its label and number."""
    image = np.random.default_rng([label, number]).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    image[0, 0] = (label, number, 0)
    return image


def write_folders(root: Path) -> Path:
    for part, numbers in (("train", range(TRAIN)), ("test", range(100, 100 + TEST))):
        for label, name in enumerate(NAMES):
            (root / part / name).mkdir(parents=True)
            for number in numbers:
                Image.fromarray(picture(label, number)).save(root / part / name / f"{number:04}.png")
    return root


def write_archive(root: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...] = NAMES) -> Path:
    """The same images in torchvision's layout, whose checksums are public attributes of its class."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def part(numbers: range) -> dict:
        items = list(product(numbers, range(100)))
        rows = np.stack([picture(label, number).transpose(2, 0, 1).reshape(-1) for number, label in items])
        labels = [label for _, label in items]
        return {"data": rows, "fine_labels": labels, "coarse_labels": [label // 5 for label in labels]}

    monkeypatch.setattr(CIFAR100, "train_list", [["train", write("train", part(range(TRAIN)))]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", write("test", part(range(100, 100 + TEST)))]])
    digest = write("meta", {"fine_label_names": list(names), "coarse_label_names": ["fish"] * 20})
    monkeypatch.setattr(CIFAR100, "meta", {"filename": "meta", "key": "fine_label_names", "md5": digest})
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("cifar100"))


def prepared(root: Path, **settings) -> CIFAR100DataModule:
    data = CIFAR100DataModule(root=str(root), **{"val_images": 100, **settings})
    data.prepare_data()
    data.setup("fit")
    return data


def contents(data: CIFAR100DataModule, part: str) -> list[tuple[bytes, int]]:
    mean, std = torch.tensor(data.mean).view(3, 1, 1), torch.tensor(data.std).view(3, 1, 1)
    return [
        (((image * std + mean) * 255).round().to(torch.uint8).numpy().tobytes(), int(label))
        for image, label in getattr(data, f"{part}_set")
    ]


def expected(numbers: range) -> list[tuple[bytes, int]]:
    return [(picture(label, n).transpose(2, 0, 1).tobytes(), label) for label in range(100) for n in numbers]


@pytest.mark.parametrize("layout", ["archive", "folders"])
def test_both_layouts_give_every_image_once_with_its_fine_label(layout, folders, tmp_path, monkeypatch):
    data = prepared(write_archive(tmp_path, monkeypatch) if layout == "archive" else folders)
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [200, 100, 200]
    assert sorted(contents(data, "train") + contents(data, "val")) == sorted(expected(range(TRAIN)))
    assert sorted(contents(data, "test")) == sorted(expected(range(100, 100 + TEST)))
    assert data.val_set.labels.bincount().tolist() == [1] * 100
    assert (data.num_classes, data.class_names[52], data.class_names[99]) == (100, "oak_tree", "worm")
    assert (data.mean, data.std) == STATISTICS == ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))


def test_the_classes_are_in_the_order_of_the_archive_which_is_alphabetical():
    assert list(NAMES) == sorted({*NAMES})
    assert len(NAMES) == 100


@pytest.mark.parametrize("kind", [CIFAR10DataModule, CIFAR100DataModule])
def test_the_backbone_gives_the_normalisation_it_was_trained_with(kind, folders, monkeypatch):
    monkeypatch.setattr(kind, "class_names", NAMES)  # the folders serve both
    data = kind(root=str(folders), val_images=0, normalization="backbone")
    backbone = nn.Identity()
    backbone.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(backbone=backbone))
    data.setup("fit")
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    image, label = data.train_set[0]
    levels = torch.from_numpy(picture(int(label), 0)).permute(2, 0, 1) / 255
    reference = (levels - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)
    torch.testing.assert_close(image, reference, rtol=0, atol=2e-6)

    data.trainer = None
    with pytest.raises(SettingError, match=r"data\.normalization = 'backbone': there is no timm model"):
        data.setup("fit")


@pytest.mark.parametrize("layout", ["archive", "folders"])
def test_the_check_says_what_there_is_once_and_setup_takes_its_answer(layout, folders, tmp_path, monkeypatch, caplog):
    root = write_archive(tmp_path, monkeypatch) if layout == "archive" else folders
    data = CIFAR100DataModule(root=str(root), val_images=100, images_per_class=1, test_images=100)
    with caplog.at_level(logging.INFO):
        parts = data.check()
        data.setup("fit")
        data.setup("test")
    line = r"CIFAR-100: 100 train, 100 val, 100 test images, 100 classes \(checked in \d+\.\d s\)"
    assert [bool(re.fullmatch(line, record.message)) for record in caplog.records] == [True]
    assert data.check() is parts
    assert torch.equal(data.train_set.indices, parts["train"].places)


def test_an_empty_or_damaged_image_is_found_before_training_and_named(tmp_path):
    root = write_folders(tmp_path)
    first = root / "train" / "apple" / "0000.png"  # one of those that are read
    whole = first.read_bytes()
    first.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DamagedImageError, match=f"{first} cannot be read"):
        prepared(root)
    first.write_bytes(whole)
    empty = root / "test" / "wolf" / "0101.png"
    empty.write_bytes(b"")
    with pytest.raises(DamagedImageError, match=f"{empty} is empty"):
        prepared(root)


def test_a_link_to_nowhere_is_missing_and_no_setting_leaves_it_out(tmp_path):
    file = write_folders(tmp_path) / "test" / "wolf" / "0101.png"
    file.unlink()
    file.symlink_to(tmp_path / "gone.png")
    with pytest.raises(SettingError, match="1 listed images are missing, the first is") as caught:
        prepared(tmp_path)
    assert str(file) in caught.value.problem
    assert "allow_missing" not in str(caught.value)


def test_another_order_of_classes_or_a_damaged_archive_is_refused_in_few_words(tmp_path, monkeypatch):
    with pytest.raises(SettingError, match=r"cifar-100-python/ has the classes \['worm', 'woman'") as caught:
        prepared(write_archive(tmp_path / "other", monkeypatch, names=NAMES[::-1]))
    assert len(caught.value.problem + caught.value.remedy) < 400
    write_archive(tmp_path, monkeypatch)
    (tmp_path / "cifar-100-python" / "test").write_bytes(b"half")
    with pytest.raises(SettingError, match=r"cifar-100-python/ is incomplete or damaged\."):
        prepared(tmp_path)


def test_a_download_that_fails_is_refused_with_the_way_round_it(tmp_path, monkeypatch):
    monkeypatch.setattr(CIFAR100, "url", (tmp_path / "gone.tar.gz").as_uri())
    with pytest.raises(SettingError) as caught:
        prepared(tmp_path / "root", download=True)
    assert caught.value.setting == "data.download"
    assert f"put {CIFAR100.url} into {tmp_path / 'root'} yourself" in caught.value.remedy


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"normalization": "cifar10"}, "Use one of cifar100, imagenet, inception, backbone."),
        ({"root": "nowhere"}, "Set data.download: true to fetch cifar-100-python/ into it, or put images there as"),
        ({"image_size": 0}, "Give pixels, for example 32 or 224."),
    ],
)
def test_a_setting_out_of_range_is_refused_before_an_image_is_read(settings, message, folders):
    with pytest.raises(SettingError) as caught:
        CIFAR100DataModule(**{"root": str(folders), **settings})
    assert caught.value.setting == f"data.{next(iter(settings))}"
    assert caught.value.remedy.startswith(message)


def test_the_command_line_knows_the_settings_of_the_base_and_their_values(capsys):
    given = ["fit", "--data", "flops_lightning.datamodules.CIFAR100DataModule"]
    with pytest.raises(SystemExit) as leaving:
        main([*given, "--data.batch_size", "32", "--data.augment", "true", "--print_config"])
    assert leaving.value.code == 0
    printed = capsys.readouterr().out
    for setting in ("root: data/downloads/cifar100", "normalization: cifar100", "batch_size: 32", "augment: true"):
        assert f"    {setting}\n" in printed
    with pytest.raises(SystemExit):
        main([*given, "--data.normalization", "cifar10"])
    assert "one of cifar100, imagenet, inception, backbone" in capsys.readouterr().err
