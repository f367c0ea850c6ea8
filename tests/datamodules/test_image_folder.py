"""Images of one's own in class folders, as people lay them out."""

import csv
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flops_lightning.datamodules import ImageFolderDataModule
from flops_lightning.errors import DamagedImageError, SettingError
from tests.datamodules.photo_folders import command, contents, photo, told, write, write_class_folders

NAMES = ("ant", "bee", "cat")


def prepared(root: Path, stage: str = "fit", **settings: Any) -> ImageFolderDataModule:
    data = ImageFolderDataModule(
        root=root if isinstance(root, int) else str(root), **{"normalization": "inception", "image_size": 8, **settings}
    )
    data.setup(stage)
    return data


def counts(data: ImageFolderDataModule) -> list[dict[int, int]]:
    return [
        dict(sorted(Counter(label for label, _ in contents(data, part)).items())) for part in ("train", "val", "test")
    ]


def of_each(number: int) -> dict[int, int]:
    return dict.fromkeys(range(3), number)


def test_class_folders_alone_are_split_and_each_class_keeps_its_share(tmp_path):
    write_class_folders(tmp_path, NAMES, range(10))
    data = prepared(tmp_path)
    assert data.class_names == NAMES
    assert counts(data) == [of_each(5), of_each(2), of_each(3)]
    assert counts(prepared(tmp_path, val_share=0.1, test_share=0.0)) == [of_each(9), of_each(1), {}]


@pytest.mark.parametrize("lacking", [(), ("val",), ("test",), ("val", "test")])
def test_folders_of_parts_are_taken_as_they_are_and_those_that_are_missing_split_off(lacking, tmp_path):
    for part, numbers in (("train", range(6)), ("val", range(6, 8)), ("test", range(8, 10))):
        if part not in lacking:
            write_class_folders(tmp_path / part, NAMES, numbers)
    shares = {f"{part}_share": 1 / 6 for part in lacking}
    data = prepared(tmp_path, **shares)
    assert counts(data) == [
        of_each(6 - len(lacking)),
        of_each(1 if "val" in lacking else 2),
        of_each(1 if "test" in lacking else 2),
    ]
    for part, numbers in (("val", {6, 7}), ("test", {8, 9})):
        assert part in lacking or {number for _, number in contents(data, part)} == numbers


def test_a_class_may_have_the_name_of_a_part_and_a_part_may_lack_a_class(tmp_path):
    write_class_folders(tmp_path / "one", ("bus", "train"), range(10))
    assert prepared(tmp_path / "one").class_names == ("bus", "train")
    for part in ("train", "test"):
        write_class_folders(tmp_path / "two" / part, NAMES, range(10))
    shutil.rmtree(tmp_path / "two/test/bee")
    assert counts(prepared(tmp_path / "two", val_share=0.2)) == [of_each(8), of_each(2), {0: 10, 2: 10}]


def test_a_split_file_says_which_images_are_which(tmp_path):
    write_class_folders(tmp_path, NAMES, range(3))
    parts = {
        p: [[f"{name}/image_000{i}.jpg", k, name] for k, name in enumerate(NAMES)]
        for i, p in enumerate(("train", "val", "test"), 1)
    }
    (tmp_path / "split.json").write_text(json.dumps(parts))
    data = prepared(tmp_path, split_file=str(tmp_path / "split.json"))
    assert [contents(data, part) for part in parts] == [[(k, i) for k in range(3)] for i in range(3)]
    parts["test"] = []
    (tmp_path / "split.json").write_text(json.dumps(parts))
    with pytest.raises(SettingError, match=r"data.split_file = .* has no images to test with. List some as test."):
        prepared(tmp_path, "test", split_file=str(tmp_path / "split.json"))


