"""``python -m experiments.table3 --output DIR``: the paper's Table 3, accuracy under noise and under attack.

Networks are trained by the cells of Table 1 that are missing, with their weights kept, and each is tested by ``main.py
test`` with ``configs/eval/robustness.yaml``. Two controls that the paper lacks come with them: ``bp_stopped`` is
backprop at the checkpoint whose validation accuracy is nearest to that of OPS-LR, and ``bp_noise`` is backprop with
noise of the sites' widths in the activations of every pass. The same command continues where it was stopped. Writes
``table3.md``, with the paper's figures, ``table3.csv`` and ``table3.png``. Arguments after ``--`` go to every run, of
training and of testing; those of one data set alone by ``--only``, as in ``experiments.table1``.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import yaml

from experiments import table1
from experiments.command_line import StudyParser, arguments, configs
from experiments.harness import Cell, run_all
from experiments.pictures import draw_if_possible
from experiments.pictures_robustness import draw_robustness
from experiments.tables import markdown, mean_interval, paired_difference, write_csv, write_report
from flops_lightning.errors import SettingError
from flops_lightning.resume.checkpoint_files import newest_checkpoint

KINDS = ("clean", "gaussian", "uniform", "poisson", "fgsm", "i_fgsm", "mi_fgsm")
PAPER: dict[str, dict[str, tuple[float, ...]]] = {
    "imagenet": {
        "bp": (80.5, 78.4, 65.9, 44.2, 15.2, 10.9, 9.9),
        "ops_lr": (65.8, 65.4, 65.4, 60.3, 34.5, 15.6, 13.8),
        "ops_spsa": (60.8, 58.2, 59.3, 55.2, 33.7, 13.5, 12.3),
    },
    "food101": {
        "bp": (92.4, 88.3, 84.7, 66.4, 19.6, 12.3, 10.5),
        "ops_lr": (88.4, 85.3, 82.1, 70.3, 37.2, 25.2, 18.6),
        "ops_spsa": (87.6, 84.7, 80.3, 70.4, 36.4, 23.6, 15.3),
    },
    "cifar100": {
        "bp": (90.7, 83.8, 75.2, 43.5, 18.3, 9.3, 7.5),
        "ops_lr": (88.7, 84.3, 77.6, 52.9, 25.4, 14.8, 12.3),
        "ops_spsa": (82.2, 79.3, 76.8, 48.2, 22.5, 13.8, 9.4),
    },
}
"""Accuracies in percent of ViT-Base by data set and method, in the order of ``KINDS``; Table 3 of the paper."""

METHODS = ("bp", "ops_lr", "ops_spsa", "bp_stopped", "bp_noise")
PAIRS = (
    ("ops_lr", "bp"), ("ops_spsa", "bp"), ("ops_lr", "ops_spsa"), ("ops_lr", "bp_stopped"), ("ops_lr", "bp_noise"),
    ("bp_noise", "bp"),
)  # fmt: skip
"""Whose differences are reported, seed by seed."""
MEASURES = {
    "accuracy": "accuracy in percent",
    "kept": "share kept in percent of the images read correctly without noise",
    "drop": "accuracy without noise less accuracy with it",
}
# In small: the two upper blocks and a new head of a ViT of 1.8 million parameters learn from 960 images in 300 steps.
SMALL = {
    "trainer.max_epochs": 5, "data.init_args.batch_size": 16, "data.init_args.images_per_class": 96,
    "data.init_args.val_images": 200, "data.init_args.test_images": 1000,
}  # fmt: skip
QUICK = {
    **SMALL, "trainer.max_epochs": 1, "data.init_args.images_per_class": 4, "data.init_args.val_images": 10,
    "data.init_args.test_images": 10,
}  # fmt: skip
RATE = "--model.init_args.optimizer.lr"
SMALL_RATES = {"ops_spsa": 3e-3}
"""Of the methods whose best rate in small is not the configuration's, by the late training loss of seed 1000."""


class Key(NamedTuple):
    data_set: str
    method: str
    seed: int


def training(options: argparse.Namespace) -> dict[Key, Cell]:
    """The runs whose weights are tested, ``bp_stopped`` taking those of backprop."""
    small = options.small or options.quick
    model = "vit_micro" if small else "vit_base"
    smaller = arguments(QUICK if options.quick else SMALL) if small else []
    given = argparse.Namespace(
        models=[model], data_sets=options.data_sets, methods=["bp", "ops_lr", "ops_spsa"], seeds=options.seeds,
        only=options.only, small=False, extra=(*smaller, *options.extra), output=options.output,
    )  # fmt: skip
    wanted = {*options.methods} | ({"bp", "ops_lr"} if "bp_stopped" in options.methods else set())
    found = {}
    for (_, data_set, method, seed), planned in table1.cells(given, keeps_weights=True).items():
        own = small and method in SMALL_RATES and not any(each.startswith(RATE) for each in planned.arguments)
        rate = (RATE, f"{SMALL_RATES[method]:g}") if own else ()
        cell = replace(planned, arguments=(*planned.arguments, *rate))
        saves = method == "bp" and "bp_stopped" in wanted
        if method in wanted:
            found[Key(data_set, method, seed)] = _with_checkpoints(cell, every=options.every) if saves else cell
        if method == "bp" and "bp_noise" in wanted:
            found[Key(data_set, "bp_noise", seed)] = _with_noise(cell, f"configs/{model}_{data_set}.yaml")
    return found


