"""CIFAR-10 and CIFAR-100 in both layouts."""

import hashlib
import json
import logging
import pickle
import re
import tarfile
from collections import Counter
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import functional

from flops_lightning.cli.command import main
from flops_lightning.datamodules import CIFAR10DataModule, CIFAR100DataModule
from flops_lightning.errors import SettingError
from tests.datamodules.photo_folders import command

NAMES = CIFAR10DataModule.class_names
MODULES = {"cifar10": CIFAR10DataModule, "cifar100": CIFAR100DataModule}
IMAGES = {"cifar10": (8, 4), "cifar100": (3, 2)}  # of each class in the fixtures: to train and to test
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
TRAIN, TEST = IMAGES["cifar10"]


def noise(label: int, number: int) -> np.ndarray:
    return np.random.default_rng([label, number]).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def write_folders(root: Path, kind: str = "cifar10", images: tuple[int, int] | None = None) -> Path:
    train, test = images or IMAGES[kind]
    for part, count, first in (("train", train, 0), ("test", test, 1000)):
        for label, name in enumerate(MODULES[kind].class_names):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                Image.fromarray(noise(label, first + number)).save(root / part / name / f"{number:04}.png")
    return root


def write_archive(root: Path, patch: pytest.MonkeyPatch, kind: str = "cifar10", names: tuple[str, ...] = ()) -> Path:
    """The images of ``write_folders`` in torchvision's layout, whose checksums are public attributes of its class."""
    theirs = MODULES[kind].source.torchvision()
    names = names or MODULES[kind].class_names
    folder = root / theirs.base_folder
    folder.mkdir(parents=True)

    def write(name: str, content: dict) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(numbers: list[tuple[int, int]]) -> dict:
        rows = [noise(label, number).transpose(2, 0, 1).reshape(-1) for number, label in numbers]
        labels = [label for _, label in numbers]
        fine = {"labels": labels} if kind == "cifar10" else {"fine_labels": labels, "coarse_labels": [0] * len(labels)}
        return {"data": np.stack(rows), **fine}

    train, test = (range(count) for count in IMAGES[kind])
    numbers, files = list(product(train, range(len(names)))), [name for name, _ in theirs.train_list]
    held = [(1000 + number, label) for number, label in product(test, range(len(names)))]
    patch.setattr(theirs, "train_list", [write(f, batch(numbers[i :: len(files)])) for i, f in enumerate(files)])
    patch.setattr(theirs, "test_list", [write(theirs.test_list[0][0], batch(held))])
    _, digest = write(theirs.meta["filename"], {theirs.meta["key"]: list(names)})
    patch.setattr(theirs, "meta", {**theirs.meta, "md5": digest})
    return root


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: write_folders(tmp_path_factory.mktemp(kind), kind) for kind in MODULES}


@pytest.fixture
def folders(roots: dict[str, Path]) -> str:
    return str(roots["cifar10"])


def prepared(root: str | Path, kind: str = "cifar10", **settings: Any) -> Any:
    data = MODULES[kind](root=str(root), **{"val_images": 20 if kind == "cifar10" else 100, **settings})
    data.prepare_data()
    data.setup("fit")
    return data


def levels(data: Any, images: torch.Tensor) -> torch.Tensor:
    """Normalised values as grey levels from 0 to 255 again."""
    mean, std = torch.tensor(data.mean).view(3, 1, 1), torch.tensor(data.std).view(3, 1, 1)
    return ((images * std + mean) * 255).round().to(torch.uint8)


def contents(data: Any, *parts: str) -> list[tuple[bytes, int]]:
    items = [item for part in parts for item in getattr(data, f"{part}_set")]
    return sorted((levels(data, image).numpy().tobytes(), int(label)) for image, label in items)


