"""A signal to stop, wherever in a step it comes, leaves a checkpoint of that step's end behind."""

import functools
import os
import signal
from collections.abc import Callable

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Checkpoint, EMAWeightAveraging, ModelCheckpoint
from torch import Tensor

from flops_lightning.allocators import OptimalAllocator
from flops_lightning.callbacks import QueryAllocatorCallback, SaveOnSignal
from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.errors import SettingError
from flops_lightning.resume.checkpoint_files import AtomicCheckpointIO
from flops_lightning.strategies import LikelihoodRatio
from flops_lightning.tasks import ForwardImageClassifier, OptimizerSettings
from tests.digits import classifier, quiet_trainer
from tests.resume.runs import sites

BATCHES, EPOCHS = 3, 2


class Send(pl.Callback):
    """Sends signals to this process while a batch is being worked on."""

    def __init__(self, number: signal.Signals, hook: str, at: int = 0) -> None:
        self.number, self.hook, self.at = number, hook, at
        setattr(self, hook, self._send)

    def _send(self, trainer: pl.Trainer, *_: object, **__: object) -> None:
        if trainer.global_step >= self.at:
            os.kill(os.getpid(), self.number)


def task(accumulate: int = 1) -> ForwardImageClassifier:
    return classifier(
        strategy=LikelihoodRatio(sites=sites(), seed=0, token_sigma=True),
        optimizer=OptimizerSettings(accumulate_grad_batches=accumulate, schedule="cosine"),
    )


def trainer(folder: object, *callbacks: pl.Callback, **settings: object) -> pl.Trainer:
    # What saves comes first here: it must not run before the allocator has learned from the step.
    every = [ModelCheckpoint(), SaveOnSignal(), *callbacks, QueryAllocatorCallback(allocator=OptimalAllocator())]
    limits = {"limit_train_batches": BATCHES, "limit_val_batches": 2, "num_sanity_val_steps": 0, "max_epochs": EPOCHS}
    own = {"default_root_dir": folder, "enable_checkpointing": True, "plugins": [AtomicCheckpointIO()]}
    return quiet_trainer(*every, **limits, **own, **settings)


def weights(module: pl.LightningModule) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Callable[[int], tuple[Tensor, int]]:
    """Weights and draws at the end of a run whose steps have so many batches."""

    @functools.cache
    def run(accumulate: int) -> tuple[Tensor, int]:
        whole = task(accumulate)
        trainer(tmp_path_factory.mktemp("whole")).fit(whole, DigitsDataModule(batch_size=8))
        return weights(whole), whole.strategy.draw

    return run


@pytest.mark.parametrize(
    ("number", "hook", "at", "code"),
    [
        (signal.SIGTERM, "on_train_batch_start", 1, 143),
        (signal.SIGUSR1, "on_train_batch_start", 2, 138),  # in the last step of an epoch
        (signal.SIGINT, "on_before_optimizer_step", 3, 130),
        (signal.SIGTERM, "on_validation_batch_start", BATCHES, 143),
        (signal.SIGTERM, "on_train_start", 0, 143),
    ],
)
def test_a_signal_saves_at_the_end_of_the_step(tmp_path, uninterrupted, number, hook, at, code):
    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    stopped = trainer(tmp_path, Send(number, hook, at))
    with pytest.raises(SystemExit) as leaving:
        stopped.fit(task(), DigitsDataModule(batch_size=8))
    assert leaving.value.code == code
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == (at if hook == "on_validation_batch_start" else at + 1)
    assert saved["forward_gradient"]["strategy"]["draw"] == saved["global_step"]
    resumed = task()
    trainer(tmp_path).fit(resumed, DigitsDataModule(batch_size=8), ckpt_path="last")
    expected, draws = uninterrupted(1)
    assert torch.equal(weights(resumed), expected)
    assert resumed.strategy.draw == draws
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before


