"""What all benchmarks share: the command line, the timer, medians with their spread, records, and tables of them."""

import argparse
import json
import math
import platform
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import flops_lightning
from flops_lightning.errors import check_at_least

CPU = torch.device("cpu")

Record = dict[str, Any]
"""What was measured, by name; a :class:`Spread` becomes its median in JSON, with its ends under ``quartiles``."""


@dataclass(frozen=True)
class Spread:
    """A median over the rounds with the quartiles; ``f"{spread:.2f}"`` is ``1.23 (1.20 - 1.31)``."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float], *, tails: float = 0.25) -> "Spread":
        """Of all values; ``tails=0`` gives the minimum and the maximum instead of the quartiles."""
        low, median, high = np.quantile(list(values), (tails, 0.5, 1 - tails))
        return cls(float(median), float(low), float(high))

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}} - {self.high:{spec}})"


@dataclass(frozen=True)
class Timings:
    seconds: Mapping[str, Sequence[float]]

    def ratio(self, other: str, ours: str) -> Spread:
        """Time of ``other`` over time of ``ours``, taken within each round, where both met the same machine."""
        return Spread.of(a / b for a, b in zip(self.seconds[other], self.seconds[ours], strict=True))

    def excess(self, whole: str, part: str) -> Spread:
        """Share of the time of ``whole`` that the time of ``part`` does not explain."""
        return Spread.of(1 - b / a for a, b in zip(self.seconds[whole], self.seconds[part], strict=True))


def alternate(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int,
    synchronize: Callable[[], object] = lambda: None, clock: Callable[[], float] = time.perf_counter,
) -> Timings:  # fmt: skip
    """Run all contenders once in each round and time each run, after a round that is not timed.

    The first to run moves on by one from round to round, so that none always follows the same neighbour.
    ``synchronize`` waits for the device before every look at the clock.
    """
    check_at_least("rounds", rounds, 1)
    for run in contenders.values():
        run()
    order = deque(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for _ in range(rounds):
        for name in order:
            synchronize()
            start = clock()
            contenders[name]()
            synchronize()
            seconds[name].append(clock() - start)
        order.rotate(-1)
    return Timings(seconds)


def synchronizer(device: torch.device) -> Callable[[], object]:
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def mean_and_error(values: Sequence[float]) -> str:
    """Mean and standard error, as ``0.201 ± 0.005``; the error of a single value is nan."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):.3f} ± {error:.3f}"


def table(columns: Mapping[str, str], records: Iterable[Record]) -> str:
    """A Markdown table of records, by header the format of a cell: ``{"speed": "{ratio:.2f}"}``; None is ``-``."""

    def cell(form: str, record: Record) -> str:
        try:
            return form.format(**record)
        except TypeError:  # None has no decimals
            return "-"

    from tabulate import tabulate

    rows = [[cell(form, record) for form in columns.values()] for record in records]
    return tabulate(rows, list(columns), tablefmt="github", disable_numparse=True)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


NUMBERS = {
    "rounds": "timed rounds", "batch": "samples in a batch", "queries": "queries per sample at each site",
    "rows": "rows of a forward pass", "chunk_rows": "rows of a forward pass", "draws": "estimates of each kind",
    "seeds": "number of seeds", "steps": "steps that count",
}  # fmt: skip
"""Options that are whole numbers of 1 or more."""


def command(module: str, doc: str | None, *, device: bool = False, **numbers: int) -> argparse.ArgumentParser:
    """The parser of ``python -m module``, with ``--json``; the first line of ``doc`` is "``command``: summary".

    ``numbers`` are the defaults of further options, of :data:`NUMBERS`.
    """
    summary = (doc or "").partition("\n")[0].partition(": ")[2]
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=summary)
    parser.add_argument("--json", type=writable, metavar="FILE", help="also write the records to FILE")
    for name, default in numbers.items():
        option, meaning = f"--{name.replace('_', '-')}", f"{NUMBERS[name]} (default {default})"
        parser.add_argument(option, type=at_least(1), default=default, help=meaning)
    if device:
        parser.add_argument("--device", type=_device, default=CPU, help="cpu (default), cuda, cuda:1, ...")
    return parser


def finish(options: argparse.Namespace, records: Sequence[Record]) -> None:
    """Say where it was measured, and write the records to the file of ``--json``, if there is one."""
    device = getattr(options, "device", CPU)
    place = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "processor": platform.processor() or platform.machine(),
    }
    versions = {name: version(name) for name in ("torch", "timm")}
    versions |= {"flops_lightning": flops_lightning.__version__, "python": platform.python_version()}
    print("\nMeasured on {device}, {threads} thread(s), {dtype}, torch {torch}.".format(**place, **versions))
    if options.json:
        found = [plain(each) | place | {"versions": versions} for each in records]
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def plain(record: Record) -> Record:
    spreads = {name: value for name, value in record.items() if isinstance(value, Spread)}
    quartiles = {"quartiles": {name: [each.low, each.high] for name, each in spreads.items()}} if spreads else {}
    return record | {name: each.median for name, each in spreads.items()} | quartiles


def at_least(least: int) -> Callable[[str], int]:
    """Type of an argument: a whole number of ``least`` or more."""

    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of {least} or more.")
        return int(text)

    return number


def positive(text: str) -> float:
    """Type of an argument: a finite number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number above 0.")
    return float(text)


def writable(text: str) -> Path:
    """Type of an argument: a file that can be written."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():  # found before the measurement, not after it
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written. Give a file in a folder that exists.")
    return path


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {reason}. Write cpu.") from None
    return device
