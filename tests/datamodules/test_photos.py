import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import Caltech101, EuroSAT, Food101

from flops_lightning.datamodules.augmentation import RandAugmentSettings
from flops_lightning.errors import SettingError
from flops_lightning.strategies import Backprop
from flops_lightning.tasks import ForwardImageClassifier
from tests.datamodules.photo_folders import KINDS, QUARTERS, WNIDS, contents, photo, write

PARTS = ("train", "val", "test")
STANDARD_TEST = {"imagenet": {6, 7}, "food101": {6, 7}, "flowers102": {2, 3}}  # numbers of the images that are tested
TINY = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}


@pytest.fixture(scope="module")
def roots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: kind.write(tmp_path_factory.mktemp(name)) for name, kind in KINDS.items()}


def labelled_files(data) -> Counter[tuple[str, int]]:
    """Every image of the three parts, by its path and label."""
    sets = [getattr(data, f"{part}_set") for part in PARTS]
    return Counter(
        (str(file), int(label)) for part in sets for file, label in zip(part.files, part.labels, strict=True)
    )


def write_everywhere(root: Path, pixels: Callable[[int], np.ndarray]) -> None:
    """The same four images in every class of EuroSAT."""
    for name in KINDS["eurosat"].module.class_names:
        for number in range(4):
            write(root / "eurosat" / "2750" / name / f"{number}.jpg", Image.fromarray(pixels(number)))


@pytest.mark.parametrize("name", KINDS)
def test_every_image_is_in_one_part_with_its_label_and_each_class_keeps_its_share(name, roots):
    kind = KINDS[name]
    data = kind.prepared(roots[name])
    found = {part: contents(data, part) for part in PARTS}
    assert sorted(pair for part in PARTS for pair in found[part]) == kind.all_images
    for part, of_each in zip(PARTS, kind.of_each, strict=True):
        assert Counter(label for label, _ in found[part]) == dict.fromkeys(range(kind.classes), of_each)
    assert (data.num_classes, len(data.class_names)) == (kind.classes, kind.classes)
    assert {number for _, number in found["test"]} == STANDARD_TEST.get(name, {number for _, number in found["test"]})


@pytest.mark.parametrize("name", ["imagenet", "eurosat"])  # by numbers and by shares
def test_the_split_depends_on_its_own_seed_only(name, roots):
    seed_everything(1)
    first = KINDS[name].prepared(roots[name])
    seed_everything(2)
    again, other = KINDS[name].prepared(roots[name]), KINDS[name].prepared(roots[name], split_seed=1)
    for part in PARTS:
        assert contents(first, part) == contents(again, part)
    assert set(contents(first, "val")) != set(contents(other, "val"))


@pytest.mark.parametrize("name", ["imagenet", "eurosat", "flowers102"])
def test_fewer_images_of_each_class_are_part_of_more_and_leave_the_other_parts_alone(name, roots):
    kind = KINDS[name]
    most = kind.of_each[0]
    runs = [kind.prepared(roots[name], images_per_class=n) for n in range(most + 1)]
    everything, *fewer = ({part: set(contents(data, part)) for part in PARTS} for data in runs)
    assert fewer[-1] == everything
    for n, (less, more) in enumerate(zip(fewer, [*fewer[1:], everything], strict=True), 1):
        assert less["train"] <= more["train"]
        assert len(less["train"]) == n * kind.classes
        assert (less["val"], less["test"]) == (everything["val"], everything["test"])
        assert runs[n].train_set.labels.bincount().tolist() == [n] * kind.classes
    with pytest.raises(SettingError, match=rf"data\.images_per_class = {most + 1}: .* has {most} training images"):
        kind.prepared(roots[name], images_per_class=most + 1)


