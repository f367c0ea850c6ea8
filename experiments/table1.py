"""``python -m experiments.table1 --models vit_base --data_sets cifar10 --output DIR``: the paper's Table 1.

A cell is a model on a data set by a method, once for each seed: ``configs/MODEL_DATASET.yaml`` with the method's files
on top, run as ``main.py fit`` in a process and a folder of its own. A finished cell is not repeated, and one that was
interrupted goes on from its last checkpoint, so the table can be made in as many sittings as it takes. Arguments after
``--`` go to every run, as in ``-- --config configs/hardware/8xgpu.yaml``; those of one data set alone by
``--only cifar10:data.init_args.download=true``. Writes ``table1.md`` beside the paper's figures, and ``table1.csv``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from threading import Lock
from typing import Any

from experiments.running import RUNNING, STOPPED
from experiments.strategies_runs import arguments
from experiments.table1_paper import DATA_SETS, PAPER, ROWS, published
from flops_lightning.errors import SettingError

FILES: Mapping[str, tuple[str, ...]] = {
    # A cell's configuration is the paper's own method.
    "ops_lr": (),
    "ops_lr_optimal": ("configs/method/ops_lr.yaml",),
    "ops_spsa": ("configs/method/ops_spsa.yaml", "configs/allocators/gaussian.yaml"),
    **{method: (f"configs/method/{method}.yaml",) for method in ("bp", "mezo", "mezo_nspsa", "deepzero_spsa", "lr")},
}
"""Configuration files on top of a cell's, by method."""
OWN = {("vit_large", "mezo_nspsa"): ("--model.init_args.strategy.init_args.queries=100",)}
"""Arguments of single cells: five sites of 20 queries each, where the method's file counts on four."""
METHODS = (*ROWS, "ops_lr_optimal")
TITLES = {**ROWS, "ops_lr_optimal": "OPS-LR, optimal allocator, no pilots (ours)"}
RESULT, LOG, COMMAND = "summary.json", "log.txt", "command.json"


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        model: As in ``configs/MODEL_DATASET.yaml``.
        method: A key of :data:`FILES`.
        data_set: As in ``configs/MODEL_DATASET.yaml``.
        seed: Of ``seed_everything``.
        output: Folder of the study.
        extra: Arguments of the run beside the configuration files.
    """

    model: str
    method: str
    data_set: str
    seed: int
    output: Path
    extra: tuple[str, ...] = field(default=(), repr=False)

    @property
    def config(self) -> Path:
        """The cell's configuration."""
        return Path(f"configs/{self.model}_{self.data_set}.yaml")

    @property
    def folder(self) -> Path:
        """Where its files go."""
        return self.output / self.model / self.data_set / self.method / f"seed_{self.seed}"

    @property
    def summary(self) -> dict[str, Any] | None:
        """What the run ended with; None if it has not."""
        for file in sorted(self.folder.rglob(RESULT), reverse=True):
            with suppress(json.JSONDecodeError):  # it is being written, or the run was killed as it wrote
                return json.loads(file.read_text())
        return None

    @property
    def command(self) -> list[str]:
        """The run; it goes on where there is a checkpoint."""
        # The method's files come last: they replace what an overlay of the user's says of the strategy.
        given = [*self.extra, *(part for file in FILES[self.method] for part in ("--config", file))]
        given += OWN.get((self.model, self.method), ())
        own = {"seed_everything": self.seed, "trainer.default_root_dir": self.folder, "ckpt_path": "last"}
        return [sys.executable, "main.py", "fit", "--config", str(self.config), *given, *arguments(own)]

    @property
    def settings(self) -> list[str]:
        """What the run is made of, whoever runs it."""
        return [str(part) for part in self.command[1:]]

    def check(self) -> None:
        """Refuse a folder that was made by another command.

        Raises:
            SettingError: It was: its result would be passed off as this cell's.
        """
        file = self.folder / COMMAND
        if file.is_file() and json.loads(file.read_text()) != self.settings:
            raise SettingError(
                "--output", str(self.output), f"has {self.folder.relative_to(self.output)} of other settings.",
                "Give those of then (in its command.json), or another folder.",
            )  # fmt: skip

    def run(self, threads: int) -> str:
        """Run it unless it is finished; what came of it, in a word."""
        if self.summary is not None:
            return "was there"
        if RUNNING.stopped:
            return STOPPED
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / COMMAND).write_text(json.dumps(self.settings))
        with (self.folder / LOG).open("a") as said:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
            code = RUNNING.run(self.command, stdout=said, stderr=said, env=environment)
        if self.summary is None and RUNNING.stopped:
            return STOPPED
        if self.summary is None:
            return f"FAILED with code {code}, see {self.folder / LOG}"
        for file in (*self.folder.rglob("*.ckpt"), *self.folder.rglob("model.safetensors")):
            file.unlink()  # by far the largest part, and of no further use
        return f"{100 * (self.accuracy or 0):.1f} %"

    @property
    def accuracy(self) -> float | None:
        """Test accuracy, 0 to 1; None before the end."""
        summary = self.summary
        return None if summary is None else summary["test_accuracy"]


