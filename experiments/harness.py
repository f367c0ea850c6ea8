"""Runs of a study as child processes: a finished run is not repeated, and no run outlives its study."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from flops_lightning.errors import SettingError

COMMAND, DIVERGED = "command.json", "diverged"
NON_FINITE = "lost every query to non-finite losses"  # in the log of a run that diverged
GRACE = 120.0  # seconds that a run has to save and leave


class StudyStopped(SystemExit):
    """A signal ended the study before its runs were done."""


class RunFailedError(RuntimeError):
    """A run ended without its result; the message says where its output is."""


@dataclass(frozen=True)
class Cell:
    """One run of a study, in a folder of its own."""

    study: Path
    name: str  # of the run's folder in that of the study
    arguments: tuple[str, ...]  # of Python, such as ("main.py", "fit", ...)
    result: str = "summary.json"  # the JSON file that marks the run as finished
    resumes: bool = False  # from its last checkpoint; otherwise an unfinished folder is emptied
    keeps_weights: bool = False  # also when it has finished
    may_diverge: bool = False  # non-finite losses are an outcome, and not a failure

    @property
    def folder(self) -> Path:
        return self.study / self.name

    @property
    def command(self) -> list[str]:
        return [sys.executable, *self.arguments]

    @property
    def diverged(self) -> bool:
        """Whether it stopped because its losses were not finite any more."""
        return (self.folder / DIVERGED).exists()

    @property
    def finished(self) -> bool:
        return self.diverged or bool(self._results())

    @property
    def summary(self) -> dict[str, Any]:
        return self._results()[-1][1]

    def curve(self, tag: str) -> list[Any]:
        """TensorBoard events (``step``, ``value``, ``wall_time``) of a finished run under a tag."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        # Beside the result: attempts that were interrupted left their events in other folders.
        reader = EventAccumulator(str(self._results()[-1][0].parent), size_guidance={"scalars": 0})
        reader.Reload()
        return list(reader.Scalars(tag))

    @property
    def outcome(self) -> str:
        if self.diverged:
            return "diverged"
        return f"test accuracy {self.summary['test_accuracy']:.1%}" if "test_accuracy" in self.summary else "done"

    @property
    def late_loss(self) -> float:
        """Mean training loss over the last quarter of the run; infinite where it is not finite."""
        return math.inf if self.diverged else late_mean([event.value for event in self.curve("train/loss")])

    def claim(self) -> str:
        """Its settings as they are noted in its folder; raises a :class:`SettingError` if that holds other ones."""
        # Without the path of the study, which may be moved.
        settings = [re.sub(rf"^{re.escape(str(self.study))}(?=/|$)", "STUDY", part) for part in self.arguments]
        return _note(self.study, self.folder / COMMAND, settings, self.name)

    def run(self, children: "Children", threads: int) -> None:
        """Run it; raises :class:`RunFailedError` if it failed, :class:`StudyStopped` if a signal ended it."""
        children.check()
        if not self.resumes:
            shutil.rmtree(self.folder, ignore_errors=True)  # what an interrupted run left
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / COMMAND).write_text(self.claim())
        log = self.folder / "log.txt"
        with log.open("a") as output:
            code = children.run(self.command, output, threads)
        if self.may_diverge and code and NON_FINITE in log.read_text():
            (self.folder / DIVERGED).touch()
        elif not self.finished:
            raise RunFailedError(f"{self.folder}: exit code {code}, see log.txt there")
        if not self.keeps_weights:  # by far the largest files
            for file in (*self.folder.rglob("*.ckpt"), *self.folder.rglob("model.safetensors")):
                file.unlink()

    def _results(self) -> list[tuple[Path, dict[str, Any]]]:
        found = []
        for file in sorted(self.folder.rglob(self.result), key=lambda path: path.stat().st_mtime):
            with suppress(json.JSONDecodeError):  # the run was killed as it wrote
                found.append((file, json.loads(file.read_text())))
        return found


