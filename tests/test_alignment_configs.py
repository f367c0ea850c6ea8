"""The configurations of alignment: the small one runs, and the paper's says what the paper does, on a meta device."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from flops_lightning.cli.command import build, main
from flops_lightning.suffix_loss import PaddedTargets
from flops_lightning.tasks import alignment, alignment_models
from tests.aligned import VIT, class_folders, llm_folder, photo_folder, transformers

ROOT = Path(__file__).parent.parent / "configs" / "alignment"
SMALL, PAPER = ROOT / "stories_cifar10.yaml", ROOT / "vicuna7b_lcs558k.yaml"
VICUNA = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


def small(folder: Path) -> list[str]:
    """The small configuration with a smaller encoder, language model and data."""
    data = {"root": class_folders(folder / "photos"), "images_per_class": 4, "val_share": 0.2, "batch_size": 4}
    given = {f"--data.init_args.{name}": value for name, value in data.items()}
    settings = yaml.safe_load(SMALL.read_text())
    settings["model"]["init_args"] |= {"llm": llm_folder(folder / "llm"), "encoder_kwargs": VIT}
    (folder / "small.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", str(folder / "small.yaml"), *(f"{name}={value}" for name, value in given.items())]


@pytest.mark.slow
def test_the_small_configuration_learns_and_writes_captions(tmp_path, capsys):
    trial = [f"--trainer.default_root_dir={tmp_path}", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
    main(["fit", *small(tmp_path), *trial])
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["forward_gradient"]["meters"][0]["adapter"]["queries"] == 2 * 4 * 60
    main(["test", *small(tmp_path), "--ckpt_path", str(checkpoint), *trial])
    assert "test/accuracy" in capsys.readouterr().out
    main(["predict", *small(tmp_path), "--ckpt_path", str(checkpoint), *trial])
    (file,) = tmp_path.rglob("predictions.csv")
    rows = list(csv.DictReader(file.read_text().splitlines()))
    assert [row["index"] for row in rows] == [str(i) for i in range(6)]
    assert [Path(row["file"]).parent.name for row in rows] == ["big_ship"] * 3 + ["truck"] * 3
    assert any(row["caption"] for row in rows)
    main(["plan", *small(tmp_path), "--seconds", "1", *trial])
    assert f"{8 * 60:,}" in capsys.readouterr().out  # queries of an epoch


def test_what_tune_writes_takes_the_place_of_the_relative_width(tmp_path, capsys):
    file, quick = tmp_path / "tuned.yaml", ["--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    main(["tune", *small(tmp_path), *quick, "--rates=0", "--widths=3", "--batches=1", f"--output={file}"])
    assert f"written to {file}" in capsys.readouterr().out
    task = build([*small(tmp_path), "--config", str(file), *quick]).model
    found = yaml.safe_load(file.read_text())["model"]["init_args"]
    (site,) = found["strategy"]["init_args"]["sites"]
    assert (found["relative_sigma"], task.strategy.sigmas) == (0.0, {"adapter": site["sigma"]})


def test_the_configuration_of_the_paper_says_what_the_paper_does(tmp_path, monkeypatch):
    config = transformers.LlamaConfig(vocab_size=32000, max_position_embeddings=4096, **VICUNA)
    with torch.device("meta"):
        llm = transformers.LlamaForCausalLM(config).bfloat16()
    # It looks at values, of which there are none here.
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda positions: None)
    asked: dict[str, Any] = {}

    def load(name: str, **settings: Any) -> tuple[Any, Any]:
        asked.update(settings, name=name)
        return llm, None

    def encoder(name: str, checkpoint: str, kwargs: Any, feature: str) -> Any:
        asked.update(encoder=name, checkpoint=checkpoint, feature=feature)
        return SimpleNamespace(width=1024, places=1, name=name)

    monkeypatch.setattr(alignment_models, "load_language_model", load)
    monkeypatch.setattr(alignment, "VisionEncoder", encoder)
    monkeypatch.setattr(alignment_models, "mean_embedding", lambda loss: torch.zeros(loss.width))
    root = photo_folder(tmp_path)
    data = {"root": root, "captions": root / "captions.json"}
    given = [f"--data.init_args.{name}={value}" for name, value in data.items()]
    cli = build(["--config", str(PAPER), *given, "--trainer.accelerator=cpu", "--trainer.logger=false"])
    task = cli.model
    assert asked == {
        "name": "lmsys/vicuna-7b-v1.5", "dtype": "bfloat16", "encoder": "ViT-L-14-quickgelu", "checkpoint": "openai",
        "feature": "cls_pre_norm",
    }  # fmt: skip
    assert sum(p.numel() for p in task.parameters()) == 1024 * 4096 + 4096
    (site,) = task.strategy.sites
    assert site.queries_per_sample == 60
    optimizer = task.optimizer_settings
    assert (optimizer.name, optimizer.lr, optimizer.schedule) == ("adam", 5e-4, "cosine")
    assert cli.datamodule.batch_size == 64
    assert -(-558_128 // 64) == 8_721
    query = float(task.loss.flops(PaddedTargets(torch.zeros(1, 20), np.array([20])))[0])
    assert query == pytest.approx(0.264e12, rel=0.01)
    assert 64 * 60 * query == pytest.approx(1.02e15, rel=0.01)
    assert 558_128 * 60 * query == pytest.approx(8.9e18, rel=0.01)
