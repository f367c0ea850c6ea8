"""What real folders hold beside good images: each a clear error, or tolerated as the documentation says."""

import json
import shutil
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from flops_lightning.datamodules import files, photos
from flops_lightning.datamodules.files import read_photo
from flops_lightning.errors import DamagedImageError, SettingError
from tests.datamodules.photo_folders import DISHES, KINDS, WNIDS, command, contents, write

IMAGENET_FILE = f"train/{WNIDS[1]}/image_0003.jpg"
FILES = {
    "imagenet": IMAGENET_FILE,
    "caltech101": "caltech101/101_ObjectCategories/anchor/image_0002.jpg",
    "eurosat": "eurosat/2750/River/image_0004.jpg",
    "food101": "food-101/images/waffles/image_0005.jpg",
    "flowers102": "flowers-102/jpg/image_00007.jpg",
}


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def detailed(file: Path) -> None:
    """Noise in place of one colour, so that what is cut off is seen to be missing."""
    write(file, Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)))


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    return KINDS["imagenet"].write(tmp_path)


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        *((name, lambda file: file.write_bytes(b""), "is empty. Put the original in its place.") for name in KINDS),
        ("imagenet", cut, "cannot be read (image file is truncated"),
        ("imagenet", lambda file: file.write_text("<html>"), "is not an image."),
    ],
)
def test_a_damaged_file_is_found_before_training_and_named(name, damage, problem, tmp_path):
    file = KINDS[name].write(tmp_path) / FILES[name]
    detailed(file)
    damage(file)
    with pytest.raises(DamagedImageError) as caught:
        KINDS[name].prepared(tmp_path)
    assert str(caught.value).startswith(f"{file} {problem}")


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("part", ["train", "test"])
def test_a_file_damaged_later_stops_the_run_with_one_line_that_names_it(part, num_workers, imagenet):
    data = KINDS["imagenet"].prepared(imagenet, num_workers=num_workers, batch_size=4)
    file = Path(getattr(data, f"{part}_set").files[5])
    detailed(file)
    cut(file)
    with pytest.raises(DamagedImageError) as caught:
        list(getattr(data, f"{part}_dataloader")())
    message = str(caught.value)
    assert message.startswith(f"{file} cannot be read (image file is truncated")
    assert message.endswith(". Put the original in its place.")
    assert "\n" not in message


