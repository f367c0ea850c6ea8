"""A few real training steps by Lightning's own loop, on the run's task, data and allocator; nothing is kept."""

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.warnings import PossibleUserWarning

from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.datamodules.loading import KeyedLoaders, local_batch_size
from flops_lightning.errors import SettingError
from flops_lightning.plan.stopwatch import Clock, Measured, Stopwatch
from flops_lightning.plan.trainer import callbacks_of
from flops_lightning.strategies import ForwardGradientStrategy

LIMITS = ("max_epochs", "max_steps", "limit_train_batches", "limit_val_batches")

Settings = Mapping[str, Any]


def measure(
    task: LightningModule, strategy: ForwardGradientStrategy, datamodule: LightningDataModule | None, run: Trainer,
    settings: Settings, *, seconds: float, clock: Clock,
) -> Measured:  # fmt: skip
    """Train the task for a few seconds, one step at least, and return what the steps showed.

    ``run`` is the trainer of the planned run, made of ``settings``; it is asked for its limits and runs nothing. Raises
    :class:`SettingError` if these leave no step to run, or a fit would refuse the settings.
    """
    with TemporaryDirectory(prefix="plan_") as folder, share_of_batch(datamodule, run.world_size):
        watch = Stopwatch(strategy, run, Path(folder), seconds=seconds, clock=clock)
        trainer = Trainer(**measuring_settings(run, settings, watch, folder))
        trainer.fit(task, datamodule=datamodule)
    if not watch.ends:
        limits = {name: getattr(run, name) for name in LIMITS[:3]}
        raise SettingError("trainer", limits, "leave no step to run.", "Set these limits above 0, or -1 for none.")
    return watch.measured()


def measuring_settings(run: Trainer, settings: Settings, watch: Callback, folder: str) -> dict[str, Any]:
    """Arguments of a trainer that takes the run's steps in one process and writes to ``folder`` only."""
    logs = settings.get("logger") not in (False, []) and not settings.get("barebones")
    changed: dict[str, Any] = {
        "default_root_dir": folder,
        "logger": TensorBoardLogger(folder) if logs else False,
        "callbacks": [*allocators_of(settings), watch],
        **dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
        **dict.fromkeys(("barebones", "fast_dev_run"), False),
        # Validation is timed beforehand, batch by batch: a whole one could take longer than all that is measured.
        "num_sanity_val_steps": 5,
        "check_val_every_n_epoch": 10**9,
        # As the run has them: a schedule looks at its end.
        **{name: getattr(run, name) for name in LIMITS},
        **dict.fromkeys(("max_time", "min_epochs", "min_steps", "profiler")),
    }
    if settings.get("check_val_every_n_epoch", 1) is None or validates_by_the_clock(settings):
        changed["val_check_interval"] = 1.0
    if run.world_size > 1:
        changed |= {"devices": 1, "num_nodes": 1, "strategy": "auto"}
    return {**settings, **changed}


def allocators_of(settings: Settings) -> list[QueryAllocatorCallback]:
    """Those of the callbacks that allocate queries."""
    return [callback for callback in callbacks_of(settings) if isinstance(callback, QueryAllocatorCallback)]


def validates_by_the_clock(settings: Settings) -> bool:
    """Whether validation comes after a time, and not after a number of batches."""
    return not isinstance(settings.get("val_check_interval"), (int, float, type(None)))


@contextmanager
def share_of_batch(datamodule: LightningDataModule | None, processes: int) -> Iterator[None]:
    """Give a data module of this package the batch size of one process; others state that one anyway."""
    if not isinstance(datamodule, KeyedLoaders):
        yield
        return
    whole = datamodule.batch_size
    datamodule.batch_size = local_batch_size(whole, processes)
    try:
        yield
    finally:
        datamodule.batch_size = whole


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Lightning says about every fit: the user has not asked for this one."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", message=".*LeafSpec")  # lightning 2.6 calls torch by a name of the past
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
