"""The configurations of prompts: every method runs on the digits' CLIP, and those of ViT-B/32 with a small model."""

import json
from pathlib import Path
from typing import Any

import pytest

from flops_lightning.cli.command import build, main
from flops_lightning.datamodules import Caltech101DataModule
from flops_lightning.datamodules.augmentation import CLIP
from tests.clip_digits import random_clip
from tests.datamodules.photo_folders import DISHES, WNIDS, photo, write

ROOT = Path(__file__).parent.parent
DIGITS = "configs/clip_tiny_digits.yaml"
LARGE = sorted(path.stem.rpartition("_")[2] for path in (ROOT / "configs").glob("clip_vit_b32_*.yaml"))
METHODS = {
    "lr": ("EvolutionStrategies", "EqualAllocator"),
    "spsa": ("SPSA", "EqualAllocator"),
    "ops_lr": ("EvolutionStrategies", "OptimalAllocator"),
    "ops_spsa": ("SPSA", "OptimalAllocator"),
    "crossed": ("EvolutionStrategies", "EqualAllocator"),
    "cma_es": ("CandidateSearch", "none"),
    "bp": ("Backprop", "none"),
}
"""Of each method: strategy and allocator."""
MANUAL = ("manual", "manual_ensembled")


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def with_method(method: str) -> list[str]:
    return ["--config", DIGITS, "--config", f"configs/prompt_method/{method}.yaml"]


def test_every_method_has_a_test() -> None:
    assert {path.stem for path in Path("configs/prompt_method").glob("*.yaml")} == {*METHODS, *MANUAL}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["", *METHODS])
def test_every_method_runs(method: str, tmp_path: Path) -> None:
    search = method == "cma_es"
    few = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 2, "trainer.limit_val_batches": 1}
    few |= {"model.init_args.search.population": 4} if search else {"data.init_args.batch_size": 8}
    given = [f"--{name}={value}" for name, value in few.items()]
    given += [f"--trainer.default_root_dir={tmp_path}", "--trainer.enable_progress_bar=false"]
    main(["fit", *(with_method(method) if method else ["--config", DIGITS]), *given])
    (file,) = tmp_path.rglob("summary.json")
    summary = json.loads(file.read_text())
    assert (summary["strategy"], summary["allocator"]) == METHODS.get(method, ("EvolutionStrategies", "none"))
    if search:
        expected = {"image_prompt": 4 * 1257, "scores": 4}
    else:
        expected = {} if method == "bp" else {"image_prompt": 2 * 8 * 10, "scores": 2 * 20}
    assert summary["queries_by_site"] == expected
    assert (file.parent / "prompts.safetensors").is_file()


@pytest.mark.parametrize("method", MANUAL)
def test_manual_is_tested_and_not_trained(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = f"--trainer.default_root_dir={tmp_path}"
    main(["test", *with_method(method), root])
    assert "0.45" in capsys.readouterr().out  # of turned digits; upright ones: 0.96
    with pytest.raises(SystemExit):
        main(["fit", *with_method(method), root])
    assert "training needs a strategy or a search" in capsys.readouterr().err


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("photos")
    for label, name in enumerate(WNIDS):
        for number in range(22):
            write(
                root / "imagenet" / ("train" if number < 21 else "val") / name / f"{number}.jpg",
                photo(label, number % 9),
            )
    for label, name in enumerate(Caltech101DataModule.class_names):
        for number in range(31):  # as many as the smallest class has
            write(Caltech101DataModule.source.folder(root) / name / f"{number}.jpg", photo(label, number % 9))
    lists: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for label, name in enumerate(DISHES):
        for number in range(22):
            write(root / "food-101" / "images" / name / f"{number}.jpg", photo(label, number % 9))
            lists["train" if number < 21 else "test"].setdefault(name, []).append(f"{name}/{number}")
    (root / "food-101" / "meta").mkdir()
    for part, listed in lists.items():
        (root / "food-101" / "meta" / f"{part}.json").write_text(json.dumps(listed))
    return {"imagenet": root / "imagenet", "caltech101": root, "food101": root}


CLASSES = {"imagenet": len(WNIDS), "caltech101": 101, "food101": len(DISHES)}
HELD_OUT = {"imagenet": 16, "food101": 15}
"""Images split off for validation where the data set has none: all that the tiny ones can spare."""


def arguments(name: str, photos: dict[str, Path], tmp_path: Path) -> list[str]:
    small = {"image_size": 224, "patch_size": 112}
    model = {"model_name": random_clip(tmp_path / "clip", text={"context_length": 77}, **small), "checkpoint": ""}
    prompts = {"text_prompt.dim": 20, "image_prompt.dim": 20, "text_prompt.queries": 2, "image_prompt.queries": 2}
    data: dict[str, Any] = {"root": photos[name], "num_workers": 0, "batch_size": 8}
    data |= {"val_images": HELD_OUT[name]} if name in HELD_OUT else {}
    given = [f"--model.init_args.{key}={value}" for key, value in (model | prompts).items()]
    return [
        "--config",
        f"configs/clip_vit_b32_{name}.yaml",
        *given,
        *(f"--data.init_args.{k}={v}" for k, v in data.items()),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_a_configuration_of_vit_b32_runs_with_a_small_model(name: str, photos: dict[str, Path], tmp_path: Path) -> None:
    trial = ["--trainer.fast_dev_run=2", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
    main(["fit", *arguments(name, photos, tmp_path), *trial])


@pytest.mark.parametrize("name", LARGE)
def test_a_configuration_of_vit_b32_says_what_the_paper_does(
    name: str, photos: dict[str, Path], tmp_path: Path
) -> None:
    cli = build([*arguments(name, photos, tmp_path), "--trainer.logger=false"])
    task, data = cli.model, cli.datamodule
    assert task.num_classes == CLASSES[name]
    assert tuple(task.hparams["class_names"]) == data.display_names
    assert (data.mean, data.std) == CLIP
    parts = data.check()
    assert len(parts["train"].files) == 16 * task.num_classes
    assert len(parts["val"].files) == 4 * task.num_classes
    stated = cli.config["model"]["init_args"]
    assert (stated["text_prompt"]["tokens"], stated["image_prompt"]["tokens"]) == (12, 10)
    assert [site.stages for site in task.strategy.specs] == [["image_prompt"], ["scores"]]
    text = Path(f"configs/clip_vit_b32_{name}.yaml").read_text()
    assert "dim: 500, sigma: 0.02, queries: 60" in text
    assert "model_name: ViT-B-32-quickgelu" in text