@pytest.mark.parametrize(("name", "shots", "val"), [("imagenet", 2, 1), ("eurosat", 4, 1), ("flowers102", 1, 1)])
def test_a_few_validation_images_of_each_class_are_none_that_train_or_test_and_seeds_draw_others(
    name, shots, val, roots
):
    kind, few = KINDS[name], {"images_per_class": shots, "val_images_per_class": val}
    drawn = []
    for seed in (1, 2, 3):
        whole, data = (kind.prepared(roots[name], split_seed=seed, **settings) for settings in ({}, few))
        assert data.train_set.labels.bincount().tolist() == [shots] * kind.classes
        assert data.val_set.labels.bincount().tolist() == [val] * kind.classes
        for part in PARTS:
            assert set(contents(data, part)) <= set(contents(whole, part))
        assert contents(data, "test") == contents(whole, "test")
        drawn.append((contents(data, "train"), contents(data, "val")))
    assert (drawn[0] != drawn[1] != drawn[2]) == (name != "flowers102")  # it has one image of each
    most = kind.of_each[1]
    with pytest.raises(
        SettingError, match=rf"data.val_images_per_class = {most + 1}: .* has {most} validation images\. Use"
    ):
        kind.prepared(roots[name], val_images_per_class=most + 1)


def test_without_a_validation_part_none_can_be_chosen_from_it(roots, tmp_path):
    with pytest.raises(
        SettingError, match=r"data.val_images_per_class = 1: n\d+ has 0 validation images\. .*off with val_images\."
    ):
        KINDS["imagenet"].prepared(roots["imagenet"], val_images=0, val_images_per_class=1)
    (tmp_path / "val").symlink_to(roots["imagenet"] / "val")  # nothing but images to test
    data = KINDS["imagenet"].prepared(tmp_path, "test", images_per_class=1, val_images_per_class=1)
    assert len(data.test_set) == 2 * len(WNIDS)


def test_classes_with_fewer_images_are_counted_where_images_may_be_missing(roots, tmp_path):
    listed = {"train": [[f"AnnualCrop/image_000{i}.jpg", 0, "farm"] for i in (1, 2, 3)], "test": []}
    listed["train"] += [["Forest/image_0001.jpg", 1, "wood"], ["Forest/gone.jpg", 1, "wood"]]
    listed["val"] = [["Forest/image_0002.jpg", 1, "wood"]]
    file = tmp_path / "split.json"
    file.write_text(json.dumps(listed))
    few = {"split_file": str(file), "images_per_class": 2, "val_images_per_class": 4, "allow_missing": True}
    with pytest.warns(UserWarning, match="per_class") as warned:
        data = KINDS["eurosat"].prepared(roots["eurosat"], **few)
    assert [str(each.message) for each in warned if "per_class" in str(each.message)] == [
        "data.images_per_class = 2: 1 of 2 classes have fewer images, wood has 1 training images. 3 training images "
        "are used in the place of 4.",
        "data.val_images_per_class = 4: 2 of 2 classes have fewer images, farm has 0 validation images. 1 validation "
        "images are used in the place of 8.",
    ]
    assert data.train_set.labels.tolist() == [0, 0, 1]
    assert data.val_set.labels.tolist() == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_share": -0.1}, r"data\.val_share = -0.1: is not in 0 to 1\. Give a share of the images, as 0.2"),
        ({"test_share": 1.0}, r"data\.test_share = 1.0: is not in 0 to 1\."),
        (
            {"val_share": 0.5, "test_share": 0.5},
            r"data\.test_share = 0.5: leaves no images to train on beside val_share",
        ),
    ],
)
def test_shares_without_sense_are_refused(settings, message, roots):
    with pytest.raises(SettingError, match=message):
        KINDS["eurosat"].module(root=str(roots["eurosat"]), **settings)


def test_classes_of_different_sizes_keep_their_shares(tmp_path):
    names = KINDS["eurosat"].module.class_names
    for label, name in enumerate(names):
        for number in range(10 * (1 + label % 3)):
            write(tmp_path / "eurosat" / "2750" / name / f"{number:02}.jpg", photo(label, number % 10))
    data = KINDS["eurosat"].prepared(tmp_path)
    for part, of_ten in zip(PARTS, (5, 2, 3), strict=True):
        counts = getattr(data, f"{part}_set").labels.bincount().tolist()
        assert counts == [of_ten * (1 + label % 3) for label in range(10)]


