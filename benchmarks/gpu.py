"""``python -m benchmarks.gpu``: everything that only a GPU can show, in the minutes that there are, by order of value.

The results are written as they come. When the minutes are over, whatever runs is cut off, and the last record names
what is missing. A part that fails leaves a record of its error, and the next one begins. No data and no connection are
needed, and of packages torch, timm, lightning and torchmetrics alone (training with Lightning: torchdata).
"""

import argparse
import json
import platform
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_memory import fits, memory
from benchmarks.gpu_parts import Part, Plan, agreement, give_back, waiting
from benchmarks.gpu_runs import processes, training
from benchmarks.gpu_speed import FIRST, OTHERS, speed
from benchmarks.harness import Record, command, plain, positive, say, writable

PARTS: Mapping[str, Part] = {
    "agreement": agreement, "waiting": waiting, "speed": partial(speed, FIRST), "memory": memory,
    "training": training, "processes": processes, "fits": fits, "more speed": partial(speed, OTHERS),
}  # fmt: skip
"""In order of value."""
STEP_COLUMNS = (
    "model", "precision", "kernels", "compiled", "allocation", "chunk rows", "step seconds", "images a second",
    "full inference / step", "suffix inference / queries", "backprop / step", "checkpointed backprop / step",
    "noise and sums",
)  # fmt: skip


class OutOfTimeError(BaseException):
    """The minutes are over; no ``except Exception`` on the way may keep it."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise :class:`OutOfTimeError` in here after so many seconds, where the system has an alarm (not on Windows)."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: Any) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure(
    plan: Plan, parts: Mapping[str, Part], *, minutes: float, write: Callable[[Sequence[Record]], object]
) -> list[Record]:
    """Records of all parts in turn, each with its seconds; ``write`` gets all so far whenever there is another one."""
    records, left, end = list[Record](), list(parts), time.monotonic() + 60 * minutes

    def add(record: Record) -> None:
        records.append(record)
        say(line_of(record))
        write(records)

    try:
        with deadline(end - time.monotonic()):
            for name, part in parts.items():
                start = time.monotonic()
                try:
                    for record in part(plan):
                        if time.monotonic() > end:
                            raise OutOfTimeError
                        add({"part": name} | plain(record) | {"seconds": round(time.monotonic() - start, 3)})
                        start = time.monotonic()
                except Exception as error:  # whatever it is: the next parts still count
                    place = traceback.extract_tb(error.__traceback__)[-1]
                    what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                    add({"part": name, "failed": what, "at": f"{Path(place.filename).name}:{place.lineno}"})
                left.remove(name)
                give_back()
    except OutOfTimeError:
        add({"part": "cut off", "left": left})
    return records


def number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def line_of(record: Record) -> str:
    """A record as one line."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return "(" + ", ".join(f"{name} {text(each)}" for name, each in value.items()) + ")"
        return number(value)

    shown = {name: value for name, value in record.items() if name not in ("part", "goals", "quartiles")}
    return f"{record['part']}: " + ", ".join(f"{name} {text(value)}" for name, value in shown.items())


def report(records: Sequence[Record], place: Record) -> str:
    """Markdown: where it ran, the goals and whether they were met, the steps, and a line for each other record."""
    goals, steps, others = list[list[str]](), list[list[str]](), list[str]()
    for record in records:
        of = ", ".join(str(record[name]) for name in ("part", "model", "precision") if name in record)
        for goal in record.get("goals", ()):
            bound = f">= {goal['least']:g}" if "least" in goal else f"<= {goal['most']:g}"
            goals.append([f"{goal['goal']} {bound}", of, number(goal["value"]), "yes" if goal["met"] else "**no**"])
        if "step seconds" in record:
            shown = record | {"noise and sums": record["shares"]["noise"] + record["shares"]["accumulation"]}
            steps.append([number(shown[name]) for name in STEP_COLUMNS])
        else:
            others.append(f"- {line_of(record)}")
    parts = ["Measured on " + ", ".join(f"{name} {value}" for name, value in place.items()) + "."]
    parts += [table(["goal", "of", "measured", "met"], goals), table(STEP_COLUMNS, steps), "\n".join(others)]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown; nothing without rows. Without the package that draws the other tables of the benchmarks."""
    lines = [columns, ["---"] * len(columns), *rows] if rows else []
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def folder(text: str) -> Path:
    """Type of an argument: CIFAR-10 as torchvision's archive or as class folders."""
    if not any((Path(text) / name).is_dir() for name in ("cifar-10-batches-py", "train")):
        raise argparse.ArgumentTypeError(f"{text!r} has neither cifar-10-batches-py/ nor train/ in it.")
    return Path(text)


def main(argv: Sequence[str] | None = None) -> None:
    parser = command("benchmarks.gpu", __doc__, device=True)
    parser.set_defaults(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    parser.add_argument("--minutes", type=positive, default=8.0, help="time in all (default 8)")
    parser.add_argument("--markdown", type=writable, metavar="FILE", help="also write goals and figures to FILE")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure, in this order")
    parser.add_argument("--cifar10", type=folder, metavar="FOLDER", help="images to train on for a minute")
    parser.add_argument("--quick", action="store_true", help="a tiny network, to see that the command works")
    options: argparse.Namespace = parser.parse_args(argv)
    plan = Plan(options.device, quick=options.quick, cifar10=options.cifar10)
    name = torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else platform.machine()
    place = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda, "quick": plan.quick}

    def write(records: Sequence[Record]) -> None:
        if options.json:
            options.json.write_text(json.dumps({"place": place, "records": list(records)}, indent=1) + "\n")
        if options.markdown:
            options.markdown.write_text(report(records, place))

    chosen = {part: PARTS[part] for part in options.parts}
    print(report(measure(plan, chosen, minutes=options.minutes, write=write), place))


if __name__ == "__main__":
    main()
