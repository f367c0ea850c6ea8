"""A run of several processes that is stopped goes on; with another number of processes too."""

from __future__ import annotations

import os
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from flops_lightning.callbacks import SaveOnSignal
from tests.processes import torchrun_environments
from tests.resume.runs import FORKS, SETTINGS, files, finish, outcome, start, wait_until, write_config

BACKPROP = {"class_path": "flops_lightning.strategies.Backprop"}


def launch(folder: Path, world_size: int, *arguments: str) -> list[BaseProcess]:
    """Begin a run with the environment that torchrun sets."""
    return [
        start(folder, "--trainer.devices", str(world_size), *arguments, environment=environment)
        for environment in torchrun_environments(world_size)
    ]


def run(folder: Path, world_size: int, *arguments: str) -> None:
    for process in launch(folder, world_size, *arguments):
        finish(process, folder)


def stop(folder: Path, world_size: int, number: signal.Signals) -> None:
    """Let a run make its first checkpoint, and send the signal to its last process alone."""
    processes = launch(folder, world_size)
    assert wait_until(lambda: bool(files(folder, "*.ckpt")), processes[0])
    os.kill(processes[-1].pid, number)
    for process in processes:
        process.join(timeout=250)
        assert process.exitcode == 128 + number, (folder / "log.txt").read_text()[-3000:]
    (saved,) = files(folder, "last.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] < 8


def folders(tmp_path: Path, *, backprop: bool = False) -> tuple[Path, Path]:
    _allocator, *others = SETTINGS["trainer"]["callbacks"]
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        if backprop:
            write_config(tmp_path / name, model={"strategy": BACKPROP}, callbacks=others)
        else:
            write_config(tmp_path / name)
    return tmp_path / "whole", tmp_path / "stopped"


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_the_run_goes_on_bit_for_bit(tmp_path):
    whole, stopped = folders(tmp_path)
    run(whole, 2)
    stop(stopped, 2, signal.SIGTERM)
    run(stopped, 2, "--ckpt_path", "last")
    (expected, summary_whole), (resumed, summary) = outcome(whole), outcome(stopped)
    assert summary == summary_whole
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes_and_the_same_batches(tmp_path, before, after):
    # Backprop's gradient of a batch does not depend on who has computed which part of it.
    whole, stopped = folders(tmp_path, backprop=True)
    run(whole, 1)
    stop(stopped, before, signal.SIGUSR1)
    run(stopped, after, "--ckpt_path", "last")
    (expected, summary_whole), (resumed, summary) = outcome(whole), outcome(stopped)
    assert [summary[name] for name in ("steps", "samples")] == [summary_whole[name] for name in ("steps", "samples")]
    for name, value in expected.items():
        assert torch.allclose(resumed[name], value, atol=1e-5), name


def _validate_unevenly(folder: str, environment: dict[str, str]) -> None:
    os.environ |= environment
    rank = int(environment["RANK"])
    torch.set_num_threads(1)

    class Interrupted(pl.Callback):
        def on_validation_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
            if rank == 1 and trainer.global_step == 4 and not trainer.sanity_checking:
                os.kill(os.getpid(), signal.SIGTERM)

    batches = torch.utils.data.TensorDataset(torch.randn(8, 4))
    train = torch.utils.data.DataLoader(batches, batch_size=4)
    val = torch.utils.data.DataLoader(batches, batch_size=2 if rank == 0 else 4)  # four batches and two
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=False, logger=False, max_epochs=3,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
        callbacks=[SaveOnSignal(), Interrupted()],
    )  # fmt: skip
    trainer.fit(BoringLine(), train, val)


class BoringLine(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).sum()

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.layer(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_processes_with_unequal_validation_batches_agree_on_a_signal_while_all_validate(tmp_path):
    environments = torchrun_environments(2)
    processes = [FORKS.Process(target=_validate_unevenly, args=(str(tmp_path), each)) for each in environments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=250)
    assert [process.exitcode for process in processes] == [143, 143]
    (saved,) = tmp_path.rglob("last.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == 4  # two epochs were validated unevenly before


@pytest.mark.slow
def test_queries_go_on_with_another_number_of_processes(tmp_path):
    _, stopped = folders(tmp_path)
    stop(stopped, 2, signal.SIGTERM)
    run(stopped, 1, "--ckpt_path", "last")
    _, summary = outcome(stopped)
    trainer, data = SETTINGS["trainer"], SETTINGS["data"]["init_args"]
    steps = trainer["max_epochs"] * trainer["limit_train_batches"]
    assert summary["steps"] == steps
    assert summary["samples"] == steps * data["batch_size"]
