"""``python -m experiments.table1 --models vit_base --data_sets cifar10 --output DIR``: the paper's Table 1.

A cell is a model on a data set by a method, once for each seed: ``configs/MODEL_DATASET.yaml`` with the method's files
on top, run as ``main.py fit`` in a process and a folder of its own. A finished cell is not repeated, and one that was
interrupted continues from its last checkpoint, so the table can be made in as many sittings as it takes. Arguments
after ``--`` go to every run, as in ``-- --config configs/hardware/8xgpu.yaml``; those of one data set alone by
``--only cifar10:data.init_args.download=true``. Writes ``table1.md`` beside the paper's figures, and ``table1.csv``.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from experiments.command_line import StudyParser, arguments, configs
from experiments.harness import Cell, run_all
from experiments.tables import markdown, mean_deviation, write_csv
from flops_lightning.errors import SettingError

DATA_SETS = ("imagenet", "caltech101", "food101", "flowers102", "cifar10", "cifar100", "eurosat")
ROWS = {  # by the name of the method's file in configs/method
    "bp": "BP (upper bound)",
    "mezo": "Mezo (2 queries)",
    "mezo_nspsa": "Mezo (n-SPSA)",
    "deepzero_spsa": "DeepZero (n-SPSA)",
    "lr": "LR",
    "ops_spsa": "OPS-SPSA",
    "ops_lr": "OPS-LR",
}
PAPER: dict[str, dict[str, tuple[float, ...]]] = {  # by model and method: one figure a data set
    "vit_base": {
        "bp": (80.5, 92.2, 92.4, 93.5, 96.3, 90.7, 91.9),
        "mezo": (9.3, 42.6, 37.3, 38.2, 42.1, 37.5, 39.8),
        "mezo_nspsa": (54.8, 77.2, 76.7, 80.2, 84.4, 71.5, 78.4),
        "deepzero_spsa": (55.6, 78.4, 77.8, 78.4, 85.6, 70.2, 78.8),
        "lr": (57.3, 85.5, 87.6, 86.5, 87.7, 80.8, 82.9),
        "ops_spsa": (60.8, 87.3, 87.6, 85.6, 89.5, 82.2, 83.2),
        "ops_lr": (65.8, 88.9, 88.4, 91.6, 93.2, 88.7, 89.3),
    },
    "vit_large": {
        "bp": (81.7, 93.4, 93.3, 94.2, 98.2, 93.5, 93.4),
        "mezo": (10.7, 45.6, 38.8, 40.5, 45.9, 38.3, 41.7),
        "mezo_nspsa": (56.7, 78.8, 78.4, 78.5, 86.7, 74.3, 79.2),
        "deepzero_spsa": (56.4, 79.5, 78.9, 79.6, 86.3, 73.7, 80.1),
        "lr": (58.2, 87.2, 87.7, 86.8, 88.4, 81.4, 85.7),
        "ops_spsa": (62.2, 88.6, 88.1, 87.3, 91.3, 83.9, 87.6),
        "ops_lr": (67.6, 90.2, 89.5, 92.3, 95.5, 90.8, 90.1),
    },
}
"""Test accuracies in percent after fine-tuning a ViT, Table 1 of the paper."""

FILES: Mapping[str, tuple[str, ...]] = {  # on top of a cell's configuration, which is the paper's own method
    "ops_lr": (),
    "ops_lr_optimal": ("configs/method/ops_lr.yaml",),
    "ops_spsa": ("configs/method/ops_spsa.yaml", "configs/allocators/gaussian.yaml"),
    **{method: (f"configs/method/{method}.yaml",) for method in ("bp", "mezo", "mezo_nspsa", "deepzero_spsa", "lr")},
}
# Five sites of 20 queries each, where the method's file counts on four.
OWN = {("vit_large", "mezo_nspsa"): ("--model.init_args.strategy.init_args.queries=100",)}
METHODS = (*ROWS, "ops_lr_optimal")
TITLES = {**ROWS, "ops_lr_optimal": "OPS-LR, optimal allocator, no pilots (ours)"}
COLUMNS = ("start_accuracy", "test_accuracy", "steps", "queries", "forward_equivalents", "train_seconds")
SMALL = "configs/small/vit_micro.yaml"


def published(model: str, method: str, data_set: str) -> float | None:
    row = PAPER.get(model, {}).get(method)
    return row[DATA_SETS.index(data_set)] if row and data_set in DATA_SETS else None


class Key(NamedTuple):
    model: str
    data_set: str
    method: str
    seed: int


def cells(options: argparse.Namespace, *, keeps_weights: bool = False) -> dict[Key, Cell]:
    """All runs; seeds change slowest, so that an interrupted table has all its cells once."""
    found = {}
    given_once = map(dict.fromkeys, (options.seeds, options.models, options.data_sets, options.methods))
    for seed, model, data_set, method in product(*given_once):
        name = f"{model}/{data_set}/{method}/seed_{seed}"
        only = [f"--{setting}" for where, setting in map(setting_of, options.only) if where == data_set]
        given = (*(["--config", SMALL] if options.small else ()), *options.extra, *only)
        # The method's files come last: they replace what an overlay of the user's says of the strategy.
        on_top = (*configs(FILES[method]), *OWN.get((model, method), ()))
        own = {"seed_everything": seed, "trainer.default_root_dir": options.output / name, "ckpt_path": "last"}
        command = ("main.py", "fit", "--config", f"configs/{model}_{data_set}.yaml", *given, *on_top, *arguments(own))
        cell = Cell(options.output, name, command, resumes=True, keeps_weights=keeps_weights)
        found[Key(model, data_set, method, seed)] = cell
    return found


def setting_of(given: str, data_sets: Sequence[str] = DATA_SETS) -> tuple[str, str]:
    """Data set and setting of ``DATA_SET:NAME=VALUE``."""
    data_set, _, setting = given.partition(":")
    if data_set not in data_sets or setting.find("=") < 1:
        remedy = "Write, for example, cifar10:data.init_args.download=true."
        raise SettingError("--only", given, "is not DATA_SET:NAME=VALUE.", remedy)
    return data_set, setting


def entry(runs: Sequence[Cell]) -> str:
    """Mean and standard deviation over the seeds that are finished, in percent."""
    return mean_deviation([cell.summary["test_accuracy"] for cell in runs if cell.finished], len(runs))


def report(runs: Mapping[Key, Cell], *, small: bool) -> str:
    """Markdown: one row per method, and one column per data set, each beside the paper's figure."""
    models, sets, methods, _ = (list(dict.fromkeys(values)) for values in zip(*runs, strict=True))
    parts = []
    for model in models:
        rows = []
        for method in methods:
            row = [TITLES[method]]
            for data_set in sets:
                paper = published(model, method, data_set)
                own = [cell for key, cell in runs.items() if key[:3] == (model, data_set, method)]
                row += [entry(own), "-" if paper is None else f"{paper:.1f}"]
            rows.append(row)
        columns = ["method", *(name for each in sets for name in (each, "paper"))]
        title = f"{model}{' in small' if small else ''}, test accuracy in percent, mean ± sd over seeds:"
        parts.append(f"{title}\n\n{markdown(columns, rows)}")
    return "\n".join(parts)


