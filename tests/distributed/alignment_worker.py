"""One process of several: trains an adapter, started with the environment that torchrun sets.

``python -m tests.distributed.alignment_worker SIZE FOLDER URL`` reads ``FOLDER/llm`` and ``FOLDER/photos``, and writes
``FOLDER/RANK.pt``: the adapter, the width of the noise, and how many photos this process has encoded; then the same of
a run whose captions the service scores, stopped by ``max_queries`` and gone on with, and what each part has asked for.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from flops_lightning.errors import SpentQueriesError
from flops_lightning.language import RemoteCaptionLoss
from flops_lightning.strategies import LikelihoodRatio, SiteSpec
from tests.aligned import aligner, captions, fitted

STEPS, BATCH, QUERIES, HELD_OUT = 4, 6, 20, 6
STEP = BATCH * (1 + QUERIES)
LIMIT = 3 * STEP + HELD_OUT - 1
"""Enough for two steps, but not for a validation and a third."""


def learner(llm: Any, **settings: Any) -> Any:
    sites = [SiteSpec(["adapter"], name="adapter", queries_per_sample=QUERIES)]
    return aligner(llm, init="default", strategy=LikelihoodRatio(sites=sites, seed=0), **settings)


def fit(task: Any, folder: Path, *callbacks: Any, **settings: Any) -> Any:
    data = captions(folder / "photos", cache_dir=str(folder / "features"), batch_size=BATCH)
    usual = {"max_epochs": 2, "max_steps": STEPS, "devices": int(sys.argv[1])}
    return fitted(task, data, folder, *callbacks, **usual, **settings)


def through_service(url: str, folder: Path, limit: int, resume: Path | None = None) -> dict[str, Any]:
    scorer = RemoteCaptionLoss(url, connections=2, timeout=10.0, attempts=30, wait=0.02, max_rows=8)
    task = learner(scorer, llm_kwargs={"tokenizer": str(folder / "llm")}, max_queries=limit)
    stopped = ""
    try:
        saver = ModelCheckpoint(dirpath=folder, save_top_k=0)
        fit(task, folder, saver, enable_checkpointing=True, resume=resume)
    except SpentQueriesError as error:
        stopped = str(error)
    scorer.client.close()
    meter = task.strategy.meter.total()
    return {
        "adapter": task.adapter.state_dict(), "steps": task.strategy.draw, "stopped": stopped,
        "usage": scorer.usage.state_dict(), "queries": meter.queries, "lost": meter.lost,
    }  # fmt: skip


def main(folder: Path, url: str) -> None:
    task, seen = learner(str(folder / "llm")), []
    encode = task.features_of
    task.features_of = lambda images: (seen.append(len(images)), encode(images))[1]
    trainer = fit(task, folder)
    found = {"adapter": task.adapter.state_dict(), "sigma": task.sigma, "encoded": sum(seen)}
    part = through_service(url, folder, LIMIT)
    later = through_service(url, folder, LIMIT + STEP + HELD_OUT + 1, folder / "last.ckpt")
    torch.save({**found, "part": part, "later": later}, folder / f"{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[2]), sys.argv[3])
