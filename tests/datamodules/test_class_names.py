"""Names for captions: CoOp's of Caltech101, CLIP's of ImageNet, words elsewhere; and templates."""

import json
import sys

import pytest

from flops_lightning.datamodules import (
    Caltech101DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    EuroSATDataModule,
    Flowers102DataModule,
    Food101DataModule,
    ImageNetDataModule,
)
from flops_lightning.datamodules.class_names import imagenet_names
from flops_lightning.errors import SettingError
from flops_lightning.prompts.class_texts import check_class_names

WNIDS = ("n01440764", "n02123045", "n15075141")


def test_caltech101_has_the_names_of_coops_split(shared_data, tmp_path):
    file = shared_data("data/coop/split_zhou_Caltech101.json")
    listed = json.loads(file.read_text())
    names = {image.split("/")[0]: name for part in listed.values() for image, _, name in part}
    folders = Caltech101DataModule(root=str(tmp_path), download=True)
    found = dict(zip(folders.class_names, folders.display_names, strict=True))
    assert found.pop("Faces_easy") == "Faces easy"  # which CoOp leaves out
    assert found == {folder: name.replace("_", " ") for folder, name in names.items()}
    split = Caltech101DataModule(root=str(tmp_path), download=True, split_file=str(file))
    assert sorted(split.display_names) == sorted(found.values())
    check_class_names(split.display_names)


def test_imagenet_has_the_names_of_clip_whatever_part_of_the_classes_is_there(shared_data, tmp_path):
    open_clip = pytest.importorskip("open_clip")
    assert imagenet_names(WNIDS) == ("tench", "tabby cat", "toilet paper")
    for wnid in WNIDS[::-1]:
        (tmp_path / "val" / wnid).mkdir(parents=True)
    assert ImageNetDataModule(root=str(tmp_path)).display_names == imagenet_names(WNIDS)
    lines = shared_data("data/coop/imagenet_classnames.txt").read_text().splitlines()
    wnids, names = zip(*(line.split(" ", 1) for line in lines), strict=True)
    assert imagenet_names(sorted(wnids)) == tuple(open_clip.IMAGENET_CLASSNAMES)
    same = [ours == theirs for ours, theirs in zip(imagenet_names(wnids), names, strict=True)]
    assert sum(same) > 600  # CoOp has an earlier version; a list that is shifted has none in common
    with pytest.raises(SettingError, match="class_names = 'n00000001': is none of ImageNet's 1,000 classes"):
        imagenet_names(["n01440764", "n00000001"])


def test_without_open_clip_it_is_said_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(SettingError, match=r"needs the package open_clip .*Run pip install .*\[clip\]"):
        imagenet_names(WNIDS)


@pytest.mark.parametrize(
    ("kind", "label", "name"),
    [
        (CIFAR100DataModule, 52, "oak tree"),
        (EuroSATDataModule, 2, "herbaceous vegetation"),
        (DigitsDataModule, 9, "nine"),
        (Flowers102DataModule, 0, "pink primrose"),
    ],
)
def test_elsewhere_words(kind, label, name, tmp_path):
    given = {} if kind is DigitsDataModule else {"root": str(tmp_path), "download": True}
    data = kind(**given)
    assert data.display_names[label] == name
    assert len(data.display_names) == data.num_classes
    check_class_names(data.display_names)


def test_templates_take_a_name_once(tmp_path):
    for kind in (Caltech101DataModule, Food101DataModule, Flowers102DataModule, DigitsDataModule, EuroSATDataModule):
        data = kind.__new__(kind)
        assert data.template in data.templates
        assert all(template.count("{}") == 1 for template in data.templates)
    assert data.templates[2].replace("{}", "forest") == "a centered satellite photo of the forest."
    pytest.importorskip("open_clip")
    (tmp_path / "val" / WNIDS[0]).mkdir(parents=True)
    data = ImageNetDataModule(root=str(tmp_path))
    assert (len(data.templates), data.templates[0], data.template) == (80, "a bad photo of a {}.", "a photo of a {}.")
    assert all(template.count("{}") == 1 for template in data.templates)


def test_caltech101_has_clips_templates(tmp_path):
    data = Caltech101DataModule(root=str(tmp_path), download=True)
    assert len({*data.templates}) == len(data.templates) == 34
    assert data.template in data.templates
    assert all(template.count("{}") == 1 for template in data.templates)
    # Those of ImageNet have them all.
    open_clip = pytest.importorskip("open_clip")
    assert {*data.templates} <= {template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES}
    for template in ("the {} in a video game.", "a embroidered {}.", "graffiti of the {}.", "a doodle of the {}."):
        assert template in data.templates
