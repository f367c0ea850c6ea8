"""Every configuration runs, and the README lists it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from flops_lightning.cli import main
from flops_lightning.datamodules import CIFAR10DataModule

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml"))
OVERLAYS = [path for path in CONFIGS if path.startswith(("configs/digits/", "configs/allocators/"))]
QUICKSTART = "configs/vit_tiny_digits.yaml"
CIFAR10 = "configs/vit_micro_cifar10.yaml"


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run(configs: list[str], folder: Path, *extra: str) -> dict[str, Any]:
    files = [part for path in configs for part in ("--config", path)]
    main(["fit", *files, "--trainer.default_root_dir", str(folder), "--trainer.enable_progress_bar=false", *extra])
    (summary,) = folder.rglob("summary.json")
    return json.loads(summary.read_text())


def test_there_are_configurations() -> None:
    assert {QUICKSTART, CIFAR10, "configs/vit_tiny_digits_upright.yaml"} < set(CONFIGS)
    assert len(OVERLAYS) == 9


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Settings that give CIFAR-10's configuration images of noise, and weights of a network with another head."""
    root = tmp_path_factory.mktemp("cifar10")
    pixels = np.random.default_rng(0)
    for part, number in (("train", 14), ("test", 2)):
        for name in CIFAR10DataModule.class_names:
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                image = Image.fromarray(pixels.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                image.save(root / part / name / f"{i}.png")
    model = yaml.safe_load(Path(CIFAR10).read_text())["model"]["init_args"]
    network = timm.create_model(model["model_name"], num_classes=200, **model["model_kwargs"])
    save_file({name: value.half() for name, value in network.state_dict().items()}, root / "model.safetensors")
    data = {"root": root, "images_per_class": 0, "val_images": 10, "test_images": 0}
    return [
        f"--model.init_args.checkpoint={root / 'model.safetensors'}",
        *(f"--data.init_args.{name}={value}" for name, value in data.items()),
    ]


@pytest.mark.parametrize("path", CONFIGS)
def test_every_configuration_runs(path: str, tmp_path: Path, cifar10: list[str]) -> None:
    configs = [QUICKSTART, path] if path in OVERLAYS else [path]
    limits = ("--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1", "--trainer.max_epochs=1")
    summary = run(configs, tmp_path, *limits, *(cifar10 if path == CIFAR10 else ()))
    assert summary["lost_queries"] == 0
    assert 0 <= summary["test_accuracy"] <= 1
    expected = "Backprop" if "backprop" in path or "upright" in path else "LikelihoodRatio"
    assert summary["strategy"] == expected
    if expected == "LikelihoodRatio":
        assert summary["queries"] == pytest.approx(summary["queries_per_sample"] * 2 * 64, abs=0.1)
    else:
        assert summary["queries"] == 0


def test_every_configuration_opens_with_what_it_is_and_how_to_launch_it() -> None:
    for path in CONFIGS:
        header = re.match(r"(#.*\n)+", Path(path).read_text())
        assert header is not None, path
        assert "launch:" in header[0], path
        launched = re.findall(r"--config (\S+)", header[0])
        assert launched[-1] == path, path


def test_the_readme_lists_every_configuration_and_links_to_what_exists() -> None:
    text = Path("README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not Path(link).exists()] == []
    assert set(CONFIGS) <= set(links)


def test_the_readme_snippet_fills_gradients() -> None:
    blocks = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), flags=re.DOTALL)
    (snippet,) = [block for block in blocks if "stage_network" in block]
    torch.manual_seed(0)
    layers = [torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh()) for _ in range(4)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(6, 3))
    names = {
        "model": model,
        "loss": lambda outputs, targets: torch.nn.functional.cross_entropy(outputs, targets, reduction="none"),
        "inputs": torch.randn(8, 6),
        "targets": torch.randint(3, (8,)),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
    }
    exec(snippet, names)
    norms = [float(p.grad.norm()) for p in model.parameters()]
    assert min(norms) > 0


@pytest.mark.slow
def test_the_quickstart_reaches_what_the_readme_promises(tmp_path: Path) -> None:
    accuracies = []
    for seed in range(3):
        summary = run([QUICKSTART], tmp_path / str(seed), f"--seed_everything={seed}")
        assert summary["start_accuracy"] <= 0.4
        assert summary["train_seconds"] < 180
        accuracies.append(summary["test_accuracy"])
    assert sorted(accuracies)[1] >= 0.9


def test_no_figure_is_left_open_in_the_documentation() -> None:
    for path in (*Path("docs").glob("*.md"), Path("README.md"), Path("data/README.md")):
        assert "@@" not in path.read_text(), path
