"""A tiny classifier of the handwritten digits and a quiet trainer, for every test that trains one."""

from typing import Any

import lightning.pytorch as pl

from flops_lightning.strategies import LikelihoodRatio, SiteSpec
from flops_lightning.tasks import ForwardImageClassifier

TINY = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 3, "num_heads": 2}
MODEL = {"model_name": "vit_tiny_patch16_224", "model_kwargs": TINY, "num_classes": 10}
QUIET = {
    "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
}  # fmt: skip


def two_sites(queries: int = 4, **settings: Any) -> LikelihoodRatio:
    sites = [
        SiteSpec(name="body", stages=["embed", "blocks.2"], queries_per_sample=queries),
        SiteSpec(name="head", stages=["pool", "head"], queries_per_sample=queries),
    ]
    return LikelihoodRatio(sites=sites, seed=0, **settings)


def classifier(**settings: Any) -> ForwardImageClassifier:
    """The same weights wherever it is made."""
    pl.seed_everything(0, verbose=False)
    return ForwardImageClassifier(**{**MODEL, "strategy": two_sites(), **settings})


def quiet_trainer(*callbacks: pl.Callback, **settings: Any) -> pl.Trainer:
    usual = {"callbacks": list(callbacks), "max_epochs": 1, "enable_checkpointing": False}
    return pl.Trainer(**{**QUIET, **usual, **settings})