def _with_checkpoints(cell: Cell, *, every: int) -> Cell:
    """Backprop that validates and saves every so many steps; not resumed, as its curve would be in two files."""
    saver = "lightning.pytorch.callbacks.ModelCheckpoint"
    own = ("save_top_k=-1", f"every_n_train_steps={every}", "filename=at_{step}")
    savers = [f"--trainer.callbacks+={saver}", *(f"--trainer.callbacks.{setting}" for setting in own)]
    savers += [f"--trainer.callbacks+={saver}", "--trainer.callbacks.save_on_train_epoch_end=true"]  # the end
    often = arguments({"trainer.val_check_interval": every})
    return replace(cell, arguments=(*cell.arguments, *often, *savers), resumes=False)


def _with_noise(cell: Cell, config: str) -> Cell:
    """The same run in another folder, with noise of the sites' widths behind the sites."""
    sites = yaml.safe_load(Path(config).read_text())["model"]["init_args"]["strategy"]["init_args"]["sites"]
    sigma = {site["stages"][-1]: site["sigma"] for site in sites}
    name = cell.name.replace("/bp/", "/bp_noise/")
    own = [str(cell.study / name) if part == str(cell.folder) else part for part in cell.arguments]
    noise = "--trainer.callbacks+=experiments.activation_noise.ActivationNoise"
    return replace(cell, name=name, arguments=(*own, noise, *arguments({"trainer.callbacks.sigma": sigma})))


def evaluation(options: argparse.Namespace, trained: Mapping[Key, Cell]) -> dict[Key, Cell]:
    """A test of each trained network; refuses finished runs whose weights are gone."""
    overlay = "configs/small/robustness.yaml" if options.small or options.quick else "configs/eval/robustness.yaml"
    files: dict[Key, Path | None] = {}
    for key in dict.fromkeys(Key(d, m, s) for d, _, s in trained for m in options.methods):
        own = trained.get(key._replace(method="bp" if key.method == "bp_stopped" else key.method))
        aim = trained.get(key._replace(method="ops_lr"))
        if own is None or not own.finished or (key.method == "bp_stopped" and (aim is None or not aim.finished)):
            continue
        files[key] = nearest(own, aim) if key.method == "bp_stopped" and aim else last(own)
    if lost := [key for key, file in files.items() if file is None]:
        names = ", ".join(f"{data_set}/{method}/seed_{seed}" for data_set, method, seed in lost)
        problem = f"holds no weights of {names}, which are finished."
        remedy = f"Remove these folders, and the same command trains them again, or give another --output. {TRAINS}"
        raise SettingError("--output", str(options.output), problem, remedy)
    found = {}
    for key, file in files.items():
        own = trained[key._replace(method="bp" if key.method == "bp_stopped" else key.method)]
        given = own.arguments[2 : own.arguments.index("--seed_everything")]
        name = "robustness/" + own.name.replace("/bp/", f"/{key.method}/")
        place = {"trainer.default_root_dir": options.output / name, "ckpt_path": file}
        if "small" in overlay:
            place["data.init_args.batch_size"] = 32  # the rows that it reads at a time
        command = ("main.py", "test", *given, *configs([overlay]), *arguments(place))
        found[key] = Cell(options.output, name, command, result="robustness.json")
    return found


TRAINS = "(`experiments.table1` throws weights away.)"


def last(cell: Cell) -> Path | None:
    """The checkpoint of a run's end."""
    folders = [file.parent for file in cell.folder.rglob("*.ckpt")]
    return newest_checkpoint(folders, counts=lambda file: file.is_file() and not file.name.startswith("at_"))


def nearest(cell: Cell, aim: Cell) -> Path | None:
    """The checkpoint whose validation accuracy is nearest to another run's last one; the earlier of two."""
    files = sorted(cell.folder.rglob("at_step=*.ckpt"), key=lambda file: int(file.stem.rpartition("=")[2]))
    accuracies, wanted = [event.value for event in cell.curve("val/accuracy")], aim.curve("val/accuracy")[-1].value
    gaps = [abs(accuracy - wanted) for accuracy in accuracies]
    return files[gaps.index(min(gaps))] if files else None


Results = dict[Key, dict[str, dict[str, float]]]


def results_of(tests: Mapping[Key, Cell]) -> Results:
    """By test and name: accuracy, kept, and drop, of the tests that are finished."""
    found: Results = {}
    for key, cell in tests.items():
        if cell.finished:
            own = cell.summary["results"]
            clean = own["clean"]["accuracy"]
            found[key] = {name: {**value, "drop": clean - value["accuracy"]} for name, value in own.items()}
    return found


def report(results: Results, *, small: bool) -> str:
    """Markdown: of each data set, accuracy and share kept by method, then differences seed by seed."""
    parts = []
    for data_set in dict.fromkeys(key.data_set for key in results):
        own = {key: value for key, value in results.items() if key.data_set == data_set}
        methods = [m for m in METHODS if any(key.method == m for key in own)]
        seeds = {m: sorted(key.seed for key in own if key.method == m) for m in methods}
        names = list(next(iter(own.values())))
        paper = {} if small else PAPER.get(data_set, {})
        counts = ", ".join(f"{m} {len(each)}" for m, each in seeds.items())
        parts.append(f"## {data_set}{' in small' if small else ''} (seeds: {counts})\n")
        for measure in ("accuracy", "kept"):
            shown = [m for m in methods if m in paper and measure == "accuracy"]
            rows = []
            for name in names:
                values = {m: [100 * own[Key(data_set, m, seed)][name][measure] for seed in seeds[m]] for m in methods}
                kind = KINDS.index(name.rpartition("_")[0] or name)
                rows.append([name, *map(_interval, values.values()), *(f"{paper[m][kind]:.1f}" for m in shown)])
            title = f"{MEASURES[measure][:1].upper()}{MEASURES[measure][1:]}, mean and 95 % interval over seeds:"
            parts.append(f"{title}\n\n{markdown(['', *methods, *(f'paper {m}' for m in shown)], rows)}")
        for measure, text in MEASURES.items():
            rows, pairs = [], [(a, b) for a, b in PAIRS if a in methods and b in methods]
            for name in names[measure != "accuracy" :]:
                row = [name]
                for a, b in pairs:
                    both = sorted({*seeds[a]} & {*seeds[b]})
                    row.append(
                        paired_difference(*_columns(own, data_set, (a, b), both, name, measure)) if both else "-"
                    )
                rows.append(row)
            title = f"Differences seed by seed, {text}, in points:"
            parts.append(f"{title}\n\n{markdown(['', *(f'{a} - {b}' for a, b in pairs)], rows)}")
    return "\n".join(parts)


def _columns(
    results: Results, data_set: str, methods: Sequence[str], seeds: Sequence[int], name: str, measure: str
) -> list[list[float]]:
    return [[results[Key(data_set, m, seed)][name][measure] for seed in seeds] for m in methods]


def _interval(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{statistics.fmean(values):.1f}"
    mean, low, high = mean_interval(values)
    return f"{mean:.1f} ({low:.1f} - {high:.1f})"


def write(tests: Mapping[Key, Cell], options: argparse.Namespace) -> None:
    results = results_of(tests)
    rows = [
        (*key, name, *(value[measure] for measure in MEASURES), published(key, name))
        for key, own in results.items()
        for name, value in own.items()
    ]
    write_csv(options.output / "table3.csv", ("data_set", "method", "seed", "name", *MEASURES, "paper"), rows)
    draw_if_possible(draw_robustness, options.output)
    write_report(options.output / "table3.md", report(results, small=options.small or options.quick))


def published(key: Key, name: str) -> float | None:
    """The paper's accuracy under this kind of noise or attack, whose strength it does not name."""
    row = PAPER.get(key.data_set, {}).get(key.method)
    return row[KINDS.index(name.rpartition("_")[0] or name)] if row else None


def command_line() -> StudyParser:
    parser = StudyParser(__doc__, every=(5, "steps of backprop between the checkpoints of bp_stopped"))
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default all")
    add("--data_sets", nargs="+", choices=table1.DATA_SETS, help="default the paper's three; in small CIFAR-10")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], help="default 0 to 4")
    add("--small", action="store_true", help="configs/vit_micro_cifar10.yaml in a size for two CPU cores")
    add("--quick", action="store_true", help="the same with 40 images, to see that it works")
    add("--only", nargs="+", default=[], metavar="DATA_SET:NAME=VALUE", help="settings of the runs on one data set")
    return parser


def study(options: argparse.Namespace) -> None:
    """Train and test what is missing; exits with code 1 if a run failed, after all others."""
    small = options.small or options.quick
    options.data_sets = options.data_sets or (["cifar10"] if small else list(PAPER))
    if small and options.data_sets != ["cifar10"]:
        raise SettingError("--data_sets", options.data_sets, "in small there is CIFAR-10 alone.", "Leave it out.")
    trained, complete = training(options), True
    # Seed by seed, so that an interrupted study has whole seeds.
    for seed in dict.fromkeys(options.seeds):
        own = {key: cell for key, cell in trained.items() if key.seed == seed}
        complete &= run_all([*own.values()], keep_going=True, **options.launch)
        if not options.dry_run:
            complete &= run_all([*evaluation(options, own).values()], keep_going=True, **options.launch)
            write(evaluation(options, trained), options)
    if not complete and not options.dry_run:
        sys.exit(1)


def main(args: Sequence[str] | None = None) -> None:
    command_line().run(study, args)


if __name__ == "__main__":
    main()
