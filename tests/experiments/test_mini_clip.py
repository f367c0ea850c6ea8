"""The small CLIP of the studies, trained on class folders of noise and on the real ones."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("open_clip", reason="prompts are for its models")

from experiments.mini_clip import TEMPLATES, accuracy, augmented, captions, load, main, pixels, train
from flops_lightning.datamodules import CIFAR10DataModule, CIFAR100DataModule
from flops_lightning.prompts import class_features
from tests.cifar10 import noise_images


def test_the_folder_it_writes_is_a_model_of_open_clip(tmp_path: Path) -> None:
    noise_images(tmp_path / "images", train=4, test=2)
    # The validation images are set by number, and there are 40 images in all.
    given = ["--root", str(tmp_path / "images"), "--output", str(tmp_path / "clip"), "--val_images", "20"]
    main([*given, "--epochs", "1", "--batch", "10"])
    found = json.loads((tmp_path / "clip/trained.json").read_text())
    clip = load(tmp_path / "clip")
    beside = sum(p.numel() for p in clip.parameters()) - clip.token_embedding.weight.numel()
    assert found["numbers_beside_the_embedding"] == beside < 360_000
    data = CIFAR10DataModule(root=str(tmp_path / "images"), val_images=20)
    again = accuracy(clip, *pixels(data.check()["test"]), class_features(clip, data.class_names))
    assert again == found["zero_shot"]


def test_it_learns_the_names_of_cifar100_as_well_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise_images(tmp_path / "ten", train=4, test=2)
    noise_images(tmp_path / "hundred", train=1, test=1, class_names=CIFAR100DataModule.class_names)
    seen = []

    def noted(images: torch.Tensor, labels: torch.Tensor, names: tuple[str, ...], **settings: int) -> torch.nn.Module:
        seen.append((images, labels, names))
        return train(images, labels, names, **settings)

    monkeypatch.setattr("experiments.mini_clip.train", noted)
    given = ["--root", str(tmp_path / "ten"), "--cifar100", str(tmp_path / "hundred"), "--val_images", "20"]
    main([*given, "--output", str(tmp_path / "clip"), "--epochs", "1", "--batch", "60"])
    ((images, labels, names),) = seen
    assert len(images) == len(labels) == 20 + 100
    assert labels.bincount().tolist() == [2] * 10 + [1] * 100
    assert (names[9], names[10], names[10 + 47]) == ("truck", "apple", "maple tree")
    data = CIFAR100DataModule(root=str(tmp_path / "hundred"), val_images=0)
    torch.testing.assert_close(images[10 * 2 :], pixels(data.check()["train"])[0])
    features = class_features(load(tmp_path / "clip"), data.display_names, TEMPLATES)
    again = accuracy(load(tmp_path / "clip"), *pixels(data.check()["test"]), features)
    assert json.loads((tmp_path / "clip/trained.json").read_text())["zero_shot_cifar100_ensembled"] == again


def test_captions_are_templates_with_a_name_of_the_class() -> None:
    found = captions(("cat", "bird"), torch.Generator().manual_seed(0))
    assert found[0] in {t.replace("{}", name) for t in TEMPLATES for name in ("cat", "kitten")}
    assert found[1] in {t.replace("{}", "bird") for t in TEMPLATES}


def test_augmented_images_are_shifted_and_mirrored_parts_of_the_padded_ones() -> None:
    image = torch.arange(1, 1 + 32 * 32).view(1, 32, 32).expand(50, 3, 32, 32)
    found = augmented(image, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(image[0, 0], (4,) * 4)
    shifted = [padded[i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
    known = {tuple(part.flatten().tolist()) for each in shifted for part in (each, each.flip(1))}
    assert {tuple(each[c].flatten().tolist()) for each in found for c in (0, 2)} <= known
    assert len({tuple(each[0].flatten().tolist()) for each in found}) > 30


@pytest.mark.study
def test_it_learns_what_captions_say() -> None:
    """Bright images and dark ones."""
    images = torch.randint(0, 100, (200, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(200) % 2
    images[labels == 1] += 100
    clip = train(images, labels, ("cat", "bird"), epochs=20, batch=20, seed=0)
    assert accuracy(clip, images, labels, class_features(clip, ("cat", "bird"))) > 0.9
