"""Checkpoints that are complete or absent: a full disk, a lost folder or a kill never costs the last good one."""

import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from flops_lightning.errors import CheckpointError

PARTIAL = ".partial"
"""Suffix of files that are being written."""
ABANDONED = 24 * 3600.0
"""Seconds after which a partial file of another machine counts as left by a killed run."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target, syncs to disk, and only then gives the file its name (``os.replace``).

    A failure before that leaves an earlier file of that name as it was. (Lightning writes to the system's temporary
    folder and moves: across file systems that is a copy, which can be cut in half.) What killed runs left behind is
    removed at the next save into the folder, and at the next load from it. Object stores (``s3://...``) are left to
    Lightning. A state saved while an exception is handled in the middle of a step (``save_on_exception``) is not
    written: parameters, schedule and data would not belong together.
    """

    _good: Path | None = None  # what the run has saved last, or resumed from

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a checkpoint, or raise a :class:`CheckpointError`: whatever was there before still is."""
        if sys.exc_info()[1] is not None and in_mid_step(checkpoint):
            rank_zero_warn(f"{path} is not written: the exception came in the middle of a step.")
            return
        if "://" in str(path) or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(target.parent)
            write_whole(target, lambda partial: self.write(checkpoint, partial))
        except (OSError, RuntimeError) as error:
            cause = _system_error(error)
            if cause is None:  # not a matter of the disk
                raise
            good = self._good if self._good and self._good.is_file() else None
            raise CheckpointError(target, cause, newest_checkpoint([target.parent]) or good) from error
        self._good = target

    def write(self, checkpoint: dict[str, Any], partial: Path) -> None:
        """Write the content to a file that has no checkpoint's name yet."""
        with partial.open("wb") as stream:
            torch.save(checkpoint, stream)
            stream.flush()
            os.fsync(stream.fileno())

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Read a checkpoint, and remove what a killed run left beside it."""
        if "://" not in str(path):
            self._good = Path(path)
            with suppress(OSError):  # the folder may belong to somebody else
                remove_abandoned(Path(path).parent)
        return super().load_checkpoint(path, map_location, weights_only)


def in_mid_step(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a Lightning checkpoint was made between the start and the end of a training batch."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {}).get("total", {})
    return progress.get("ready") != progress.get("processed")


def write_whole(target: Path, write: Callable[[Path], None]) -> None:
    """Replace ``target`` at once: ``write`` fills another file in its folder, which then takes its name."""
    partial = target.parent / f".{socket.gethostname()}-{os.getpid()}{PARTIAL}"
    try:
        write(partial)
        partial.replace(target)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # some file systems cannot bring folders to the disk
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_abandoned(folder: Path) -> None:
    """Remove partial files of processes that are gone."""
    here = socket.gethostname()
    for partial in folder.glob(f".*{PARTIAL}"):
        host, _, process = partial.name[1:].removesuffix(PARTIAL).rpartition("-")
        with suppress(FileNotFoundError):  # another process was faster
            if host == here and process.isdigit():
                gone = int(process) == os.getpid() or not _alive(int(process))
            else:
                gone = time.time() - partial.stat().st_mtime > ABANDONED
            if gone:
                partial.unlink()


def newest_checkpoint(folders: Iterable[Path], *, counts: Callable[[Path], bool] = Path.is_file) -> Path | None:
    """The checkpoint written last among the files that count; broken links do not."""
    files = {file: file.stat().st_mtime_ns for folder in folders for file in folder.glob("*.ckpt") if counts(file)}
    return max(files, key=files.__getitem__, default=None)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)
    return True


def _system_error(error: BaseException | None) -> OSError | None:
    # torch closes its archive when a write fails, which fails again and hides what happened first.
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error