@pytest.mark.slow
def test_an_image_that_would_fill_the_memory_is_named(imagenet, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # more than twice as many are an error of PIL
    with pytest.raises(DamagedImageError, match=r"image_000.\.jpg is too large to be decoded \(Image size"):
        KINDS["imagenet"].prepared(imagenet)


def converted(tmp_path: Path, image: Image.Image, **options) -> np.ndarray:
    image.save(tmp_path / "image.png", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return np.array(read_photo(tmp_path / "image.png"))


def test_modes_of_images_are_converted_to_red_green_and_blue(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    grey, alpha = colours[..., 0], colours[..., 1]
    repeated = np.repeat(grey[..., None], 3, 2)
    rgba = np.concatenate([colours, alpha[..., None]], 2)
    np.testing.assert_array_equal(converted(tmp_path, Image.fromarray(rgba)), colours)
    np.testing.assert_array_equal(converted(tmp_path, Image.fromarray(grey)), repeated)
    with_alpha = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    np.testing.assert_array_equal(converted(tmp_path, with_alpha), repeated)
    np.testing.assert_array_equal(converted(tmp_path, Image.fromarray(grey > 99)), np.where(repeated > 99, 255, 0))
    palette = Image.frombytes("P", (7, 6), bytes(range(42)))
    palette.putpalette(colours.tobytes())
    np.testing.assert_array_equal(converted(tmp_path, palette), colours)
    np.testing.assert_array_equal(converted(tmp_path, palette, transparency=bytes(range(42))), colours)


def test_cmyk_is_converted_to_red_green_and_blue(tmp_path):
    cyan, magenta, yellow, black = 40, 90, 160, 50
    Image.new("CMYK", (16, 16), (cyan, magenta, yellow, black)).save(tmp_path / "image.jpg", quality=100)
    expected = [(255 - ink) * (255 - black) / 255 for ink in (cyan, magenta, yellow)]
    assert np.abs(np.array(read_photo(tmp_path / "image.jpg")) - expected).max() <= 2


def test_of_16_bits_the_upper_8_are_kept(tmp_path):
    grey = np.array([[0, 255, 256, 32767], [32768, 40000, 65279, 65535]], dtype=np.uint16)
    for name in ("image.png", "image.tiff"):
        Image.fromarray(grey).save(tmp_path / name)
        np.testing.assert_array_equal(np.array(read_photo(tmp_path / name)), np.repeat((grey // 256)[..., None], 3, 2))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_are_refused(dtype, tmp_path):
    Image.fromarray(np.ones((2, 2), dtype=dtype)).save(tmp_path / "image.tiff")
    with pytest.raises(DamagedImageError, match=r"image\.tiff cannot be read \(pixels of 32 bits; convert it to 8\)"):
        read_photo(tmp_path / "image.tiff")


@pytest.mark.parametrize("name", ["image.tif", "image.jpg"])
def test_a_tiff_of_thirteen_bands_is_not_called_damaged(name, tmp_path):
    """One pixel of 13 values of 16 bits, like the multispectral EuroSAT."""
    tags = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8)]
    tags += [(277, 3, 1, 13), (278, 3, 1, 1), (279, 4, 1, 26)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    (tmp_path / name).write_bytes(b"II*\0" + struct.pack("<I", 8 + 26) + bytes(26) + directory)
    with pytest.raises(DamagedImageError, match=r"does not read \(of 13 bands, for example\). Convert it to RGB."):
        read_photo(tmp_path / name)


@pytest.mark.parametrize("name", ["imagenet", "eurosat"])
def test_hidden_files_and_folders_are_no_images(name, tmp_path):
    file = KINDS[name].write(tmp_path) / FILES[name]
    for copy in (
        file.parent.parent / ".ipynb_checkpoints" / file.name,
        file.parent / ".ipynb_checkpoints" / file.name,
        file.parent / f"._{file.name}",
    ):
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(file, copy)
    data = KINDS[name].prepared(tmp_path)
    found = contents(data, "train") + contents(data, "val") + contents(data, "test")
    assert sorted(found) == KINDS[name].all_images


@pytest.mark.parametrize(
    ("name", "folder", "renamed", "problem"),
    [
        ("imagenet", f"val/{WNIDS[2]}", "val/n9", f"val/ has folders of no class, n9; it lacks {WNIDS[2]}."),
        ("imagenet", f"train/{WNIDS[2]}", "n01484850", f"val/ has folders of no class, {WNIDS[2]}."),
        ("imagenet", f"val/{WNIDS[2]}", "n01484850", f"val/ lacks {WNIDS[2]}."),
        ("eurosat", "eurosat/2750/River", "River", "eurosat/2750/ lacks River."),
    ],
)  # fmt: skip
def test_a_class_folder_of_another_name_is_refused(name, folder, renamed, problem, tmp_path):
    KINDS[name].write(tmp_path)
    (tmp_path / folder).rename(tmp_path / renamed)
    with pytest.raises(SettingError) as caught:
        KINDS[name].prepared(tmp_path)
    assert caught.value.setting == "data.root"
    assert caught.value.problem.endswith(problem)


@pytest.mark.parametrize("name", ["imagenet", "caltech101", "eurosat"])
def test_an_empty_class_folder_is_refused_or_left_out_if_allowed(name, tmp_path):
    folder = (KINDS[name].write(tmp_path) / FILES[name]).parent
    label = [*KINDS[name].prepared(tmp_path).class_names].index(folder.name)
    for file in folder.iterdir():
        file.unlink()
    with pytest.raises(SettingError, match=rf"has no images of {folder.name}\."):
        KINDS[name].prepared(tmp_path)
    held = {"val_images": 6} if name == "imagenet" else {}
    with pytest.warns(UserWarning, match=rf"1 of {KINDS[name].classes} classes have no training image"):
        data = KINDS[name].prepared(tmp_path, allow_missing=True, **held)
    assert {found for found, _ in contents(data, "train")} == {*range(KINDS[name].classes)} - {label}
    assert data.num_classes == KINDS[name].classes


@pytest.mark.parametrize("name", KINDS)
def test_an_empty_root_and_none_are_refused_before_anything_is_built(name, tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SettingError, match=r"data\.root = '.*': has no folder .*/\. Put ") as caught:
            KINDS[name].module(root=str(root))
        assert caught.value.value == str(root)


@pytest.mark.parametrize(
    ("folder", "problem"),
    [("train", "has no class folders in train/"), ("train/cat", "train/ has cat/, which is not a WordNet id")],
)
def test_class_folders_of_something_else_are_not_imagenet(folder, problem, tmp_path):
    (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(SettingError, match=problem):
        KINDS["imagenet"].module(root=str(tmp_path))


def test_a_class_of_one_image_is_refused_where_a_split_needs_more(tmp_path):
    folder = (KINDS["eurosat"].write(tmp_path) / FILES["eurosat"]).parent
    for file in sorted(folder.iterdir())[1:]:
        file.unlink()
    with pytest.raises(SettingError) as caught:
        KINDS["eurosat"].prepared(tmp_path)
    assert (caught.value.setting, caught.value.value) == ("data.test_share", 0.3)
    assert "River has one." in caught.value.problem
    assert caught.value.remedy.startswith("Use another share, or 0, or a split_file; every class needs an image for ")
    data = KINDS["eurosat"].prepared(tmp_path, val_share=0.0, test_share=0.0)
    assert contents(data, "train").count((8, 0)) == 1
    assert len(data.train_set) == 91


def test_a_class_of_one_training_image_trains_where_none_is_held_out(imagenet):
    for file in sorted((imagenet / "train" / WNIDS[3]).iterdir())[1:]:
        file.unlink()
    with pytest.raises(SettingError, match=rf"data\.val_images = 8: .* {WNIDS[3]} has one\. Use 0, or add images"):
        KINDS["imagenet"].prepared(imagenet)
    data = KINDS["imagenet"].prepared(imagenet, val_images=0)
    assert data.train_set.labels.bincount().tolist() == [6, 6, 6, 1]


@pytest.mark.parametrize("name", ["food101", "flowers102"])
def test_a_listed_image_that_is_missing_is_named_or_left_out_if_allowed(name, tmp_path):
    kind = KINDS[name]
    file = kind.write(tmp_path) / FILES[name]
    file.unlink()
    with pytest.raises(SettingError) as caught:
        kind.prepared(tmp_path)
    assert caught.value.problem == f"1 listed images are missing, the first is {file}."
    assert caught.value.remedy.endswith("data.allow_missing: true goes on without them.")
    with pytest.warns(UserWarning, match="1 listed images are missing"):
        data = kind.prepared(tmp_path, allow_missing=True)
    left = contents(data, "train") + contents(data, "val") + contents(data, "test")
    assert {*kind.all_images} - {*left} == {(2, 4) if name == "food101" else (6, 0)}
    assert len(left) == len(kind.all_images) - 1


def sets(train: int, test: int) -> dict[str, np.ndarray]:
    return {"trnid": np.array([[train]]), "valid": np.array([[2]]), "tstid": np.array([[test]])}


TWICE = json.dumps({name: [f"{name}/image_0006"] for name in DISHES}).encode()  # these train


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("food-101/meta/train.json", None, "has no {path}"),
        ("food-101/meta/test.json", None, "has no {path}"),
        ("food-101/meta/train.json", b'{"apple_pie": [', "has a damaged {path}"),
        ("food-101/meta/test.json", b"[1, 2]", "has a damaged {path}"),
        ("food-101/meta/test.json", b'{"ramen": []}', "meta/test.json has the class 'ramen', train.json"),
        ("food-101/meta/test.json", TWICE, "its lists have {root}/images/apple_pie/image_0006.jpg more than once"),
        ("flowers-102/imagelabels.mat", None, "has no {path}"),
        ("flowers-102/setid.mat", b"half of a file" * 20, "has a damaged {path}"),
        ("flowers-102/imagelabels.mat", {"labels": np.array([[1, 2, 103]])}, "has lists of another data set"),
        ("flowers-102/imagelabels.mat", {"labels": np.zeros((1, 408), dtype=int)}, "has lists of another data set"),
        ("flowers-102/setid.mat", sets(1, 409), "has lists of another data set"),
        ("flowers-102/setid.mat", sets(0, 3), "has lists of another data set"),
    ],
)  # fmt: skip
def test_lists_that_are_missing_damaged_or_wrong_are_named(file, content, problem, tmp_path):
    kind = KINDS["food101" if "food" in file else "flowers102"]
    path = kind.write(tmp_path) / file
    if content is None:
        path.unlink()
    else:
        savemat(path, content) if isinstance(content, dict) else path.write_bytes(content)
    with pytest.raises(SettingError) as caught:
        kind.prepared(tmp_path)
    assert caught.value.setting == "data.root"
    assert caught.value.problem.startswith(problem.format(path=path, root=tmp_path / "food-101"))
    assert "data.download: true" in caught.value.remedy


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "is not a file."),
        ("{", "is not a split (JSONDecodeError: "),
        ('{"train": []}', "is not a split (KeyError: "),
        ('{"train": [["a.jpg", 0]], "val": [], "test": []}', "is not a split (ValueError: "),
        ('{"train": [["a.jpg", 1, "one"]], "val": [], "test": []}', "has labels that do not run from 0 on."),
    ],
)
def test_a_split_file_of_another_form_is_refused_before_anything_is_built(content, problem, tmp_path):
    file = tmp_path / "split.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SettingError) as caught:
        KINDS["eurosat"].module(root=str(tmp_path), download=True, split_file=str(file))
    assert (caught.value.setting, caught.value.value) == ("data.split_file", str(file))
    assert caught.value.problem.startswith(problem)


@pytest.mark.parametrize(
    ("stage", "lacking", "problem"),
    [("fit", "train", "train"), ("validate", "train", "validate"), ("test", "val", "test"), ("predict", "val", "test")],
)
def test_a_stage_without_images_is_refused(stage, lacking, problem, imagenet):
    shutil.rmtree(imagenet / lacking)
    with pytest.raises(SettingError) as caught:
        KINDS["imagenet"].prepared(imagenet, stage)
    assert (caught.value.setting, caught.value.value) == ("data.root", str(imagenet))
    assert caught.value.problem == f"has no images to {problem} with."
    assert "train/WNID/*.JPEG and val/WNID/*.JPEG" in caught.value.remedy
    other = KINDS["imagenet"].prepared(imagenet, "test" if lacking == "train" else "fit")
    assert [len(other.train_set), len(other.test_set)] == ([0, 8] if lacking == "train" else [16, 0])


def settings(folder: Path) -> dict[str, Any]:
    return {"root": str(folder / "data"), "val_images": 8, "batch_size": 8}


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("name", ["fit", "plan", "tune", "validate", "test", "predict"])
def test_the_command_line_looks_at_the_folder_before_it_begins(name, tmp_path, monkeypatch, capsys):
    file = KINDS["imagenet"].write(tmp_path / "data") / IMAGENET_FILE
    file.write_bytes(b"")
    monkeypatch.setattr(photos.PhotoDataModule, "setup", lambda *_: pytest.fail("the Trainer has begun"))
    with pytest.raises(SystemExit) as leaving:
        command(name, tmp_path, "ImageNet", **settings(tmp_path))
    assert leaving.value.code == 2
    assert last_line(capsys) == f"error: {file} is empty. Put the original in its place."
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_command_line_ends_with_one_line_where_a_damaged_file_is_met(num_workers, tmp_path, monkeypatch, capsys):
    file = KINDS["imagenet"].write(tmp_path / "data") / IMAGENET_FILE
    detailed(file)
    cut(file)
    monkeypatch.setattr(files, "READ_AT_START", 1)
    with pytest.raises(SystemExit) as leaving:
        command("fit", tmp_path, "ImageNet", **settings(tmp_path), num_workers=num_workers)
    assert leaving.value.code == 2
    assert last_line(capsys).startswith(f"error: {file} cannot be read (image file is truncated")


def test_the_command_line_trains_and_tests_on_images_on_disk(tmp_path, capsys):
    root = KINDS["imagenet"].write(tmp_path / "data")
    command("fit", tmp_path, "ImageNet", **settings(tmp_path), augment=True, num_workers=1)
    shutil.rmtree(root / "train")
    command("test", tmp_path, "ImageNet", "--ckpt_path", str(next(tmp_path.rglob("*.ckpt"))), **settings(tmp_path))
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        command("fit", tmp_path, "ImageNet", **settings(tmp_path))
    assert leaving.value.code == 2
    assert last_line(capsys).startswith(
        f"error: data.root = '{root}': has no images to train with. Put the images there"
    )


@pytest.mark.parametrize("name", ["Caltech101", "EuroSAT", "Food101", "Flowers102", "ImageNet"])
def test_the_command_line_knows_the_settings_of_every_data_set(name, tmp_path, capsys):
    for wrong, message in (({"imagesize": 16}, "Did you mean `image_size`?"), ({"download": "sometimes"}, "sometimes")):
        with pytest.raises(SystemExit) as leaving:
            command("fit", tmp_path, name, **wrong)
        assert leaving.value.code == 2
        assert message in last_line(capsys)
