"""Leave in order: a signal to stop saves at the end of the step that is under way, and then ends the process."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from flops_lightning.resume.loop_progress import settle_progress

FILE_NAME = "last.ckpt"
LONGEST = 2**31 - 1  # batches of a validation without a length


class LeftOnSignal(SystemExit):
    """A signal ended the run after its state was saved; the exit code is 128 + the signal's number."""


class SaveOnSignal(Checkpoint):
    """On SIGTERM, SIGUSR1 or Ctrl-C finishes the step, saves ``last.ckpt``, and leaves with code 128 + signal.

    143 is SIGTERM (preemption), 138 SIGUSR1, 130 Ctrl-C; a second Ctrl-C leaves at once and saves nothing. The file
    lies in the folder of the first ``ModelCheckpoint``, or in ``checkpoints`` under the trainer's ``default_root_dir``,
    and ``--ckpt_path last`` goes on from it. A signal during validation saves the state after the last step as soon as
    the validation batch ends; one before training begins ends the process as if there were no handler.

    Under SLURM with auto-requeue, the signal to requeue (``#SBATCH --signal=SIGUSR1@90``) also requeues the job.
    Lightning's own handler would save whatever the middle of a step has made of the state, and leave with code 0.

    As a ``Checkpoint`` it runs after all callbacks that are none, so that their state is that of the finished step. In
    a run of several processes one signal to one of them stops all; they agree at the end of each step.
    """

    def __init__(self) -> None:
        """Wait for no signal yet."""
        self._trainer: Trainer | None = None
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._process = 0
        self._validated, self._validated_by_all = 0, math.inf

    # -- hooks ---------------------------------------------------------------------------------------------------------

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals, after Lightning has."""
        self._take(trainer)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """See to it that a run can be left at the end of an epoch, and again within the next."""
        if trainer.state.fn == TrainerFn.FITTING:
            settle_progress(checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals, after Lightning has."""
        self._take(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and leave, if a signal came.

        Raises:
            LeftOnSignal: one did.
            CheckpointError: one did, and the state could not be saved.
        """
        # A gradient under way is in the checkpoint, but of several processes up to rounding only.
        between_steps = getattr(pl_module, "between_steps", True)
        received = self._agreed(trainer) if between_steps else None
        if received:
            self._save_and_leave(trainer, received)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out after how many batches all processes still are there to agree."""
        self._validated, self._validated_by_all = 0, math.inf
        if self._trainer is trainer and trainer.world_size > 1:
            batches = min(sum(trainer.num_val_batches), LONGEST)
            mine = torch.tensor(int(batches), device=trainer.strategy.root_device)
            self._validated_by_all = int(trainer.strategy.reduce(mine, reduce_op="min"))

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save and leave, if a signal came during the validation of a training run.

        Raises:
            LeftOnSignal: one did.
            CheckpointError: one did, and the state could not be saved.
        """
        self._validated += 1
        if self._trainer is not trainer or self._validated > self._validated_by_all:
            return
        received = self._agreed(trainer)
        if received:
            # Weights that are averaged stand in the module while it is validated: they change places once more.
            for average in (c for c in trainer.callbacks if isinstance(c, WeightAveraging)):  # type: ignore[attr-defined]
                average.on_validation_epoch_end(trainer, pl_module)
            self._save_and_leave(trainer, received)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back."""
        self._give_back()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._give_back()

    # -- signals -------------------------------------------------------------------------------------------------------

    def _take(self, trainer: Trainer) -> None:
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        self._trainer, self._process = trainer, os.getpid()
        self._received = signal.SIGTERM if trainer.received_sigterm else None  # the moment before, by Lightning
        for number in {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, _requeue_signal(trainer) or signal.SIGUSR1}:
            self._before[number] = signal.signal(number, self._receive)

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._trainer, self._before = None, {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if os.getpid() != self._process or self._trainer is None:
            return  # a forked worker that loads data; the process that it serves takes care
        if received == signal.SIGINT and self._received is not None:
            raise KeyboardInterrupt
        launcher = self._trainer.strategy.launcher
        # A terminal sends Ctrl-C to all processes itself.
        if launcher is not None and self._received is None and received != signal.SIGINT:
            launcher.kill(received)
        self._received = self._received or received
        # Not by the stream: its lock may be held by what the signal interrupted.
        os.write(2, f"\n{received.name}: saving at the end of this step.\n".encode())

    def _agreed(self, trainer: Trainer) -> signal.Signals | None:
        """The signal that one of the processes has received; all get the same answer."""
        if trainer.world_size == 1:
            return self._received
        mine = torch.tensor(int(self._received or 0), device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(mine, reduce_op="max"))
        return signal.Signals(number) if number else None

    # -- leaving -------------------------------------------------------------------------------------------------------

    def _save_and_leave(self, trainer: Trainer, received: signal.Signals) -> None:
        if not (trainer.sanity_checking or cast("Any", trainer).fast_dev_run):  # else there is nothing to save
            path = _folder(trainer) / FILE_NAME
            trainer.save_checkpoint(path)
            rank_zero_info(f"{received.name}: saved {path}; --ckpt_path {path} goes on from there.")
        if received == _requeue_signal(trainer) and trainer.is_global_zero:
            _requeue()
        raise LeftOnSignal(128 + received)


def _requeue_signal(trainer: Trainer) -> signal.Signals | None:
    """The signal by which SLURM announces the end of the job's time, where the job is to be requeued."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    requeues = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
    return cast("SLURMEnvironment", environment).requeue_signal if requeues else None


def _folder(trainer: Trainer) -> Path:
    savers = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    folder = savers[0].dirpath if savers else None
    return Path(folder or Path(trainer.default_root_dir) / "checkpoints")


def slurm_job() -> str | None:
    """The id of the SLURM job that this process belongs to, the same after a requeue; None outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _requeue() -> None:
    command = ["scontrol", "requeue", slurm_job() or ""]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or error
        rank_zero_warn(f"the job is not requeued, {' '.join(command)} failed: {said}")
