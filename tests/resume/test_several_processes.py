"""A run of several processes that is stopped goes on; with another number of processes too."""

import os
import shutil
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset

from flops_lightning.callbacks import SaveOnSignal
from tests.digits import quiet_trainer
from tests.forks import SERVER
from tests.processes import torchrun_environments
from tests.resume.runs import SETTINGS, files, finish, outcome, same, start, wait_until, write_config

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


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_the_run_goes_on_bit_for_bit_or_in_one_process(tmp_path):
    whole, stopped, alone = (tmp_path / name for name in ("whole", "stopped", "alone"))
    for folder in (whole, stopped):
        write_config(folder)
    run(whole, 2)
    stop(stopped, 2, signal.SIGTERM)
    shutil.copytree(stopped, alone)
    run(stopped, 2, "--ckpt_path", "last")
    assert same(stopped, whole)
    run(alone, 1, "--ckpt_path", "last")
    (_, expected), (_, summary) = outcome(whole), outcome(alone)
    assert [summary[name] for name in ("steps", "samples")] == [expected[name] for name in ("steps", "samples")]


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes_and_the_same_batches(tmp_path):
    # Backprop's gradient of a batch does not depend on who has computed which part of it.
    _allocator, *others = SETTINGS["trainer"]["callbacks"]
    for name in ("whole", "two then one", "one then two"):
        write_config(tmp_path / name, model={"strategy": BACKPROP}, callbacks=others)
    run(tmp_path / "whole", 1)
    expected, summary_whole = outcome(tmp_path / "whole")
    for name, before, after in (("two then one", 2, 1), ("one then two", 1, 2)):
        stop(tmp_path / name, before, signal.SIGUSR1)
        run(tmp_path / name, after, "--ckpt_path", "last")
        resumed, summary = outcome(tmp_path / name)
        assert all(summary[each] == summary_whole[each] for each in ("steps", "samples"))
        torch.testing.assert_close(resumed, expected, rtol=0, atol=1e-5)


def _validate_unevenly(folder: str, environment: dict[str, str]) -> None:
    os.environ |= environment
    rank = int(environment["RANK"])
    torch.set_num_threads(1)

    class Interrupted(pl.Callback):
        def on_validation_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
            if rank == 1 and trainer.global_step == 4 and not trainer.sanity_checking:
                os.kill(os.getpid(), signal.SIGTERM)

    data = RandomDataset(32, 8)
    train = torch.utils.data.DataLoader(data, batch_size=4)
    val = torch.utils.data.DataLoader(data, batch_size=2 if rank == 0 else 4)  # four batches and two
    several = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False, "default_root_dir": folder}
    trainer = quiet_trainer(SaveOnSignal(), Interrupted(), max_epochs=3, enable_checkpointing=True, **several)
    trainer.fit(BoringModel(), train, val)


def test_processes_with_unequal_validation_batches_agree_on_a_signal_while_all_validate(tmp_path):
    environments = torchrun_environments(2)
    processes = [SERVER.Process(target=_validate_unevenly, args=(str(tmp_path), each)) for each in environments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=250)
    assert [process.exitcode for process in processes] == [143, 143]
    (saved,) = tmp_path.rglob("last.ckpt")
    assert torch.load(saved, weights_only=True)["global_step"] == 4  # two epochs were validated unevenly before
