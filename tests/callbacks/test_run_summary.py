from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from safetensors.torch import load_file

from flops_lightning.allocators import EqualAllocator
from flops_lightning.callbacks import QueryAllocatorCallback, RunSummary
from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.strategies import LikelihoodRatio, SiteSpec
from flops_lightning.tasks import ForwardImageClassifier

KWARGS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
KEYS = {
    "start_accuracy",
    "test_accuracy",
    "queries",
    "queries_per_sample",
    "forward_equivalents",
    "lost_queries",
    "train_seconds",
    "strategy",
    "allocator",
}


def accuracy(model: torch.nn.Module, data: DigitsDataModule) -> float:
    data.setup("test")
    with torch.no_grad():
        hits = [(model.eval()(images).argmax(1) == labels) for images, labels in data.test_dataloader()]
    model.train()
    return float(torch.cat(hits).float().mean())


def run(folder: Path, callbacks: list[pl.Callback], **settings: Any) -> tuple[ForwardImageClassifier, float]:
    pl.seed_everything(0, verbose=False)
    sites = [SiteSpec(stages=["embed", "blocks.1"]), SiteSpec(stages=["pool", "head"], name="head")]
    task = ForwardImageClassifier(
        model_name="vit_tiny_patch16_224", num_classes=10, model_kwargs=KWARGS, strategy=LikelihoodRatio(sites=sites)
    )
    start = accuracy(task, DigitsDataModule())
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, default_root_dir=folder, callbacks=callbacks, enable_progress_bar=False,
        enable_checkpointing=False, limit_train_batches=3, limit_val_batches=0, max_epochs=1, **settings,
    )  # fmt: skip
    trainer.fit(task, DigitsDataModule(batch_size=32))
    return task, start


def test_summary_says_what_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, start = run(tmp_path, [RunSummary(), QueryAllocatorCallback(allocator=EqualAllocator())])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert set(summary) >= KEYS
    assert summary["start_accuracy"] == pytest.approx(start)
    assert summary["test_accuracy"] == pytest.approx(accuracy(task, DigitsDataModule()))
    assert summary["queries"] == 3 * 32 * 40
    assert summary["queries_per_sample"] == 40
    assert summary["queries_by_site"] == {"embed..blocks.1": 3 * 32 * 20, "head": 3 * 32 * 20}
    assert summary["forward_equivalents"] == pytest.approx(task.strategy.meter.total().forward_equivalents, abs=0.1)
    assert summary["lost_queries"] == 0
    assert summary["strategy"] == "LikelihoodRatio"
    assert summary["allocator"] == "EqualAllocator"
    assert 0 < summary["train_seconds"] < 60


def test_exported_weights_are_timms(tmp_path: Path) -> None:
    task, _ = run(tmp_path, [RunSummary()])
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=10, **KWARGS)
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(plain.eval()(x), task.eval()(x))


def test_export_can_be_turned_off_and_training_is_unchanged_by_the_tests(tmp_path: Path) -> None:
    with_summary, _ = run(tmp_path, [RunSummary(export_weights=False)])
    without, _ = run(tmp_path / "other", [])
    assert not (tmp_path / "model.safetensors").exists()
    pairs = zip(with_summary.parameters(), without.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_double_precision_runs(tmp_path: Path) -> None:
    run(tmp_path, [RunSummary()], precision="64-true")
    assert 0 <= json.loads((tmp_path / "summary.json").read_text())["test_accuracy"] <= 1


def test_without_a_data_module_accuracies_are_unknown(tmp_path: Path) -> None:
    data = DigitsDataModule(batch_size=32)
    data.setup("fit")
    sites = [SiteSpec(stages=["embed", "blocks.1"]), SiteSpec(stages=["pool", "head"], name="head")]
    task = ForwardImageClassifier(
        model_name="vit_tiny_patch16_224", num_classes=10, model_kwargs=KWARGS, strategy=LikelihoodRatio(sites=sites)
    )
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, default_root_dir=tmp_path, callbacks=[RunSummary()], max_epochs=1,
        enable_progress_bar=False, enable_checkpointing=False, limit_train_batches=1, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(task, data.train_dataloader())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["start_accuracy"] is summary["test_accuracy"] is None
    assert summary["queries"] == 32 * 40


def test_a_trial_run_leaves_nothing_behind(tmp_path: Path) -> None:
    run(tmp_path, [RunSummary()], fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []
