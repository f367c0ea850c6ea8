"""One of two processes that tune prompts through one service: ``2 URL FOLDER`` writes ``FOLDER/RANK.json``.

A run of four steps; the same run stopped by ``max_queries`` after two of them; and that one resumed.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from flops_lightning.callbacks import RunSummary
from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.errors import SpentQueriesError
from tests.clip_digits import tuner
from tests.digits import quiet_trainer

STEP = 2 * (4 + 1 + 4 * 4 + 3)
"""Rows of a step of both, with four images each."""
START = 2 * 64
"""Images at which the image prompt starts."""
LIMIT = START + 3 * STEP - 1


def fit(url: str, folder: Path, *callbacks: Any, limit: int = 0, ckpt_path: Path | None = None) -> Any:
    service = {"url": url, "connections": 2, "timeout": 30.0, "wait": 0.01}
    task = tuner(model_name="", service=service, max_queries=limit)
    trainer = quiet_trainer(
        ModelCheckpoint(dirpath=folder, save_top_k=0), *callbacks, devices=2, max_steps=4, limit_val_batches=0,
        num_sanity_val_steps=0, enable_checkpointing=True, default_root_dir=folder,
    )  # fmt: skip
    stopped = ""
    try:
        trainer.fit(task, DigitsDataModule(batch_size=8, rotation=30.0), ckpt_path=ckpt_path, weights_only=True)
    except SpentQueriesError as error:
        stopped = str(error)
    numbers = torch.cat([p.detach().flatten() for p in task.network.trainable().values()]).tolist()
    task.scorer.client.close()
    logged = float(trainer.callback_metrics["service/rows"])
    return {"steps": trainer.global_step, "rows": task.scorer.usage.rows, "numbers": numbers, "stopped": stopped,
            "logged": logged}  # fmt: skip


def run(url: str, folder: Path) -> dict[str, Any]:
    whole = fit(url, folder / "whole", RunSummary(export_weights=False))
    part = fit(url, folder / "part", limit=LIMIT)
    saved = torch.load(folder / "part" / "last.ckpt", weights_only=True)["service"]
    later = fit(url, folder / "part", limit=START + 4 * STEP, ckpt_path=folder / "part" / "last.ckpt")
    return {"whole": whole, "part": part, "saved": saved, "later": later}


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = run(sys.argv[2], Path(sys.argv[3]))
    rank = torch.distributed.get_rank()
    Path(sys.argv[3], f"{rank}.json").write_text(json.dumps(found))
