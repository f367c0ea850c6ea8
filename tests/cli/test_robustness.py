"""``test`` with the overlays of robustness: what they measure, and checkpoints that do not fit the data."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flops_lightning.cli.command import main

ROOT = Path(__file__).parents[2]
DIGITS = "configs/vit_tiny_digits.yaml"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        given = ("--config", DIGITS, "--config", "configs/method/bp.yaml", "--trainer.default_root_dir", str(folder))
        main(["fit", *given, "--trainer.max_steps=1", "--trainer.limit_val_batches=0"])
    return next(folder.rglob("*.ckpt"))


def arguments_of(overlay: str, folder: Path, *extra: str) -> list[str]:
    root = ("--trainer.default_root_dir", str(folder), "--trainer.limit_test_batches=1")
    return ["test", "--config", DIGITS, "--config", f"configs/{overlay}/robustness.yaml", *root, *extra]


@pytest.mark.parametrize(("overlay", "names"), [("eval", 19), ("small", 15)])
def test_an_overlay_measures_a_checkpoint(
    overlay: str, names: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    main(arguments_of(overlay, tmp_path, "--ckpt_path", str(checkpoint), "--data.init_args.batch_size=32"))
    (file,) = tmp_path.rglob("robustness.json")
    results = json.loads(file.read_text())["results"]
    assert len(results) == names
    assert f"mi_fgsm_{8 if overlay == 'eval' else 1}" in results
    assert len((file.parent / "robustness.csv").read_text().splitlines()) == 1 + 32 * names


def test_a_checkpoint_of_another_normalisation_or_of_other_classes_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(ROOT)
    content = torch.load(checkpoint, weights_only=True)
    assert content["normalization"] == {"mean": [0.3053], "std": [0.376]}
    changes = {
        "normalization": ({"mean": [0.5], "std": [0.5]}, "data = 'mean [0.3053], std [0.376]': the checkpoint was "
                          "trained on images normalised with mean [0.5], std [0.5]"),
        "class_names": ([str(i) for i in range(8)], "data = '10 classes': the checkpoint was trained on '8 classes'"),
    }  # fmt: skip
    for name, (value, message) in changes.items():
        torch.save({**content, name: value}, tmp_path / "other.ckpt")
        arguments = arguments_of("eval", tmp_path, "--ckpt_path", str(tmp_path / "other.ckpt"))
        assert message in refused(*arguments)
