"""Runs of a study in processes of their own, which end with it."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

STOPPED = "stopped, the same command goes on"


class StudyStopped(SystemExit):
    """A signal ended the study before its runs were done."""


class Running:
    """The runs under way.

    Attributes:
        stopped: Whether a signal has asked the study to end.
    """

    def __init__(self) -> None:
        """None yet."""
        self.stopped = False
        self._processes: set[subprocess.Popen[bytes]] = set()

    def run(self, command: Sequence[str], **settings: Any) -> int:
        """Run a command to its end; its exit code."""
        with subprocess.Popen(command, **settings) as process:
            self._processes.add(process)
            if self.stopped:  # in the moment before it was in the list
                process.terminate()
            try:
                return process.wait()
            finally:
                self._processes.discard(process)

    def stop(self, *_: object) -> None:
        """Let the runs save and leave; whoever begins runs looks at ``stopped``."""
        self.stopped = True
        for process in list(self._processes):
            process.terminate()

    @contextmanager
    def ended_by_signals(self) -> Iterator[None]:
        """Within, SIGTERM and Ctrl-C end the runs, and the study goes on to its own end; in the main thread only."""
        self.stopped = False
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            self.stopped = False


RUNNING = Running()
