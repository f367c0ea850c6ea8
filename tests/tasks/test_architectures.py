"""Any timm model by the command line, on a folder of images: two steps from forward passes, with the default sites."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from flops_lightning.cli.command import main
from flops_lightning.tasks.backbone import save_weights
from tests.datamodules.photo_folders import write
from tests.reference.networks import shaken

MODELS: dict[str, dict[str, Any]] = {
    "convnext_atto": {"depths": [1, 1, 2, 1], "dims": [4, 8, 8, 8]},
    "swin_tiny_patch4_window7_224": {
        "img_size": 64, "window_size": 2, "depths": [1, 1, 2, 1], "embed_dim": 8, "num_heads": [1, 1, 2, 2],
    },
    "resnet18": {"channels": [4, 4, 8, 8]},
}  # fmt: skip


def settings(folder: Path, model: str, **given: Any) -> str:
    """The path of a configuration that trains a small network on three classes of tiny photos for two steps."""
    pixels = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        for i in range(10):
            image = Image.fromarray(pixels.integers(0, 256, (32, 32, 3), dtype=np.uint8))
            write(folder / "data" / name / f"{i}.jpg", image)
    network = shaken(timm.create_model(model, num_classes=3, **MODELS[model])).float()
    save_weights(network, folder / "start.safetensors")
    trainer = {
        "max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False,
        "logger": False, "default_root_dir": str(folder), "num_sanity_val_steps": 0,
        "callbacks": [{"class_path": "flops_lightning.callbacks.RunSummary"}],
    }  # fmt: skip
    task = {
        "model_name": model, "model_kwargs": MODELS[model], "checkpoint": str(folder / "start.safetensors"),
        "strategy": {"class_path": "flops_lightning.strategies.LikelihoodRatio"},
        "optimizer": {"name": "sgd", "lr": 1.0}, **given,
    }  # fmt: skip
    data = {"root": str(folder / "data"), "image_size": 64, "batch_size": 4}
    config = {
        "trainer": trainer,
        "model": {"class_path": "flops_lightning.tasks.ForwardImageClassifier", "init_args": task},
        "data": {"class_path": "flops_lightning.datamodules.ImageFolderDataModule", "init_args": data},
    }
    (folder / "given.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "given.yaml")


@pytest.mark.parametrize("model", MODELS)
def test_two_steps_move_every_parameter_and_no_statistic(model, tmp_path):
    batch_norm = {"batch_norm": "frozen"} if model == "resnet18" else {}
    main(["fit", "-c", settings(tmp_path, model, **batch_norm)])
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in ("start", "model"))
    trained = dict(timm.create_model(model, num_classes=3, **MODELS[model]).named_parameters())
    assert {name for name in before if not torch.equal(after[name], before[name])} == set(trained)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["queries_by_site"] == dict.fromkeys(("group1", "group2", "group3", "head"), 2 * 4 * 20)
    assert summary["lost_queries"] == 0


def test_batch_normalisation_is_refused_unless_it_is_frozen(tmp_path, refused):
    message = refused("fit", "-c", settings(tmp_path, "resnet18"))
    assert "BatchNorm2d" in message
    assert "Write batch_norm: frozen to take pretrained statistics as constants" in message