TREES = {
    "flat": ("ant/a.jpg", "bee/a.jpg"),
    "empty": (".git/config",),
    "one class": ("ant/a.jpg",),
    "one folder too high": ("images/ant/a.jpg", "images/bee/a.jpg"),
    "no train": ("val/ant/a.jpg", "test/ant/a.jpg"),
    "capitals": ("Train/ant/a.jpg", "Test/ant/a.jpg"),
    "valid": ("train/ant/a.jpg", "train/bee/a.jpg", "valid/ant/a.jpg"),
    "unknown class": ("train/ant/a.jpg", "train/bee/a.jpg", "test/cow/a.jpg"),
    "files": ("train/a.jpg", "train/b.jpg"),
    "no images": ("ant/a.jpg", "bee/readme.md"),
    "val": ("train/ant/a.jpg", "train/bee/a.jpg", "val/ant/a.jpg"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("tree", "settings", "message"),
    [
        ("gone", {}, r"data.root = .*: has no folder of that name. Lay it out as train/CLASS"),
        ("empty", {}, "has no class folders in empty/. Lay it out as train/CLASS"),
        ("one class", {}, "one class/ has one class alone, ant/. Lay it out"),
        ("one folder too high", {}, r"has one class alone, images/. Give .*/one folder too high/images as the root."),
        ("no train", {}, "has a folder val/, but no folder train/. Lay it out"),
        ("capitals", {}, "Test/ is not the name of a part. Rename it test/."),
        ("valid", {}, "valid/ is not the name of a part. Rename it val/."),
        ("files", {}, "files/ has one class alone, train/. Lay it out"),
        ("unknown class", {}, "test/ has folders of no class, cow"),
        ("no images", {}, r"has no images of bee. Lay it out"),
        ("flat", {}, r"data.test_share = 0.3: .* cannot be taken evenly .* every class needs an image for each"),
        ("val", {"val_share": 0.1}, "data.val_share = 0.1: has no effect: .*/val has a folder val/. Leave it out."),
        ("flat", {"test_share": 0.1, "split_file": "x"}, "data.test_share = 0.1: has no effect: the split_file says"),
        ("flat", {"val_share": 0.5, "test_share": 0.5}, "data.test_share = 0.5: leaves no images to train on"),
        ("flat", {"predict_root": "gone"}, "data.predict_root = 'gone': is not a folder. Give a folder of images."),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named_with_its_remedy(tree, settings, message, tmp_path):
    for name in TREES.get(tree, ()):
        write(tmp_path / tree / name, photo(0, 0))
    with pytest.raises(SettingError, match=message):
        prepared(tmp_path / tree, **settings)


WRONG = {
    "must be a path": {"root": 3, "split_file": 0.5, "predict_root": True},
    "must be a whole number": {
        "image_size": 2.5, "batch_size": "8", "num_workers": 0.5, "images_per_class": None,
    },
    "must be 0 or more": {"mixup_alpha": "a", "cutmix_alpha": -1},
    "is not in 0 to 1": {"val_share": "a", "test_share": float("nan")},
    "is not a seed": {"split_seed": 1.5},
    "must be true or false": {"allow_missing": "no", "augment": 1},
    "is not a RandAugmentSettings": {"rand_augment": "strong"},
    "is not one of the choices": {"normalization": 2},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "problem"), [(n, v, problem) for problem, given in WRONG.items() for n, v in given.items()]
)
def test_values_of_other_types_are_named(name, value, problem, tmp_path):
    write_class_folders(tmp_path, NAMES, range(4))
    with pytest.raises(SettingError, match=re.escape(f"data.{name} = {value!r}: {problem}")):
        prepared(**{"root": tmp_path, name: value} if name != "root" else {"root": value})


def test_a_path_and_a_whole_number_are_as_good(tmp_path):
    write_class_folders(tmp_path, NAMES, range(4))
    data = ImageFolderDataModule(
        root=tmp_path, image_size=8, normalization="inception", mixup_alpha=1, val_share=0.25, test_share=0.25,
    )  # type: ignore[arg-type]  # fmt: skip
    data.setup("fit")
    _, targets = next(iter(data.train_dataloader()))
    assert targets.sum(1).allclose(torch.ones(6))
    assert data.root == str(tmp_path)


@pytest.mark.parametrize(
    ("stage", "share", "verb"),
    [("test", "test_share", "test"), ("predict", "test_share", "test"), ("validate", "val_share", "validate")],
)
def test_a_share_of_zero_is_the_cause_where_there_is_nothing_to_test(stage, share, verb, tmp_path):
    write_class_folders(tmp_path, NAMES, range(4))
    with pytest.raises(SettingError) as caught:
        prepared(tmp_path, stage, **{"val_share": 0.25, "test_share": 0.25, share: 0.0})
    assert str(caught.value) == (
        f"data.{share} = 0.0: has no images to {verb} with. Set it above 0 to split some off the others."
    )


def test_size_and_statistics_are_those_of_the_model(tmp_path):
    write_class_folders(tmp_path, NAMES, range(10))
    config = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.6, 0.7), "input_size": (3, 32, 32)}
    backbone = SimpleNamespace(pretrained_cfg=config)
    data = ImageFolderDataModule(root=str(tmp_path))
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(backbone=backbone))  # type: ignore[assignment]
    data.setup("fit")
    image, label = data.train_set[0]
    assert image.shape == (3, 32, 32)
    assert told(data, image[None])[0][0] == int(label)  # the colour is the class's after 0.1, 0.2, ... are undone
    assert (data.mean, data.std) == (config["mean"], config["std"])
    backbone.patch_embed = SimpleNamespace(img_size=(16, 16))
    data.setup("fit")
    assert data.train_set[0][0].shape == (3, 16, 16)
    assert prepared(tmp_path, image_size=0).image_size == 224  # no model to ask