class SaveAt(Checkpoint):
    """Saves in a hook of a batch, after the allocator has learned from it, and stops the run there."""

    def __init__(self, hook: str, batch: int, path: object) -> None:
        def save(trainer: pl.Trainer, *_: object) -> None:
            if trainer.fit_loop.total_batch_idx + 1 == batch:
                trainer.save_checkpoint(str(path))
                trainer.should_stop = True

        setattr(self, hook, save)


@pytest.mark.parametrize(
    ("hook", "batch"), [("on_train_batch_end", 1), ("on_train_batch_end", 4), ("on_validation_end", 1)]
)
def test_a_gradient_that_waits_for_its_step_goes_on_waiting_after_a_resume(tmp_path, uninterrupted, hook, batch):
    resumed, settings = task(accumulate=2), {"val_check_interval": 1}
    stopping = SaveAt(hook, batch, tmp_path / "c.ckpt")
    trainer(tmp_path / "a", stopping, **settings).fit(task(accumulate=2), DigitsDataModule(batch_size=8))
    assert torch.load(tmp_path / "c.ckpt", weights_only=True)["forward_gradient"]["gathered"]["batches"] == 1
    trainer(tmp_path / "b", **settings).fit(resumed, DigitsDataModule(batch_size=8), ckpt_path=tmp_path / "c.ckpt")
    assert torch.equal(weights(resumed), uninterrupted(2)[0])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_averaged_weights_and_those_that_learn_change_places_before_a_signal_saves(tmp_path, accumulate):
    def average() -> EMAWeightAveraging:
        return EMAWeightAveraging(decay=0.5, update_every_n_steps=1)

    whole, resumed = task(accumulate), task(accumulate)
    trainer(tmp_path / "whole", average(), val_check_interval=1).fit(whole, DigitsDataModule(batch_size=8))
    stopped = trainer(
        tmp_path, average(), Send(signal.SIGTERM, "on_validation_batch_start", at=1), val_check_interval=1
    )
    with pytest.raises(SystemExit):
        stopped.fit(task(accumulate), DigitsDataModule(batch_size=8))
    trainer(tmp_path, average(), val_check_interval=1).fit(resumed, DigitsDataModule(batch_size=8), ckpt_path="last")
    assert (weights(resumed) == weights(whole)).all()
    with pytest.raises(SettingError, match="no callback averages weights, but the checkpoint's run does"):
        trainer(tmp_path).fit(task(accumulate), DigitsDataModule(batch_size=8), ckpt_path="last")


def test_a_second_interrupt_leaves_at_once_and_saves_nothing(tmp_path):
    class Impatient(pl.Callback):
        def on_train_batch_start(self, *_: object) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(SystemExit):
        trainer(tmp_path, Impatient()).fit(task(), DigitsDataModule(batch_size=8))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_during_the_sanity_check_there_is_nothing_to_save(tmp_path):
    stopped = trainer(tmp_path, Send(signal.SIGTERM, "on_validation_batch_start"))
    stopped.num_sanity_val_steps = 1
    with pytest.raises(SystemExit) as leaving:
        stopped.fit(task(), DigitsDataModule(batch_size=8))
    assert leaving.value.code == 143
    assert not list(tmp_path.rglob("*.ckpt"))


def test_slurm_requeues_the_job_after_its_signal(tmp_path, monkeypatch):
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    monkeypatch.setenv("SLURM_JOB_ID", "77")
    called = tmp_path / "called"
    command = tmp_path / "scontrol"
    command.write_text(f'#!/bin/sh\nls {tmp_path}/checkpoints > {called}\necho "$@" >> {called}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    stopped = trainer(tmp_path, Send(signal.SIGUSR1, "on_train_batch_start"))
    monkeypatch.setattr(type(stopped.strategy), "cluster_environment", SLURMEnvironment(), raising=False)
    with pytest.raises(SystemExit) as leaving:
        stopped.fit(task(), DigitsDataModule(batch_size=8))
    assert leaving.value.code == 138
    assert called.read_text().split("\n")[-3:-1] == ["last.ckpt", "requeue 77"]
