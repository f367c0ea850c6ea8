"""``python -m experiments.table2 --data_sets caltech101 --output DIR``: the paper's Table 2, prompts for CLIP.

A cell is a CLIP on a data set by a method, once for each seed: ``configs/clip_vit_b32_DATASET.yaml`` with the method's
file on top, trained by ``main.py fit`` and tested by ``main.py test`` with the checkpoint of the lowest validation
loss, each in a process and a folder of its own. The rows ``manual`` are tests alone. A seed draws images, ``W``, noise
and batches. A finished run is not repeated, and one that was interrupted continues from its last checkpoint. Arguments
after ``--`` go to every run; those of one data set alone by ``--only caltech101:data.init_args.download=true``.
``--small --clip DIR --root DIR`` takes a CLIP of ``experiments.mini_clip`` with ``--cifar100``: of Caltech101 the
classes whose names its captions had, and of Food-101 what is there, for a core and minutes a run.
Writes ``table2.md``, beside the figures of the paper and of others, ``table2.csv`` and ``table2.png``.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from experiments.command_line import StudyParser, arguments, configs
from experiments.harness import Cell, run_all
from experiments.known_classes import write_split
from experiments.mini_clip import TEMPLATES
from experiments.pictures import draw_if_possible
from experiments.pictures_prompts import draw_table2
from experiments.table1 import setting_of
from experiments.table2_report import DATA_SETS, MANUAL, METHODS, TRAINED, Key, report, write
from experiments.tables import write_report
from experiments.written_metrics import FILE_NAME
from flops_lightning.errors import SettingError

BACKBONES: dict[str, dict[str, Any]] = {  # settings on top of a configuration
    "vit_b32": {},
    "vit_b16": {"model.init_args.model_name": "ViT-B-16-quickgelu"},
    "rn50": {"model.init_args.model_name": "RN50-quickgelu"},  # its image tower takes no prompt
}
SMALL = "configs/small/clip_mini.yaml"
# About 36,000 image passes for every method, in about 110 steps, and too few validations to end most runs early.
SMALL_DATA: dict[str, dict[str, Any]] = {
    "caltech101": {  # 4 images to train and 1 to validate of each class whose name the CLIP has read
        "trainer.max_epochs": 60, "trainer.check_val_every_n_epoch": 12, "data.init_args.images_per_class": 0,
        "data.init_args.val_images_per_class": 0,
    },
    "food101": {
        "trainer.max_epochs": 20, "trainer.check_val_every_n_epoch": 4, "data.init_args.val_images": 40,
    },
}  # fmt: skip
SMALL_SEARCH = {
    "caltech101": {"trainer.max_epochs": 21, "trainer.check_val_every_n_epoch": 3, "data.init_args.batch_size": 32},
    "food101": {"trainer.max_epochs": 7, "trainer.check_val_every_n_epoch": 1, "data.init_args.batch_size": 32},
}
QUICK = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 2, "trainer.check_val_every_n_epoch": 1}


def planned(options: argparse.Namespace) -> tuple[dict[Key, Cell], dict[Key, Cell]]:
    """The runs that train, and the tests of what is not trained; seeds change slowest."""
    fits, tests = {}, {}
    small, only = options.small or options.quick, [setting_of(given, DATA_SETS) for given in options.only]
    once = map(dict.fromkeys, (options.seeds, options.backbones, options.data_sets, options.methods))
    for seed, backbone, data_set, method in product(*once):
        key, own = Key(backbone, data_set, method, seed), {"data.init_args.split_seed": seed}
        # Training and validation images are drawn anew for each seed, test images of Caltech101 alone.
        if method in MANUAL and data_set != "caltech101" and seed != options.seeds[0]:
            continue
        own |= {f"model.init_args.{prompt}.seed": seed for prompt in ("text_prompt", "image_prompt")}
        own |= BACKBONES.get(backbone, {})
        if small:
            own |= {"model.init_args.model_name": f"local-dir:{options.clip}", "data.init_args.root": options.root}
        if small and data_set == "caltech101":
            own["data.init_args.split_file"] = options.output / "splits" / f"seed_{seed}.json"
        given = [*configs([f"configs/clip_vit_b32_{data_set}.yaml", *([SMALL] if small else [])]), *arguments(own)]
        given += [*arguments(SMALL_DATA[data_set] if small else {}), *options.extra]
        given += [f"--{setting}" for where, setting in only if where == data_set]
        # The method's file comes last: it replaces what an overlay of the user's says of the strategy.
        given += configs([f"configs/prompt_method/{method}.yaml"])
        if small:
            given += arguments(SMALL_SEARCH[data_set] if method == "cma_es" else {})
            # Words that its captions did not have mean nothing to a small CLIP.
            given += arguments({"model.init_args.template": list(TEMPLATES)} if method == "manual_ensembled" else {})
            given += arguments(QUICK if options.quick and method in TRAINED else {})
        if method in MANUAL:
            tests[key] = evaluation(options.output, key, given)
        else:
            name = "/".join((*key[:3], f"seed_{seed}"))
            run = {"seed_everything": seed, "trainer.default_root_dir": options.output / name, "ckpt_path": "last"}
            command = ("main.py", "fit", *given, *arguments(run))
            fits[key] = Cell(options.output, name, command, resumes=True, keeps_weights=True)
    return fits, tests


def evaluation(output: Path, key: Key, given: Sequence[str], checkpoint: Path | None = None) -> Cell:
    name = "/".join(("test", *key[:3], f"seed_{key.seed}"))
    run = {"seed_everything": key.seed, "trainer.default_root_dir": output / name}
    run |= {"ckpt_path": checkpoint} if checkpoint else {}
    writes = "--trainer.callbacks+=experiments.written_metrics.WriteMetrics"
    return Cell(output, name, ("main.py", "test", *given, writes, *arguments(run)), result=FILE_NAME)


def evaluations(fits: Mapping[Key, Cell], output: Path) -> dict[Key, Cell]:
    """Tests of the runs that are finished; refuses those whose weights are gone."""
    found = {}
    for key, cell in fits.items():
        if cell.finished:
            file = best(cell)
            if file is None:
                problem, remedy = f"holds no weights of {cell.name}, which is finished.", "Remove that folder."
                raise SettingError("--output", str(output), problem, f"{remedy} The same command trains it again.")
            given = cell.arguments[2 : cell.arguments.index("--seed_everything")]
            found[key] = evaluation(output, key, given, file)
    return found


def best(cell: Cell) -> Path | None:
    """The checkpoint of the lowest validation loss, also where a run was continued in another folder."""
    scores: dict[Path, float] = {}
    for file in cell.folder.rglob("epoch=*.ckpt"):
        states = torch.load(file, map_location="cpu", weights_only=True)["callbacks"].values()
        found = [s["current_score"] for s in states if isinstance(s, dict) and s.get("monitor") == "val/loss"]
        scores |= {file: float(found[0])} if found else {}
    return min(scores, key=scores.__getitem__, default=None)


def command_line() -> StudyParser:
    parser = StudyParser(__doc__, threads=(1, "threads of a run"))
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, help="default all")
    add("--data_sets", nargs="+", choices=DATA_SETS, help="default all; in small caltech101 and food101")
    add("--backbones", nargs="+", choices=BACKBONES, help="default vit_b32; rn50 for the manual rows")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="default 1 2 3, three draws of the images")
    add("--small", action="store_true", help=f"with {SMALL}, for CPU cores; needs --clip and --root")
    add("--quick", action="store_true", help="the same with two steps a run, to see that it works")
    add("--clip", default="", help="folder of the small CLIP, as experiments.mini_clip writes it with --cifar100")
    add("--root", default="", help="folder of caltech101/ and food-101/ in small")
    add("--only", nargs="+", default=[], metavar="DATA_SET:NAME=VALUE", help="settings of the runs on one data set")
    return parser


def complete(options: argparse.Namespace) -> None:
    """Fill in what depends on other options, and refuse what cannot be or has no effect."""
    small = options.small or options.quick
    for name, folder, what in (("--clip", options.clip, "the small CLIP"), ("--root", options.root, "its images")):
        if small != bool(folder):
            problem = f"is where {what} lies, and the table is not in small." if folder else "is missing."
            raise SettingError(name, folder, problem, "Write --small too." if folder else f"Give the folder of {what}.")
    if small and options.backbones:
        raise SettingError("--backbones", options.backbones, "has no effect in small.", "Leave it out.")
    options.backbones = ["mini"] if small else options.backbones or ["vit_b32"]
    options.data_sets = options.data_sets or (list(SMALL_DATA) if small else list(DATA_SETS))
    if small and not {*options.data_sets} <= {*SMALL_DATA}:
        problem = f"in small there are {', '.join(SMALL_DATA)}."
        raise SettingError("--data_sets", options.data_sets, problem, "Take these.")
    options.methods = options.methods or list(MANUAL if options.backbones == ["rn50"] else METHODS)
    if "rn50" in options.backbones and not {*options.methods} <= {*MANUAL}:
        remedy = f"Write --methods {' '.join(MANUAL)}."
        raise SettingError("--backbones", "rn50", "is a ResNet, which takes no image prompt.", remedy)


def study(options: argparse.Namespace) -> None:
    """Train and test what is missing, and write the table after every seed; exits with code 1 if a run failed."""
    complete(options)
    fits, tests = planned(options)
    small = options.small or options.quick
    if small and "caltech101" in options.data_sets and not options.dry_run:
        for seed in options.seeds:
            write_split(options.root, options.output / "splits" / f"seed_{seed}.json", seed=seed)
    keys, whole = [*tests, *fits], True
    for seed in dict.fromkeys(options.seeds):
        own = {key: cell for key, cell in fits.items() if key.seed == seed}
        first = [cell for key, cell in tests.items() if key.seed == seed and key.method in MANUAL]
        whole &= run_all([*first, *own.values()], keep_going=True, **options.launch)
        if not options.dry_run:
            whole &= run_all([*evaluations(own, options.output).values()], keep_going=True, **options.launch)
            tests |= evaluations(own, options.output)
            write(fits, tests, keys, options.output, small=small)
    if options.dry_run:
        return
    draw_if_possible(draw_table2, options.output)
    write_report(options.output / "table2.md", report(fits, tests, keys, small=small))
    if not whole:
        sys.exit(1)


def main(args: Sequence[str] | None = None) -> None:
    command_line().run(study, args)


if __name__ == "__main__":
    main()
