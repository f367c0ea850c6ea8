"""A tiny task on real digits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest

from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.strategies import LikelihoodRatio, SiteSpec
from flops_lightning.tasks import ForwardImageClassifier

MODEL = {
    "model_name": "vit_tiny_patch16_224",
    "model_kwargs": {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 3, "num_heads": 2},
    "num_classes": 10,
}


def two_sites(queries: int = 4, **settings: Any) -> LikelihoodRatio:
    sites = [
        SiteSpec(name="body", stages=["embed", "blocks.2"], queries_per_sample=queries),
        SiteSpec(name="head", stages=["pool", "head"], queries_per_sample=queries),
    ]
    return LikelihoodRatio(sites=sites, seed=0, **settings)


@pytest.fixture
def make_task() -> Callable[..., ForwardImageClassifier]:
    def make(**settings: Any) -> ForwardImageClassifier:
        pl.seed_everything(0, verbose=False)
        return ForwardImageClassifier(**{**MODEL, "strategy": two_sites(), **settings})

    return make


@pytest.fixture
def make_trainer(tmp_path: Any) -> Callable[..., pl.Trainer]:
    def make(**settings: Any) -> pl.Trainer:
        quiet = {
            "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False,
            "enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path,
            "limit_train_batches": 3, "limit_val_batches": 1, "num_sanity_val_steps": 0, "max_epochs": 1,
        }  # fmt: skip
        return pl.Trainer(**{**quiet, **settings})

    return make


@pytest.fixture
def digits() -> DigitsDataModule:
    return DigitsDataModule(batch_size=32)