@pytest.mark.parametrize("name", KINDS)
def test_the_sets_name_their_files_in_the_order_of_their_images(name, roots):
    data = KINDS[name].prepared(roots[name], images_per_class=1)
    for part in PARTS:
        for file, (label, number) in zip(getattr(data, f"{part}_set").files, contents(data, part), strict=True):
            with Image.open(file) as image:
                error = np.array(image).astype(int) - np.array(photo(label, number))
            assert abs(error).max() <= 4
    assert [*data.val_set.files] == sorted(data.val_set.files)


def test_a_split_file_says_what_trains_validates_and_tests(roots, tmp_path):
    listed = {
        "train": [["AnnualCrop/image_0003.jpg", 0, "farm"], ["Forest/image_0001.jpg", 1, "wood"]],
        "val": [["Forest/image_0002.jpg", 1, "wood"]],
        "test": [["AnnualCrop/image_0001.jpg", 0, "farm"], ["Forest/image_0009.jpg", 1, "wood"]],
    }
    file = tmp_path / "split.json"
    file.write_text(json.dumps(listed))
    data = KINDS["eurosat"].prepared(roots["eurosat"], split_file=str(file))
    not_fetched_yet = KINDS["caltech101"].module(root=str(tmp_path), download=True, split_file=str(file))
    assert data.class_names == not_fetched_yet.class_names == ("farm", "wood")
    expected = {"train": [(0, 2), (1, 0)], "val": [(1, 1)], "test": [(0, 0), (1, 8)]}
    assert {part: contents(data, part) for part in PARTS} == expected