def expected(numbers: range, classes: int = 10) -> list[tuple[bytes, int]]:
    return sorted((noise(label, n).transpose(2, 0, 1).tobytes(), label) for label in range(classes) for n in numbers)


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("layout", ["archive", "folders"])
def test_both_layouts_give_every_image_once_with_its_label(layout, kind, roots, tmp_path, monkeypatch):
    data = prepared(write_archive(tmp_path, monkeypatch, kind) if layout == "archive" else roots[kind], kind)
    (train, test), classes = IMAGES[kind], int(kind.removeprefix("cifar"))
    assert contents(data, "train", "val") == expected(range(train), classes)
    assert contents(data, "test") == expected(range(1000, 1000 + test), classes)
    assert data.val_set.labels.bincount().tolist() == [2 if classes == 10 else 1] * classes
    assert (data.mean, data.std) == STATISTICS[kind]
    assert [*data.class_names] == sorted({*data.class_names})  # as in the archive
    assert data.num_classes == classes


def test_the_archive_is_preferred_where_both_layouts_are_there(tmp_path, monkeypatch):
    write_archive(write_folders(tmp_path, images=(3, 1)), monkeypatch)
    data = prepared(tmp_path)
    assert (len(data.train_set), len(data.test_set)) == (10 * TRAIN - 20, 10 * TEST)