def test_the_command_line_trains_on_a_folder_and_writes_what_it_predicts_for_another(tmp_path, monkeypatch):
    write_class_folders(tmp_path / "data", NAMES, range(10))
    names = ("b.png", "deep/a.JPG", "a.jpg", ".hidden.jpg", ".cache/c.jpg", "notes.txt", "dir.jpg/x.jpeg")
    for i, name in enumerate(names):
        write(tmp_path / "new" / name, photo(i % 3, 0))
    monkeypatch.chdir(tmp_path)
    given = {"root": "data", "image_size": 0}
    command("fit", tmp_path, "ImageFolder", **given, batch_size=8)
    checkpoint = str(next(tmp_path.rglob("*.ckpt")))
    command("predict", tmp_path, "ImageFolder", "--ckpt_path", checkpoint, **given, predict_root="new", batch_size=3)
    with next(tmp_path.rglob("predictions.csv")).open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["new/a.jpg", "new/b.png", "new/deep/a.JPG", "new/dir.jpg/x.jpeg"]
    assert {row["class"] for row in rows} <= {*NAMES}
    weights = torch.load(checkpoint, weights_only=True)
    assert weights["class_names"] == list(NAMES)
    assert weights["state_dict"]["backbone.head.weight"].shape == (3, 16)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ((), SettingError, "data.predict_root = .*: has no images. Give a folder of images."),
        (("a.txt", ".b.jpg"), SettingError, "has no images"),
        (("a.jpg",), DamagedImageError, "a.jpg is empty. Put the original in its place."),
    ],
)
def test_a_folder_to_predict_without_readable_images_is_refused(names, error, message, tmp_path):
    write_class_folders(tmp_path / "data", NAMES, range(10))
    (tmp_path / "new").mkdir()
    for name in names:
        (tmp_path / "new" / name).touch()
    data = prepared(tmp_path / "data", predict_root=str(tmp_path / "new"))  # other stages do not look at it
    with pytest.raises(error, match=message):
        data.setup("predict")


def test_a_head_may_have_classes_to_spare(tmp_path, monkeypatch):
    write_class_folders(tmp_path / "data", NAMES, range(10))
    monkeypatch.chdir(tmp_path)
    extra = ("--model.num_classes", "5")
    command("fit", tmp_path, "ImageFolder", *extra, root="data")
    checkpoint = str(next(tmp_path.rglob("*.ckpt")))
    assert torch.load(checkpoint, weights_only=True)["state_dict"]["backbone.head.weight"].shape == (5, 16)
    command("test", tmp_path, "ImageFolder", *extra, "--ckpt_path", checkpoint, root="data")
    with next(tmp_path.rglob("class_accuracy.csv")).open() as file:
        table = [(row["class"], row["images"]) for row in csv.DictReader(file)]
    assert table == [("ant", "3"), ("bee", "3"), ("cat", "3"), ("3", "0"), ("4", "0")]


def test_uc_merced(shared_data, tmp_path):
    shutil.unpack_archive(shared_data("data/ucmerced_128.tar"), tmp_path)
    root = next(folder for folder in (tmp_path, *tmp_path.rglob("*/")) if (folder / "agricultural").is_dir())
    data = prepared(root)
    assert len(data.class_names) == 21
    assert data.class_names[:2] == ("agricultural", "airplane")
    assert [len(part) for part in (data.train_set, data.val_set, data.test_set)] == [1050, 420, 630]
    for part, number in ((data.train_set, 50), (data.val_set, 20), (data.test_set, 30)):
        assert part.labels.bincount().tolist() == [number] * 21
        assert all(Path(f).parent.name == data.class_names[k] for f, k in zip(part.files, part.labels, strict=True))
