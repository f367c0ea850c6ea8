"""Runs of the real command line on digits in processes of their own, to be killed and gone on with."""

import contextlib
import copy
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from flops_lightning.resume.checkpoint_files import AtomicCheckpointIO
from flops_lightning.strategies import SiteSpec
from tests.digits import QUIET, TINY
from tests.forks import SERVER

NAME = "run"
EPOCHS, BATCHES = 2, 4

SETTINGS: dict[str, Any] = {
    "trainer": {
        **QUIET, "logger": True, "max_epochs": EPOCHS, "limit_train_batches": BATCHES, "limit_val_batches": 2,
        "log_every_n_steps": 1,
        "callbacks": [
            {
                "class_path": "flops_lightning.callbacks.QueryAllocatorCallback",
                "init_args": {"allocator": {"class_path": "flops_lightning.allocators.GaussianAllocator"}},
            },
            {"class_path": "flops_lightning.callbacks.RunSummary"},
            {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"every_n_train_steps": 1}},
        ],
    },
    "model": {
        "class_path": "flops_lightning.tasks.ForwardImageClassifier",
        "init_args": {
            "model_name": "vit_tiny_patch16_224",
            "model_kwargs": TINY,
            "strategy": {
                "class_path": "flops_lightning.strategies.LikelihoodRatio",
                "init_args": {
                    "sites": [
                        {"name": "lower", "stages": ["embed", "blocks.1"], "queries_per_sample": 6},
                        {"name": "upper", "stages": ["blocks.2", "head"], "queries_per_sample": 6},
                    ],
                    "pilots": {"sites": "upper", "queries": 2},
                    "token_sigma": True,
                    "learn_sigma": 0.02,
                },
            },
            "optimizer": {"lr": 0.001, "schedule": "cosine", "warmup_steps": 2},
        },
    },
    "data": {"class_path": "flops_lightning.datamodules.DigitsDataModule", "init_args": {"batch_size": 16}},
}  # fmt: skip


def sites(**settings: Any) -> list[SiteSpec]:
    both = {"lower": ["embed", "blocks.1"], "upper": ["blocks.2", "head"]}
    return [SiteSpec(name=name, stages=stages, queries_per_sample=4, **settings) for name, stages in both.items()]


class SlowCheckpointIO(AtomicCheckpointIO):
    """Takes its time to write, so that kills strike there."""

    def write(self, checkpoint: dict[str, Any], partial: Path) -> None:
        super().write(checkpoint, partial)
        content = partial.read_bytes()
        pieces = 10
        with partial.open("wb") as stream:
            for i in range(pieces):
                stream.write(content[i * len(content) // pieces : (i + 1) * len(content) // pieces])
                stream.flush()
                time.sleep(0.02)


def write_config(folder: Path, *, model: Mapping[str, Any] | None = None, **trainer: Any) -> None:
    folder.mkdir(exist_ok=True)
    settings = copy.deepcopy({**SETTINGS, "trainer": {**SETTINGS["trainer"], **trainer}})
    settings["model"]["init_args"].update(model or {})
    (folder / f"{NAME}.yaml").write_text(yaml.safe_dump(settings))


def start(folder: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> BaseProcess:
    """Begin ``python main.py fit`` in a folder with a config."""
    process = SERVER.Process(target=_fit, args=(str(folder), arguments, dict(environment or {})))
    process.start()
    return process


def _fit(folder: str, arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    torch.set_num_threads(1)
    from flops_lightning.cli.command import main

    with Path("log.txt").open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        os.dup2(log.fileno(), sys.__stderr__.fileno())
        main(["fit", "--config", f"{NAME}.yaml", *arguments])


def finish(process: BaseProcess, folder: Path) -> None:
    process.join(timeout=250)
    assert process.exitcode == 0, (folder / "log.txt").read_text()[-3000:]


def wait_until(condition: Callable[[], bool], process: BaseProcess, seconds: float = 250.0) -> bool:
    """Wait; False if the process ended before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if not process.is_alive():
            return False
        time.sleep(0.01)
    raise TimeoutError


def files(folder: Path, pattern: str) -> set[Path]:
    return set((folder / "runs" / NAME).glob(f"*/checkpoints/{pattern}"))


def same(folder: Path, other: Path) -> bool:
    """Whether two finished runs have the same summary and, bit for bit, the same weights."""
    (weights, summary), (others, other_summary) = outcome(folder), outcome(other)
    assert summary == other_summary
    assert weights.keys() == others.keys()
    return all(torch.equal(weights[name], others[name]) for name in weights)


def outcome(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and summary of the run that finished last."""
    (summary,) = (folder / "runs" / NAME).glob("*/summary.json")
    kept = json.loads(summary.read_text())
    (weights,) = summary.parent.glob("*.safetensors")
    return load_file(weights), {
        name: kept[name] for name in ("steps", "samples", "queries", "test_accuracy", "start_accuracy")
    }