@pytest.mark.parametrize(
    ("model_name", "mean", "std"),
    [
        ("vit_tiny_patch16_224", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("deit_tiny_patch16_224", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ],
)
def test_the_backbone_says_how_pixels_are_normalised(model_name, mean, std, roots, tmp_path):
    data = KINDS["imagenet"].module(root=str(roots["imagenet"]), val_images=8, image_size=8)
    task = ForwardImageClassifier(model_name=model_name, model_kwargs=TINY, num_classes=4, strategy=Backprop())
    Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path, fast_dev_run=1).test(
        task, datamodule=data, verbose=False
    )
    assert (data.mean, data.std) == (mean, std)


@pytest.mark.parametrize(
    ("name", "classes", "remedy"),
    [
        ("caltech101", 101, "caltech101/101_ObjectCategories"), ("eurosat", 10, "eurosat/2750"),
        ("food101", 101, "food-101"), ("flowers102", 102, "flowers-102"),
    ],
)  # fmt: skip
def test_what_is_to_be_fetched_has_its_classes_and_needs_a_connection(name, classes, remedy, tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("no connection")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    (tmp_path / "food-101" / "images").mkdir(parents=True)  # a download that was broken off
    data = KINDS[name].module(root=str(tmp_path), download=True)
    assert data.num_classes == classes
    with pytest.raises(SettingError) as caught:
        data.prepare_data()
    assert caught.value.setting == "data.download"
    assert re.search(
        rf"no connection.*Check the connection\. Put.*{remedy}, or remove what is there", str(caught.value)
    )


def test_imagenet_cannot_be_fetched(tmp_path):
    with pytest.raises(SettingError) as caught:
        KINDS["imagenet"].module(root=str(tmp_path), download=True)
    assert (caught.value.setting, caught.value.problem) == ("data.download", "ImageNet takes an account to fetch.")
    assert "data/README.md" in caught.value.remedy


def test_the_documentation_sorts_the_validation_images_of_imagenet(tmp_path, monkeypatch):
    readme = (Path(__file__).parents[2] / "data" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    root = tmp_path / "data" / "downloads" / "imagenet"
    kit = root / "ILSVRC2012_devkit_t12" / "data"
    kit.mkdir(parents=True)
    ids = {1: WNIDS[2], 2: WNIDS[0], 3: WNIDS[3], 4: WNIDS[1]}  # not in the order of the names, as in the real kit
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    synsets = np.array([(number, wnid, "fish, tuna") for number, wnid in ids.items()], dtype=kinds)
    savemat(kit / "meta.mat", {"synsets": synsets[:, None]})
    answers = [3, 1, 4, 2, 2, 1, 3, 4]
    (kit / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{answer}\n" for answer in answers))
    for number, answer in enumerate(answers):
        write(root / "val" / f"ILSVRC2012_val_{number + 1:08}.JPEG", photo(WNIDS.index(ids[answer]), number))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # a second time changes nothing
        exec(code, {})
    data = KINDS["imagenet"].prepared(root, "test")
    assert sorted(contents(data, "test")) == sorted((WNIDS.index(ids[a]), number) for number, a in enumerate(answers))


@pytest.mark.slow
def test_augmentation_is_repeated_by_the_seed_whatever_the_workers_and_new_in_every_epoch(tmp_path):
    write_everywhere(tmp_path, lambda n: np.random.default_rng(n).integers(0, 256, (24, 32, 3), dtype=np.uint8))

    def images(seed: int, epoch: int, num_workers: int = 0) -> torch.Tensor:
        seed_everything(seed)
        settings = {"augment": True, "rand_augment": RandAugmentSettings(), "batch_size": 8, **QUARTERS}
        loader = KINDS["eurosat"].prepared(tmp_path, num_workers=num_workers, **settings).train_dataloader()
        loader.sampler.set_epoch(epoch)
        places = torch.tensor([key.place for key in loader.sampler])
        return torch.cat([images for images, _ in loader])[places.argsort()]

    first, later = images(3, 0), images(3, 1)
    assert torch.equal(first, images(3, 0, num_workers=1))
    assert torch.equal(later, images(3, 1, num_workers=1))
    for other in (later, images(4, 0)):
        assert (first == other).flatten(1).all(1).float().mean() < 0.1


def test_augmentation_crops_at_least_8_percent_of_training_images_and_mirrors_half(tmp_path):
    # Red grows from 0 to 240 from left to right, green from top to bottom: an image shows where it was cut out.
    ramp = np.linspace(0, 240, 60)
    pixels = np.stack(np.broadcast_arrays(ramp, ramp[:, None], 0.0), -1).astype(np.uint8)
    write_everywhere(tmp_path, lambda number: pixels)
    data = KINDS["eurosat"].prepared(tmp_path, augment=True, image_size=16, **QUARTERS)
    draws = 300
    cut = torch.stack([data.train_set[0][0] for _ in range(draws)]) / 2 + 0.5
    # Between the centres of the outer two of 16 columns lie 15/16 of the width.
    width = (cut[:, 0].mean(1)[:, -1] - cut[:, 0].mean(1)[:, 0]) * 255 / 240 * 16 / 15
    height = (cut[:, 1].mean(2)[:, -1] - cut[:, 1].mean(2)[:, 0]) * 255 / 240 * 16 / 15
    assert (height > 0).all()
    area, ratio = width.abs() * height, width.abs() / height
    assert 0.06 < area.min() < 0.2
    assert 0.85 < area.max() < 1.03
    assert (ratio > 0.68).all()
    assert (ratio < 1.47).all()
    assert abs((width < 0).float().mean() - 0.5) < 4 * 0.5 / draws**0.5
    image, _ = data.val_set[0]
    assert image[0, :, 0].mean() < -0.9 < 0.8 < image[0, :, -1].mean()


def test_labels_are_those_of_torchvision(roots):
    theirs, folder = Caltech101(roots["caltech101"]), roots["caltech101"] / "caltech101" / "101_ObjectCategories"
    pairs = zip(theirs.y, theirs.index, strict=True)
    caltech = [(str(folder / theirs.categories[label] / f"image_{n:04}.jpg"), label) for label, n in pairs]
    eurosat, food = EuroSAT(roots["eurosat"]), Food101(roots["food101"])
    for name, samples, classes in (
        ("caltech101", caltech, theirs.categories),
        ("eurosat", eurosat.samples, eurosat.classes),
        ("food101", None, food.classes),  # its images are private
    ):
        data = KINDS[name].prepared(roots[name])
        assert [*data.class_names] == classes
        assert samples is None or labelled_files(data) == Counter(samples)