@pytest.mark.parametrize(
    ("normalization", "mean", "std"),
    [
        ("cifar10", *STATISTICS["cifar10"]),
        ("imagenet", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("inception", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("backbone", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
    ],
)
def test_pixels_are_scaled_and_normalised(normalization, mean, std, folders):
    data = CIFAR10DataModule(root=folders, val_images=20, normalization=normalization, batch_size=40)
    backbone = nn.Identity()
    backbone.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(backbone=backbone), world_size=1)
    data.setup("fit")
    ((images, labels),) = data.test_dataloader()
    reference = np.stack([noise(label, 1000 + n) for label in range(10) for n in range(TEST)]).astype(np.float64)
    reference = (reference / 255 - np.array(mean)) / np.array(std)
    torch.testing.assert_close(images, torch.from_numpy(reference).permute(0, 3, 1, 2).float(), rtol=0, atol=2e-6)
    assert labels.tolist() == [label for label in range(10) for _ in range(TEST)]
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("image_size", [16, 48])
def test_images_are_resized_as_pil_resizes_them(image_size, folders):
    data = prepared(folders, image_size=image_size)
    resized = Image.fromarray(noise(0, 1000)).resize((image_size, image_size), Image.Resampling.BICUBIC)
    image, _ = data.test_set[0]
    assert image.shape == (3, image_size, image_size)
    error = levels(data, image).int() - torch.from_numpy(np.array(resized)).permute(2, 0, 1).int()
    assert error.abs().max() <= 1  # two roundings to 8 bits


def test_the_choice_of_images_depends_on_its_own_seed_only(folders):
    first, again, other = (prepared(folders, images_per_class=2, test_images=30, split_seed=seed) for seed in (0, 0, 1))
    for part in ("train", "val", "test"):
        assert contents(first, part) == contents(again, part) != contents(other, part)
    assert first.test_set.labels.bincount().tolist() == [3] * 10
    assert {*contents(first, "test")} < {*expected(range(1000, 1000 + TEST))}
    every, whole = prepared(folders, test_images=10 * TEST), prepared(folders, test_images=0)
    assert contents(every, "test") == contents(whole, "test")


@pytest.mark.parametrize("image_size", [32, 48])
def test_augmented_images_are_shifted_and_mirrored_uniformly_and_only_in_training(image_size, folders):
    settings = {"images_per_class": 1, "image_size": image_size}
    plain, data = prepared(folders, **settings), prepared(folders, augment=True, **settings)
    assert contents(plain, "val", "test") == contents(data, "val", "test")

    pad = image_size // 8
    padded = functional.pad(levels(plain, plain.train_set[3][0]), [pad] * 4)
    views = {}
    for mirrored, top, left in product((False, True), range(2 * pad + 1), range(2 * pad + 1)):
        view = padded[:, top : top + image_size, left : left + image_size]
        views[(view.flip(2) if mirrored else view).numpy().tobytes()] = (mirrored, top, left)
    assert len(views) == 2 * (2 * pad + 1) ** 2

    draws = 1000
    drawn = [views[levels(data, data.train_set[3][0]).numpy().tobytes()] for _ in range(draws)]  # a KeyError: no view
    for values in zip(*drawn, strict=True):  # mirrored or not, from top, from left
        counts = Counter(values)
        share = 1 / (2 if isinstance(values[0], bool) else 2 * pad + 1)
        assert len(counts) == round(1 / share)
        standard_error = (share * (1 - share) / draws) ** 0.5
        assert all(abs(count / draws - share) < 4.5 * standard_error for count in counts.values())


@pytest.mark.parametrize("layout", ["archive", "folders"])
def test_the_check_says_what_there_is_once_and_setup_takes_its_answer(layout, roots, tmp_path, monkeypatch, caplog):
    root = write_archive(tmp_path, monkeypatch, "cifar100") if layout == "archive" else roots["cifar100"]
    data = CIFAR100DataModule(root=str(root), val_images=100, images_per_class=1, test_images=100)
    with caplog.at_level(logging.INFO):
        parts = data.check()
        data.setup("fit")
        data.setup("test")
    line = r"CIFAR-100: 100 train, 100 val, 100 test images, 100 classes \(checked in \d+\.\d s\)"
    assert [bool(re.fullmatch(line, record.message)) for record in caplog.records] == [True]
    assert data.check() is parts
    assert data.train_set.labels.tolist() == parts["train"].labels
    assert (data.train_set.files is None) == (layout == "archive")


def test_a_missing_image_is_found_before_training_and_named(tmp_path):
    file = write_folders(tmp_path) / "test" / "ship" / "0001.png"
    file.unlink()
    file.symlink_to(tmp_path / "gone.png")
    with pytest.raises(SettingError, match=f"1 listed images are missing, the first is {file}") as caught:
        prepared(tmp_path)
    assert "allow_missing" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "setting", "value", "message"),
    [
        ("cifar10", "batch_size", -1, "Give the number"),
        ("cifar10", "num_workers", -1, "Use 0"),
        ("cifar10", "image_size", 0, "Give pixels, for example 32 or 224."),
        ("cifar10", "images_per_class", -1, "Give a number of images, or 0."),
        ("cifar10", "val_images", -1, "Give a number of images, or 0."),
        ("cifar10", "test_images", -1, "Give a number of images, or 0."),
        ("cifar10", "split_seed", 2**32, "Use a number from 0"),
        ("cifar10", "normalization", "openai", "Choose from cifar10, imagenet, inception, clip, backbone."),
        ("cifar100", "normalization", "cifar10", "Choose from cifar100, imagenet, inception, clip, backbone."),
        ("cifar10", "root", "nowhere", "Set data.download: true to fetch cifar-10-batches-py/ into it, or put"),
        ("cifar100", "root", "nowhere", "Set data.download: true to fetch cifar-100-python/ into it, or put"),
        ("cifar10", "root", str(Path(__file__).parent), "holds no CIFAR-10. Set data.download: true"),
        # Found when the images are listed:
        ("cifar10", "images_per_class", 7, "airplane has 6 training images, not counting those for validation. Use at"),
        (
            "cifar10",
            "val_images",
            5000,
            "taken evenly out of 80 images in 10 classes. Use a number from 10 to 70",
        ),
        ("cifar10", "test_images", 9, "taken evenly out of 40 images in 10 classes. Use a number from 10 to 30, or 0."),
        (
            "cifar10",
            "normalization",
            "backbone",
            "there is no timm model to ask for its own. Write imagenet, inception",
        ),
    ],
)
def test_a_setting_without_sense_is_refused(kind, setting, value, message, roots):
    settings, late = {"root": str(roots[kind]), setting: value}, value in (7, 5000, 9, "backbone")
    with pytest.raises(SettingError, match=re.escape(message)) as caught:
        prepared(kind=kind, **settings) if late else MODULES[kind](**settings)
    assert (caught.value.setting, caught.value.value) == (f"data.{setting}", value)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda root: (root / "train" / "zebra").mkdir(), "train/ has folders of no class, zebra."),
        (lambda root: (root / "test").rename(root / "val"), "has no folder test/."),
    ],
)
def test_incomplete_class_folders_are_refused_with_both_layouts_as_remedy(damage, problem, tmp_path):
    damage(write_folders(tmp_path, images=(3, 1)))
    with pytest.raises(SettingError) as caught:
        prepared(tmp_path)
    assert (caught.value.setting, caught.value.value, caught.value.problem) == ("data.root", str(tmp_path), problem)
    assert re.search(rf"download: true .* train/NAME/\* and test/NAME/\* .* {', '.join(NAMES)}", caught.value.remedy)


@pytest.mark.parametrize("kind", MODULES)
def test_an_archive_that_is_damaged_or_of_another_data_set_is_refused_in_few_words(kind, tmp_path, monkeypatch):
    names = MODULES[kind].class_names[::-1]
    with pytest.raises(SettingError, match=rf"/ has the classes \['{names[0]}', '{names[1]}'") as caught:
        prepared(write_archive(tmp_path / "other", monkeypatch, kind, names), kind)
    assert len(caught.value.problem + caught.value.remedy) < 400
    write_archive(tmp_path, monkeypatch, kind)
    theirs = MODULES[kind].source.torchvision()
    (tmp_path / theirs.base_folder / theirs.test_list[0][0]).write_bytes(b"half")
    with pytest.raises(SettingError, match=rf"{theirs.base_folder}/ is incomplete or damaged\. Set data\.download: tr"):
        prepared(tmp_path, kind)


def test_download_needs_no_connection_for_what_is_there_already(tmp_path, monkeypatch):
    write_archive(tmp_path / "elsewhere", monkeypatch)
    packed = tmp_path / "root" / CIFAR10.filename  # as fetched by hand
    packed.parent.mkdir()
    with tarfile.open(packed, "w:gz") as tar:
        tar.add(tmp_path / "elsewhere" / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(packed.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "url", (tmp_path / "gone.tar.gz").as_uri())

    data = prepared(packed.parent, download=True)
    assert contents(data, "test") == expected(range(1000, 1000 + TEST))
    packed.unlink()
    assert contents(prepared(packed.parent, download=True), "val") == contents(data, "val")


@pytest.mark.parametrize("kind", MODULES)
def test_a_download_that_fails_is_refused_with_the_way_round_it(kind, tmp_path, monkeypatch):
    theirs = MODULES[kind].source.torchvision()
    monkeypatch.setattr(theirs, "url", (tmp_path / "gone.tar.gz").as_uri())
    with pytest.raises(SettingError) as caught:
        prepared(tmp_path / "root", kind, download=True)
    assert caught.value.setting == "data.download"
    assert f"put {theirs.url} into {tmp_path / 'root'} yourself" in caught.value.remedy


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader`")
@pytest.mark.parametrize("val_images", [20, 0])
def test_the_command_line_trains_on_it_with_its_number_of_classes(val_images, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mixed = ["--data.rand_augment.num_ops", "1", "--data.mixup_alpha", "0.2", "--data.cutmix_alpha", "1.0"]
    settings = {"root": folders, "augment": True, "val_images": val_images}
    command("fit", tmp_path, "CIFAR10", *(mixed if val_images else []), **settings)
    assert load_file(next(tmp_path.rglob("model.safetensors")))["head.weight"].shape == (10, 16)
    summary = json.loads(next(tmp_path.rglob("summary.json")).read_text())
    # Two steps: 60 images twice, or, with all 80 in training, 64 and the 16 that are left.
    assert summary["queries"] == 2 * (60 + 60 if val_images else 64 + 16)


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


def test_real_images_have_the_statistics_given(shared_data, tmp_path):
    train = 100
    with tarfile.open(shared_data("data/cifar10_images.tar.xz"), "r|xz") as tar:
        for member in tar:
            if member.isfile() and int(Path(member.name).stem) < train:
                image = tmp_path / member.name
                image.parent.mkdir(parents=True, exist_ok=True)
                image.write_bytes(tar.extractfile(member).read())
    data = prepared(tmp_path, val_images=100, batch_size=1000)
    ((images, _),) = data.train_dataloader()
    assert len(images) == 10 * train - 100
    # Normalised, the mean of an image varies by less than 0.6 around 0, and its mean square by less than 1 around 1.
    count = len(images)
    for moment, law, spread in ((images.mean((2, 3)), 0.0, 0.6), (images.square().mean((2, 3)), 1.0, 1.0)):
        assert moment.std(0).max() < spread
        assert (moment.mean(0) - law).abs().max() < 4 * spread / count**0.5
    assert data.mean == STATISTICS["cifar10"][0]