def cells(options: argparse.Namespace) -> list[Cell]:
    """Everything that is to be run; seeds change slowest, so that an interrupted table has all its cells once.

    Raises:
        SettingError: there is no configuration of a model and data set, or the repository's root is elsewhere.
    """
    found = [
        Cell(model, method, data_set, seed, options.output, (*options.extra, *options.only.get(data_set, ())))
        for seed, model, data_set, method in product(
            *map(dict.fromkeys, (options.seeds, options.models, options.data_sets, options.methods))
        )
    ]
    for cell in found:
        if not cell.config.is_file():
            raise SettingError(
                "--models", cell.model, f"there is no {cell.config} here.", "Run from the repository's root."
            )
    return found


def entry(given: Sequence[Cell]) -> str:
    """Mean and standard deviation over the seeds that are done, in percent."""
    done = [100 * cell.accuracy for cell in given if cell.accuracy is not None]
    if not done:
        return "-"
    spread = f" ± {statistics.stdev(done):.1f}" if len(done) > 1 else ""
    missing = f" ({len(done)} of {len(given)} seeds)" if len(done) < len(given) else ""
    return f"{statistics.fmean(done):.1f}{spread}{missing}"


def table(given: Sequence[Cell], *, small: bool) -> str:
    """Markdown: one row a method, and one column a data set, each beside the paper's figure."""
    models, methods, sets = (
        list(dict.fromkeys(getattr(c, name) for c in given)) for name in ("model", "method", "data_set")
    )
    lines = []
    for model in models:
        lines += [f"{model}{' in small' if small else ''}, test accuracy in percent, mean ± sd over seeds:", ""]
        lines += [
            "| method | " + " | ".join(f"{each} | paper" for each in sets) + " |",
            "|---|" + "---|---|" * len(sets),
        ]
        for method in methods:
            row = []
            for data_set in sets:
                own = [c for c in given if (c.model, c.method, c.data_set) == (model, method, data_set)]
                paper = published(model, method, data_set)
                row += [entry(own), "-" if paper is None else f"{paper:.1f}"]
            lines.append(f"| {TITLES[method]} | " + " | ".join(row) + " |")
        lines.append("")
    return "\n".join(lines)


def write(given: Sequence[Cell], output: Path, *, small: bool) -> None:
    """Write ``table1.md`` and ``table1.csv``."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "table1.md").write_text(table(given, small=small))
    with (output / "table1.csv").open("w", newline="") as stream:
        rows = csv.writer(stream)
        names = ("start_accuracy", "test_accuracy", "steps", "queries", "forward_equivalents", "train_seconds")
        rows.writerow(("model", "data_set", "method", "seed", *names, "paper"))
        for cell in given:
            summary = cell.summary or {}
            paper = published(cell.model, cell.method, cell.data_set)
            rows.writerow((cell.model, cell.data_set, cell.method, cell.seed, *(summary.get(n) for n in names), paper))


def parse(args: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line.

    Raises:
        SettingError: ``--only`` names no data set or no setting, or ``--jobs`` is below 1.
    """
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m experiments.table1", description=summary)
    parser.add_argument("--models", nargs="+", choices=PAPER, default=list(PAPER), help="default all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(ROWS), help="default the paper's rows")
    parser.add_argument("--data_sets", nargs="+", choices=DATA_SETS, default=list(DATA_SETS), help="default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="default 0")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and the table")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time (default 1)")
    parser.add_argument("--small", action="store_true", help="with configs/small/vit_micro.yaml, for two CPU cores")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="DATA_SET:NAME=VALUE", help="settings of the runs on one data set"
    )
    parser.add_argument("--dry_run", action="store_true", help="print the commands and run nothing")
    given = list(sys.argv[1:] if args is None else args)
    own, extra = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    options = parser.parse_args(own)
    if options.jobs < 1:
        raise SettingError("--jobs", options.jobs, "is below 1.", "Give the number of runs at a time.")
    options.extra = (*(("--config", "configs/small/vit_micro.yaml") if options.small else ()), *extra)
    only: dict[str, tuple[str, ...]] = {}
    for each in options.only:
        data_set, _, setting = each.partition(":")
        if data_set not in DATA_SETS or setting.find("=") < 1:
            raise SettingError(
                "--only", each, "is not DATA_SET:NAME=VALUE.", "Write for example cifar10:data.init_args.download=true."
            )
        only[data_set] = (*only.get(data_set, ()), f"--{setting}")
    options.only = only
    return options


def main(args: Sequence[str] | None = None) -> None:
    """Run what is missing, and write the table after every cell.

    Raises:
        SystemExit: with code 1 if a cell failed, after all others were tried; 2 after a mistake in the settings.
    """
    try:
        options = parse(args)
        todo = cells(options)
        for cell in todo:
            cell.check()
    except SettingError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    if options.dry_run:
        print("\n".join(shlex.join(cell.command) for cell in todo))
        return
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    one_writes = Lock()

    def run(cell: Cell) -> str:
        said = cell.run(threads)
        with one_writes:
            print(f"{cell.model} {cell.data_set} {cell.method} seed {cell.seed}: {said}", flush=True)
            write(todo, options.output, small=options.small)
        return said

    with RUNNING.ended_by_signals(), ThreadPoolExecutor(options.jobs) as runs:
        said = list(runs.map(run, todo))
    write(todo, options.output, small=options.small)
    print(table(todo, small=options.small))
    if any(each == STOPPED or each.startswith("FAILED") for each in said):
        sys.exit(1)


if __name__ == "__main__":
    main()
