from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader, Dataset, IterableDataset

from flops_lightning.allocators import EqualAllocator
from flops_lightning.callbacks import QueryAllocatorCallback, RunSummary
from flops_lightning.callbacks.run_summary import _share
from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.distributed import SingleProcess
from flops_lightning.strategies import (
    Backprop,
    CoordinateFiniteDifferences,
    ForwardGradientStrategy,
    LikelihoodRatio,
    MeZO,
    SiteSpec,
)
from flops_lightning.tasks import ForwardImageClassifier

KWARGS = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}


def accuracy(model: torch.nn.Module, data: DigitsDataModule) -> float:
    data.setup("test")
    with torch.no_grad():
        hits = [(model.eval()(images).argmax(1) == labels) for images, labels in data.test_dataloader()]
    model.train()
    return float(torch.cat(hits).float().mean())


def run(
    folder: Path, callbacks: list[pl.Callback], strategy: ForwardGradientStrategy | None = None, **settings: Any
) -> tuple[ForwardImageClassifier, float]:
    pl.seed_everything(0, verbose=False)
    sites = [SiteSpec(stages=["embed", "blocks.1"]), SiteSpec(stages=["pool", "head"], name="head")]
    strategy = LikelihoodRatio(sites=sites) if strategy is None else strategy
    task = ForwardImageClassifier(
        model_name="vit_tiny_patch16_224", num_classes=10, model_kwargs=KWARGS, strategy=strategy
    )
    start = accuracy(task, DigitsDataModule())
    usual = {"limit_train_batches": 3, "max_epochs": 1, "enable_checkpointing": False}
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, default_root_dir=folder, callbacks=callbacks, enable_progress_bar=False,
        limit_val_batches=0, **{**usual, **settings},
    )  # fmt: skip
    trainer.fit(task, DigitsDataModule(batch_size=32))
    return task, start


def test_summary_says_what_happened(tmp_path, capsys):
    task, start = run(tmp_path, [RunSummary(), QueryAllocatorCallback(allocator=EqualAllocator())])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert {"peak_memory_mb", "peak_memory_of", "seed"} <= set(summary)
    assert summary["start_accuracy"] == pytest.approx(start)
    assert summary["test_accuracy"] == pytest.approx(accuracy(task, DigitsDataModule()))
    assert summary["queries"] == 3 * 32 * 40
    assert summary["queries_per_sample"] == 40
    assert (summary["steps"], summary["samples"]) == (3, 3 * 32)
    assert summary["queries_by_site"] == {"embed..blocks.1": 3 * 32 * 20, "head": 3 * 32 * 20}
    assert summary["forward_equivalents"] == pytest.approx(task.strategy.meter.total().forward_equivalents, abs=0.1)
    assert summary["lost_queries"] == 0
    assert summary["strategy"] == "LikelihoodRatio"
    assert summary["allocator"] == "EqualAllocator"
    assert 0 < summary["train_seconds"] < 60


@pytest.mark.parametrize(
    ("strategy", "by_site"),
    [
        (MeZO(queries=2), {"all": 2}),  # makes no clean pass
        (CoordinateFiniteDifferences(coordinates=5, ratios="uniform"), {"coordinates": 5}),  # has no sites
        (Backprop(), {}),
    ],
)
def test_queries_of_a_sample_are_counted_by_samples_whatever_the_strategy_runs(
    strategy: ForwardGradientStrategy, by_site, tmp_path
):
    run(tmp_path, [RunSummary()], strategy)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["samples"] == 3 * 32
    assert summary["queries_per_sample"] == sum(by_site.values())
    assert summary["queries_by_site"] == {site: queries * 3 * 32 for site, queries in by_site.items()}


def test_an_epoch_counts_the_samples_of_its_last_smaller_batch(tmp_path):
    run(tmp_path, [RunSummary()], MeZO(), limit_train_batches=1.0)
    data = DigitsDataModule()
    data.setup("fit")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["samples"] == len(data.train_set)
    assert summary["queries_per_sample"] == 2


def test_the_memory_of_a_process_is_that_of_its_high_water_mark():
    code = (
        "import torch; from flops_lightning.network.memory import peak_memory as peak\n"
        "cpu = torch.device('cpu'); before = peak(cpu)[0]; held = torch.ones(2**26); full = peak(cpu)[0]\n"
        "del held; print(before, full, peak(cpu)[0], peak(cpu)[1])"
    )
    # Started from a process that holds more: what the parent once held is not the child's.
    held = torch.ones(2**27)
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    del held
    before, full, after, where = answer.stdout.split()
    assert where == "process"
    assert float(full) - float(before) == pytest.approx(256, abs=8)  # 2^26 float32
    assert float(after) == pytest.approx(float(full), abs=8)
    assert float(before) > 100  # torch itself


def test_exported_weights_are_timms(tmp_path):
    task, _ = run(tmp_path, [RunSummary()])
    plain = timm.create_model("vit_tiny_patch16_224", num_classes=10, **KWARGS)
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(plain.eval()(x), task.eval()(x))


def test_export_can_be_turned_off_and_training_is_unchanged_by_the_tests(tmp_path):
    with_summary, _ = run(tmp_path, [RunSummary(export_weights=False)])
    without, _ = run(tmp_path / "other", [])
    assert not (tmp_path / "model.safetensors").exists()
    pairs = zip(with_summary.parameters(), without.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("streamed", [False, True])
def test_ranks_share_the_test_images_and_each_reads_its_own(streamed):
    read: list[int] = []

    class Images(Dataset[int]):
        def __len__(self) -> int:
            return 11

        def __getitem__(self, place: int) -> int:
            read.append(place)
            return place

    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(11))

    def rank(number: int) -> SingleProcess:
        ranks = SingleProcess()
        ranks.rank, ranks.size = number, 3
        return ranks

    loader = DataLoader(Stream() if streamed else Images(), batch_size=2)
    shares = [torch.cat([*_share(loader, rank(number)), torch.empty(0)]).tolist() for number in range(3)]
    assert sorted(place for share in shares for place in share) == list(range(11))
    assert max(map(len, shares)) - min(map(len, shares)) <= 2
    assert sorted(read) == ([] if streamed else list(range(11)))


def test_double_precision_runs(tmp_path):
    run(tmp_path, [RunSummary()], precision="64-true")
    assert 0 <= json.loads((tmp_path / "summary.json").read_text())["test_accuracy"] <= 1


def test_without_a_data_module_accuracies_are_unknown(tmp_path):
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


def test_a_trial_run_leaves_nothing_behind(tmp_path):
    run(tmp_path, [RunSummary()], fast_dev_run=True)
    assert list(tmp_path.iterdir()) == []
