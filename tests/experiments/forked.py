"""Runs of a study as forks, which are quick to begin."""

from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tests.forks import python


def run(_: object, command: Sequence[str], output: IO[str], threads: int) -> int:
    """What ``experiments.harness.Children.run`` does, as it does it but for the signals."""
    process = python(command[1:], Path(output.name), threads=threads)
    process.join()
    return int(process.exitcode or 0)