class Children:
    def __init__(self) -> None:
        self.stopped = False
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, command: Sequence[str], output: IO[str], threads: int) -> int:
        """Run a command to its end; its exit code. Raises :class:`StudyStopped` if it was stopped."""
        env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        # In a session of its own, so that Ctrl-C reaches it once: from here.
        with subprocess.Popen(command, env=env, start_new_session=True, stdout=output, stderr=output) as process:
            self._running.add(process)
            if self.stopped:  # before it was in the set
                process.terminate()
            code = process.wait()
        self._running.discard(process)
        if code:
            self.check()
        return code

    def check(self) -> None:
        if self.stopped:
            raise StudyStopped("stopped; the same command continues")

    def stop(self, *_: object) -> None:
        """Let the runs save and leave; kill them after :data:`GRACE` seconds, or when called again."""
        if self.stopped:
            self._kill()
            return
        self.stopped = True
        for process in list(self._running):
            process.terminate()
        timer = threading.Timer(GRACE, self._kill)
        timer.daemon = True
        timer.start()

    def _kill(self) -> None:
        for process in list(self._running):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the group: with its workers and ranks

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        """Within, SIGTERM, SIGHUP and Ctrl-C stop the children; in the main thread only."""
        ending = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        obeyed = [number for number in ending if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self.stop) for number in obeyed}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)


def run_all(
    cells: Sequence[Cell], *, jobs: int = 1, threads: int = 0, keep_going: bool = False, dry_run: bool = False,
    outcome: Callable[[Cell], str] = lambda cell: cell.outcome,
) -> bool:  # fmt: skip
    """Run the cells that are not finished, each once; whether all are finished afterwards.

    On a signal or an exception, the runs under way are ended and waited for, and no other is begun.

    Args:
        cells: Runs, in order.
        jobs: Runs at a time.
        threads: Threads of a run; 0 shares the cores.
        keep_going: Whether the others run when one has failed; otherwise that is a :class:`RunFailedError`.
        dry_run: Print the commands instead.
        outcome: What to print about a finished run; called after each.
    """
    from tqdm import tqdm

    unique = list({cell.folder: cell for cell in cells}.values())
    for cell in unique:
        cell.claim()
    left = [cell for cell in unique if not cell.finished]
    if dry_run:
        print(*(shlex.join(cell.command) for cell in left), sep="\n")
        return not left
    done, children, failed = len(unique) - len(left), Children(), False
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    bar = tqdm(total=len(unique), initial=done, unit="run", disable=None)
    with children.stopped_by_signals(), bar, ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(cell.run, children, threads): cell for cell in left}
        try:
            for i, future in enumerate(as_completed(futures), start=done + 1):
                try:
                    future.result()
                    text = f"{futures[future].name}: {outcome(futures[future])}"
                except RunFailedError as error:
                    if not keep_going:
                        raise
                    failed, text = True, f"FAILED: {error}"
                bar.update()
                with bar.external_write_mode():
                    print(f"[{i}/{len(unique)}] {text}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
            raise
    return not failed


def late_mean(values: Sequence[float]) -> float:
    """Mean of the last quarter; infinite where it is not finite."""
    mean = statistics.fmean(values[-max(1, len(values) // 4) :])
    return mean if math.isfinite(mean) else math.inf


def claim(output: Path, settings: Mapping[str, Any]) -> None:
    """Take a folder for a study with these settings; raises a :class:`SettingError` if it holds one with others."""
    text = _note(output, output / "study.json", settings, "a study")
    output.mkdir(parents=True, exist_ok=True)
    (output / "study.json").write_text(text)


def _note(study: Path, note: Path, settings: Any, what: str) -> str:
    text = json.dumps(settings, indent=2, default=str) + "\n"
    if note.exists() and json.loads(note.read_text()) != json.loads(text):
        problem = f"holds {what} with other settings (see {note.name} in it)."
        raise SettingError("--output", str(study), problem, "Use those settings, or choose another folder.")
    return text
