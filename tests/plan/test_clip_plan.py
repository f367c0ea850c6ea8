"""What a plan says of prompts, and what image and text passes cost at the size of ViT-B/32."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

from flops_lightning.cli.command import main
from flops_lightning.datamodules import Caltech101DataModule
from flops_lightning.network.operations import flops
from flops_lightning.strategies import EvolutionStrategies
from flops_lightning.strategies.costs import site_costs
from flops_lightning.tasks import ClipPromptTuner
from tests.clip_digits import random_clip
from tests.datamodules.photo_folders import photo, write

ROOT = Path(__file__).parents[2]
pytest.importorskip("open_clip", reason="prompts are for its models")


@pytest.mark.slow
def test_a_plan_names_the_image_and_text_passes_of_a_step_and_of_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    main(["plan", "--config", "configs/clip_tiny_digits.yaml", "--seconds", "0.3", "--backprop", "false"])
    printed = capsys.readouterr().out
    rows = {row[0]: row[1] for row in re.findall(r"^([a-z_ ]+?) {2,}([\d,]+)", printed, flags=re.MULTILINE)}
    assert (rows["image_prompt"], rows["scores"]) == ("640", "20")
    # The last of 20 batches is smaller, and has as many text draws.
    assert rows["the whole run"] == f"{15 * (1257 * 10 + 20 * 20):,}"
    of_run = {row[0]: row[1] for row in re.findall(r"^(\w+) .* ([\d,]+)$", printed, flags=re.MULTILINE)}
    assert (of_run["image_prompt"], of_run["scores"]) == (f"{15 * 1257 * 10:,}", f"{15 * 20 * 20:,}")


DISHES = [f"dish_{number}" for number in range(101)]


def full_size(name: str, root: Path) -> list[str]:
    """Arguments for a folder with as many classes as the data set has, and enough photos, all the same, of each."""
    source = root / "photo.jpg"
    write(source, photo(0, 0))

    def fill(folder: Path, images: range) -> None:
        folder.mkdir(parents=True)
        for number in images:
            os.link(source, folder / f"{number}.jpg")

    if name == "imagenet":
        from timm.data import ImageNetInfo

        for wnid in ImageNetInfo("imagenet-1k").label_names():
            fill(root / "train" / wnid, range(20))
            fill(root / "val" / wnid, range(1))
        return ["val_images=4000"]
    if name == "caltech101":
        for each in Caltech101DataModule.class_names:
            fill(Caltech101DataModule.source.folder(str(root)) / each, range(31))
        return []
    for each in DISHES:
        fill(root / "food-101/images" / each, range(21))
    (root / "food-101/meta").mkdir()
    for part, images in (("train", range(20)), ("test", range(20, 21))):
        listed = {each: [f"{each}/{number}" for number in images] for each in DISHES}
        (root / "food-101/meta" / f"{part}.json").write_text(json.dumps(listed))
    return ["val_images=404"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "classes"), [("caltech101", 101), ("food101", 101), ("imagenet", 1000)])
def test_a_plan_tells_the_passes_and_hours_of_each_configuration_of_vit_b32(
    name: str, classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    settings = [*full_size(name, tmp_path / "data"), f"root={tmp_path / 'data'}", "num_workers=0"]
    model = random_clip(tmp_path / "clip", text={"context_length": 77}, image_size=224, patch_size=112)
    own = [f"model_name={model}", "checkpoint=", "text_prompt.dim=20", "image_prompt.dim=20"]
    given = [f"--data.init_args.{each}" for each in settings] + [f"--model.init_args.{each}" for each in own]
    quick = ["--seconds", "0.1", "--backprop", "false", "--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    main(["plan", "--config", f"configs/clip_vit_b32_{name}.yaml", *given, *quick])
    printed = capsys.readouterr().out
    images, steps = 16 * classes, 50 * -(-16 * classes // 64)
    assert re.search(rf"samples of an epoch +{images:,}, in batches of 64\n", printed)
    assert re.search(rf"steps +{steps // 50:,} an epoch, {steps:,} in all\n", printed)
    of_run = {row[0]: row[1] for row in re.findall(r"^(\w+) .* ([\d,]+)$", printed, flags=re.MULTILINE)}
    assert (of_run["image_prompt"], of_run["scores"]) == (f"{50 * 60 * images:,}", f"{60 * steps:,}")
    assert re.search(r"the whole fit +[\d.]+ (min|hours|days)\n", printed)


@pytest.mark.parametrize("name", ["caltech101", "food101", "imagenet"])
def test_a_plan_without_the_images_says_where_they_go(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    root = f"--data.init_args.root={tmp_path}"
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--config", f"configs/clip_vit_b32_{name}.yaml", "--model.init_args.checkpoint", "", root])
    error = capsys.readouterr().err
    assert re.search(rf"data.root = '{tmp_path}': has no folder", error)
    assert ("data/README.md" if name == "imagenet" else "data.download: true") in error


@pytest.mark.slow
def test_a_text_pass_of_100_classes_costs_three_image_passes_in_vit_b32() -> None:
    names = [name for name in Caltech101DataModule.class_names if name != "Faces_easy"]
    task = ClipPromptTuner(
        model_name="ViT-B-32-quickgelu", class_names=[name.replace("_", " ") for name in names],
        text_prompt={"tokens": 12}, image_prompt={"tokens": 10}, strategy=EvolutionStrategies(seed=0),
    )  # fmt: skip
    image, text = task.strategy.sites
    assert {n: p.numel() for n, p in task.network.trainable().items()} == {"text_prompt.z": 500, "image_prompt.z": 500}
    images = torch.randn(1, 3, 224, 224)
    costs = site_costs(task.network, task.strategy.sites, images)
    assert costs.context[text.name] / costs.query[image.name] == pytest.approx(2.9, abs=0.1)
    with torch.no_grad(), task.network.evaluating(), task.network.frozen_parameters():
        patches = task.network.run(images, stop=1)
        counted, _ = flops(lambda x: task.network.run(x, 1, len(task.network) - 1), patches)
    assert counted / 1e9 == pytest.approx(10.3, abs=0.2)  # 60 tokens; the 50 of CLIP alone are 8.8
