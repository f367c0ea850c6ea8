"""A signal to stop: finish the step, save, and end the process."""

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
    """On SIGTERM, SIGUSR1 or Ctrl-C, finish the step, save ``last.ckpt``, and exit with code 128 + signal.

    That is 143 for SIGTERM (preemption), 138 for SIGUSR1, 130 for Ctrl-C; a second Ctrl-C exits at once without saving.
    The file is in the folder of the first ``ModelCheckpoint``, or in ``checkpoints`` under the trainer's
    ``default_root_dir``; ``--ckpt_path last`` resumes from it. A signal during validation saves the state after the
    last step as soon as the validation batch ends; one before training ends the process as without a handler.

    Under SLURM with auto-requeue, the signal to requeue (``#SBATCH --signal=SIGUSR1@90``) also requeues the job.
    (Lightning's own handler saves the state in the middle of a step and exits with code 0.)

    As a ``Checkpoint`` it runs after all other kinds of callbacks, so that their state is that of the finished step. In
    a run of several processes a signal to one of them stops all; they agree at the end of each step.

    Example:
        >>> import signal
        >>> import lightning.pytorch as pl
        >>> from flops_lightning.callbacks import SaveOnSignal
        >>> class Preempted(pl.Callback):
        ...     def on_train_batch_start(self, *hook_arguments):
        ...         signal.raise_signal(signal.SIGTERM)
        >>> callbacks = [SaveOnSignal(), Preempted()]
        >>> trainer = pl.Trainer(accelerator="cpu", logger=False, fast_dev_run=True, callbacks=callbacks)
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> trainer.fit(BoringModel())
        Traceback (most recent call last):
        ...
        flops_lightning.resume.signals.LeftOnSignal: 143
    """

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._process = 0
        self._validated, self._validated_by_all = 0, math.inf

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Correct the progress of a run that stopped at the end of an epoch, see :func:`settle_progress`."""
        if trainer.state.fn == TrainerFn.FITTING:
            settle_progress(checkpoint)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers, after Lightning's."""
        self._take(trainer)

    on_sanity_check_start = on_train_start

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """Save and raise :class:`LeftOnSignal` if a signal has come."""
        # A gradient under way is in the checkpoint, but of several processes up to rounding only.
        received = self._agreed(trainer) if getattr(pl_module, "between_steps", True) else None
        if received:
            self._save_and_leave(trainer, received)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out how many batches all processes share, after each of which they can agree."""
        self._validated, self._validated_by_all = 0, math.inf
        if self._trainer is trainer and trainer.world_size > 1:
            batches = min(sum(trainer.num_val_batches), LONGEST)
            mine = torch.tensor(int(batches), device=trainer.strategy.root_device)
            self._validated_by_all = int(trainer.strategy.reduce(mine, reduce_op="min"))

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any, **__: Any) -> None:
        """The same during the validation of a training run."""
        self._validated += 1
        if self._trainer is not trainer or self._validated > self._validated_by_all:
            return
        received = self._agreed(trainer)
        if received:
            # During validation the module holds the averaged weights: swap them back.
            for average in (c for c in trainer.callbacks if isinstance(c, WeightAveraging)):  # type: ignore[attr-defined]
                average.on_validation_epoch_end(trainer, pl_module)
            self._save_and_leave(trainer, received)

    def on_train_end(self, *_: Any) -> None:
        """Restore the earlier handlers."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._trainer, self._before = None, {}

    def on_exception(self, *_: Any) -> None:
        """Restore the earlier handlers."""
        self.on_train_end()

    def _take(self, trainer: Trainer) -> None:
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        self._trainer, self._process = trainer, os.getpid()
        self._received = signal.SIGTERM if trainer.received_sigterm else None  # the moment before, by Lightning
        for number in {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, _requeue_signal(trainer) or signal.SIGUSR1}:
            self._before[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        received = signal.Signals(number)
        if os.getpid() != self._process or self._trainer is None:
            return  # a forked data worker; its parent handles the signal
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
        """The signal that any of the processes has received; the same on all."""
        if trainer.world_size == 1:
            return self._received
        mine = torch.tensor(int(self._received or 0), device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(mine, reduce_op="max"))
        return signal.Signals(number) if number else None

    def _save_and_leave(self, trainer: Trainer, received: signal.Signals) -> None:
        if not (trainer.sanity_checking or cast("Any", trainer).fast_dev_run):  # else there is nothing to save
            path = save_last(trainer)
            rank_zero_info(f"{received.name}: saved {path}; --ckpt_path {path} goes on from there.")
        if received == _requeue_signal(trainer) and trainer.is_global_zero:
            _requeue()
        raise LeftOnSignal(128 + received)


def _requeue_signal(trainer: Trainer) -> signal.Signals | None:
    """The signal by which SLURM announces the end of the job's time, where the job is to be requeued."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    requeues = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
    return cast("SLURMEnvironment", environment).requeue_signal if requeues else None


def save_last(trainer: Trainer) -> Path:
    """Write ``last.ckpt`` where a signal would, and tell where; every process must call this."""
    path = _folder(trainer) / FILE_NAME
    trainer.save_checkpoint(path)
    return path


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
