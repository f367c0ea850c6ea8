"""Runs of the comparison of strategies, in processes of their own; finished ones are not repeated."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from experiments.running import RUNNING, STOPPED, StudyStopped

LOGGED = 200
"""Steps of a run whose training loss is logged, about: writing down every step would slow the fast methods."""
LOST = "lost every query to non-finite losses"
"""What a run says that is stopped because its losses are no numbers any more."""

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """One process, whose result is a file in a folder of its own.

    Attributes:
        folder: Where its files go.
        command: What is run.
        result: Name of the file that it ends with, somewhere in the folder.
        keep_weights: Whether the trained weights are of use afterwards.
    """

    folder: Path
    command: tuple[str, ...] = field(repr=False)
    result: str = "summary.json"
    keep_weights: bool = False

    @property
    def finished(self) -> bool:
        """Whether its result is there, or it is known to have diverged."""
        return self.diverged or bool(list(self.folder.rglob(self.result)))

    @property
    def diverged(self) -> bool:
        """Whether it was stopped because its losses were no numbers any more."""
        return (self.folder / "diverged").exists()

    @cached_property
    def output(self) -> dict[str, Any]:
        """What it wrote."""
        (file,) = self.folder.rglob(self.result)
        return dict(json.loads(file.read_text()))

    def run(self, threads: int) -> None:
        """Run it unless it is finished.

        Raises:
            RuntimeError: it failed; what it said is in ``log.txt`` of its folder.
            StudyStopped: a signal ended the study before it was finished.
        """
        if self.finished:
            return
        if RUNNING.stopped:
            raise StudyStopped(STOPPED)
        shutil.rmtree(self.folder, ignore_errors=True)  # what an interrupted run left
        self.folder.mkdir(parents=True)
        log = self.folder / "log.txt"
        with log.open("w") as said:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            code = RUNNING.run(self.command, stdout=said, stderr=said, env=environment)
        if code and LOST in log.read_text():
            (self.folder / "diverged").touch()
        elif code or not self.finished:
            if RUNNING.stopped:
                raise StudyStopped(STOPPED)
            raise RuntimeError(f"{self.folder}: exit code {code}, see log.txt there")
        for file in () if self.keep_weights else self.folder.rglob("model.safetensors"):
            file.unlink()

    def curve(self, tag: str) -> tuple[list[float], list[float]]:
        """Values and times, in seconds, of what was logged under a name."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (events,) = self.folder.rglob("events.out.tfevents.*")
        reader = EventAccumulator(str(events), size_guidance={"scalars": 0})
        reader.Reload()
        scalars = reader.Scalars(tag)
        return [event.value for event in scalars], [event.wall_time for event in scalars]

    @property
    def late_loss(self) -> float:
        """Mean training loss over the last quarter of the run; infinite where it is no number."""
        if self.diverged:
            return math.inf
        losses, _ = self.curve("train/loss")
        late = statistics.fmean(losses[-max(1, len(losses) // 4) :])
        return late if math.isfinite(late) else math.inf


def arguments(settings: Settings) -> list[str]:
    """As on the command line."""
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def fit(
    folder: Path,
    files: Sequence[str],
    extra: Sequence[str],
    settings: Settings,
    *,
    steps: int = 0,
    keep_weights: bool = False,
) -> Job:
    """A run of so many optimiser steps (0: as the configuration says), without validation and checkpoints.

    Args:
        folder: Where its files go.
        files: Configuration files.
        extra: The user's arguments, which rule over the files.
        settings: What the study sets, which rules over both.
        steps: Where a cosine schedule ends, too.
        keep_weights: Whether the trained weights are of use afterwards.
    """
    lean = {
        "trainer.default_root_dir": folder,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_checkpointing": "false",
        "trainer.limit_val_batches": 0,
    }
    length = {
        "trainer.max_epochs": -1,
        "trainer.max_steps": steps,
        "trainer.log_every_n_steps": max(1, steps // LOGGED),
    }
    given = {**lean, **(length if steps else {}), **settings}
    configs = [part for file in files for part in ("--config", file)]
    command = (sys.executable, "main.py", "fit", *configs, *extra, *arguments(given))
    return Job(folder, command, keep_weights=keep_weights)