def write(runs: Mapping[Key, Cell], output: Path, *, small: bool) -> None:
    (output / "table1.md").write_text(report(runs, small=small))
    rows = []
    for key, cell in runs.items():
        summary = cell.summary if cell.finished else {}
        rows.append((*key, *map(summary.get, COLUMNS), published(key.model, key.method, key.data_set)))
    write_csv(output / "table1.csv", ("model", "data_set", "method", "seed", *COLUMNS, "paper"), rows)


def command_line() -> StudyParser:
    parser = StudyParser(__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=PAPER, default=list(PAPER), help="default all")
    add("--methods", nargs="+", choices=METHODS, default=list(ROWS), help="default the paper's rows")
    add("--data_sets", nargs="+", choices=DATA_SETS, default=list(DATA_SETS), help="default all")
    add("--seeds", nargs="+", type=int, default=[0], help="default 0")
    add("--small", action="store_true", help=f"with {SMALL}, for two CPU cores")
    add("--only", nargs="+", default=[], metavar="DATA_SET:NAME=VALUE", help="settings of the runs on one data set")
    return parser


def study(options: argparse.Namespace) -> None:
    """Run what is missing, and write the table after every cell; exits with code 1 if one failed, after all others."""
    runs = cells(options)

    def outcome(cell: Cell) -> str:
        write(runs, options.output, small=options.small)
        return f"{100 * cell.summary['test_accuracy']:.1f} %"

    complete = run_all([*runs.values()], keep_going=True, outcome=outcome, **options.launch)
    if options.dry_run:
        return
    write(runs, options.output, small=options.small)
    print(report(runs, small=options.small))
    if not complete:
        sys.exit(1)


def main(args: Sequence[str] | None = None) -> None:
    command_line().run(study, args)


if __name__ == "__main__":
    main()
