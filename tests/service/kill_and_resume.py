"""Trains prompts through a service and kills the trainer on the way: ``METHOD URL FOLDER KILLS``."""

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.resume.checkpoint_files import AtomicCheckpointIO
from flops_lightning.resume.last import last_checkpoint
from flops_lightning.strategies import SPSA, EvolutionStrategies
from tests.clip_digits import BOTH, tuner
from tests.digits import quiet_trainer

EVEN = {name: {**prompt, "queries": 4} for name, prompt in BOTH.items()}
METHODS: dict[str, dict[str, Any]] = {
    "lr": {"strategy": lambda: EvolutionStrategies(seed=0), **BOTH},
    "spsa": {"strategy": lambda: SPSA(seed=0), **EVEN},
    "cma_es": {"search": lambda: {"population": 4, "sigma": 1.0, "seed": 1}, **BOTH},
}
STEPS = 60


def digits() -> DigitsDataModule:
    return DigitsDataModule(batch_size=8, rotation=30.0)


def numbers(task: Any) -> Tensor:
    return torch.cat([p.detach().flatten() for p in task.network.trainable().values()])


class Told(pl.Callback):
    """Says when a step is done."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        print("step", trainer.global_step, flush=True)


def run(method: str, url: str, folder: Path, steps: int = STEPS) -> Tensor:
    settings = {name: given() if callable(given) else given for name, given in METHODS[method].items()}
    service = {"url": url, "connections": 4, "timeout": 10.0, "wait": 0.01}
    task = tuner(model_name="", service=service, **settings)
    saver = ModelCheckpoint(dirpath=folder, every_n_train_steps=2, save_top_k=-1)
    trainer = quiet_trainer(
        saver, Told(), max_steps=steps, max_epochs=-1, limit_val_batches=0, num_sanity_val_steps=0,
        enable_checkpointing=True, plugins=[AtomicCheckpointIO()],
    )  # fmt: skip
    trainer.fit(task, digits(), ckpt_path=last_checkpoint(None, [folder]), weights_only=True)
    task.scorer.client.close()
    torch.save(numbers(task), folder / "numbers.pt")
    return numbers(task)


def kill_and_resume(method: str, url: str, folder: Path, kills: int, *, seed: int) -> None:
    """Start the trainer and kill it within its next three steps, so often; then let it end.

    A fork of this process has everything imported, which takes most of the time of a new one.
    """
    chance, done = random.Random(seed), 0
    while True:
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            os.dup2(writing, sys.stdout.fileno())
            try:
                run(method, url, folder)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(writing)
        wanted = chance.randint(1, 3) if done < kills else 10**9
        with os.fdopen(reading) as told:
            for line in told:
                if line.startswith("step") and (wanted := wanted - 1) <= 0:
                    time.sleep(chance.random() * 0.1)
                    os.kill(child, signal.SIGKILL)
                    break
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            break
        if code != -signal.SIGKILL:
            sys.exit(f"the trainer ended with {code}")
        done += 1
    print("killed", done)


if __name__ == "__main__":
    kill_and_resume(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]), seed=0)
