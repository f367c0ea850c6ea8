"""What the command line adds so that runs can be resumed: complete checkpoints, and ``--ckpt_path last``."""

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins.io import CheckpointIO

from flops_lightning.resume.checkpoint_files import AtomicCheckpointIO, newest_checkpoint
from flops_lightning.resume.signals import SaveOnSignal, slurm_job


def with_checkpoint_io(given: Any) -> list[Any]:
    """The plugins with an :class:`AtomicCheckpointIO`, unless the user has chosen another writer."""
    plugins = _listed(given)
    return plugins if any(isinstance(each, CheckpointIO) for each in plugins) else [*plugins, AtomicCheckpointIO()]


def with_savers(given: Callback | Sequence[Callback] | None) -> list[Callback]:
    """The callbacks with a ``ModelCheckpoint`` and a :class:`SaveOnSignal`, unless they are there already."""
    callbacks: list[Callback] = _listed(given)
    if not any(isinstance(each, Checkpoint) and not isinstance(each, SaveOnSignal) for each in callbacks):
        callbacks.append(ModelCheckpoint())
    return callbacks if any(isinstance(each, SaveOnSignal) for each in callbacks) else [*callbacks, SaveOnSignal()]


def job_version(folder: Path) -> str | None:
    """A new name for a run's folder that contains the SLURM job; None outside SLURM."""
    name = _job_name()
    if name is None:
        return None
    taken = len(list(folder.glob(f"{name}.*"))) if folder.is_dir() else 0
    return f"{name}.{taken}"


def started_again() -> bool:
    """Whether SLURM has started this job before."""
    return _job_name() is not None and int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0


def last_checkpoint(runs: Path | None, own: Sequence[Path]) -> Path | None:
    """The undamaged checkpoint written last, under SLURM preferably by this job; None where there is none.

    ``runs`` holds a folder for each run of a name; ``own`` are further folders. Below the folder ``checkpoints`` of a
    run they may lie at any depth: a metric's name in ``filename`` has a slash.
    """
    name = _job_name()
    for pattern in (f"{name}.*", "*") if name else ("*",):
        folders = [*own, *(runs.glob(f"{pattern}/checkpoints/**") if runs else ())]
        if newest := newest_checkpoint(folders, counts=zipfile.is_zipfile):
            return newest
    return None


def unfit_checkpoint(runs: Path | None, own: Sequence[Path]) -> Path | None:
    """The newest file or folder ``*.ckpt`` of these runs, whether or not it can be resumed from."""
    return newest_checkpoint([*own, *(runs.glob("**") if runs else ())], counts=Path.exists)


def written_to(callbacks: Any) -> list[Path]:
    """Folders (``dirpath``) of the configured callbacks, and those below that the slashes of their file names make."""
    found = []
    for given in filter(None, (each.get("init_args") for each in _listed(callbacks))):
        if given.get("dirpath"):
            folder, depth = Path(str(given.get("dirpath"))), str(given.get("filename") or "").count("/")
            found += [folder, *(each for n in range(depth) for each in folder.glob("*/" * (n + 1)))]
    return found


def runs_of_logger(logger: Any) -> Path | None:
    """The folder in which a configured logger makes one for each run; None where it alone knows."""
    first = _listed(logger)[0]
    given = first.get("init_args")
    local = str(first.get("class_path")).endswith(("TensorBoardLogger", "CSVLogger")) and given
    return Path(str(given.get("save_dir"))) / str(given.get("name") or "") if local else None


def _job_name() -> str | None:
    job = slurm_job() if SLURMEnvironment.detect() else None
    return None if job is None else f"job_{job}"


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
