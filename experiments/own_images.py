"""``python -m experiments.own_images --problem NAME --output DIR -- --data.init_args.root FOLDER``: images of your own.

Forward passes alone (likelihood ratio with few queries, the optimal allocator, widths for each token and an exact
head), backprop, backprop on the head alone, and MeZO train ``configs/image_folder.yaml`` on a folder of images, from a
small pretrained ViT or from a ConvNeXt with random weights, by ``main.py fit`` in processes of their own.

The learning rate of each method is the best of a ladder by the validation accuracy of one run with a seed that is not
used again; the ladder goes on until both neighbours of the best are worse. ConvNeXt's rates are chosen by runs of
one epoch, those of the ViT on CIFAR-100 on UC Merced. Finished runs are not repeated. Writes ``own_images.md`` and
``own_images.csv``.
"""

import argparse
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from experiments.command_line import StudyParser, fit
from experiments.harness import Cell, run_all
from experiments.rates import TUNING_SEED, choose_rates
from experiments.tables import markdown, spread, write_csv, write_report

BASE = "configs/image_folder.yaml"
FIRST = {
    "ops_lr": (1e-3, 3e-3, 1e-2), "bp": (3e-4, 1e-3, 3e-3), "head": (3e-3, 1e-2, 3e-2), "mezo": (1e-3, 3e-3, 1e-2),
}  # fmt: skip
"""Rates with which each method begins."""
QUERIES = 4  # of a sample at each site


@dataclass(frozen=True)
class Problem:
    epochs: int
    sites: Mapping[str, tuple[str, ...]]  # name and range of stages; the last is the head
    sigma: float
    files: tuple[str, ...] = (BASE,)
    settings: Mapping[str, Any] = field(default_factory=dict)
    freeze: tuple[str, ...] = ()
    tuning: Mapping[str, Any] = field(default_factory=dict)  # settings of the runs that choose a rate
    rates: Mapping[str, float] = field(default_factory=dict)  # chosen already, on another folder with this network


BLOCKS = {"block4": ("blocks.4",), "block5": ("blocks.5",), "head": ("pool", "head")}
BELOW = ("cls_token", "pos_embed", "patch_embed.*", "norm_pre.*", "blocks.[0-3].*")
VIT = (BASE, "configs/small/vit_micro.yaml")
# The default layout, named so that its queries can be set.
GROUPS = {
    "lower": ("stem", "stages.1.blocks.0"), "middle": ("stages.1.blocks.1", "stages.2.blocks.3"),
    "upper": ("stages.2.blocks.4", "stages.3.blocks.1"), "head": ("head.norm", "head.fc"),
}  # fmt: skip
RANDOM = {"model.init_args.model_name": "convnext_atto", "model.init_args.pretrained": "false"}
PROBLEMS = {
    "ucmerced_vit": Problem(5, BLOCKS, 0.03, VIT, {"data.init_args.batch_size": 64}, BELOW),
    "ucmerced_convnext": Problem(
        3,
        GROUPS,
        0.01,
        settings={**RANDOM, "data.init_args.batch_size": 32, "data.init_args.image_size": 64},
        tuning={"trainer.max_epochs": 1, "trainer.check_val_every_n_epoch": 1},
    ),
    "cifar100_vit": Problem(
        1,
        BLOCKS,
        0.03,
        VIT,
        {"data.init_args.batch_size": 64, "data.init_args.val_share": 0.1},
        BELOW,
        rates={"ops_lr": 3e-3, "bp": 3e-3, "head": 3e-2},
    ),
}


def settings_of(problem: Problem, method: str, rate: float, seed: int) -> dict[str, Any]:
    found = {
        "seed_everything": seed, "trainer.accelerator": "cpu", "trainer.max_epochs": problem.epochs,
        "trainer.check_val_every_n_epoch": problem.epochs, "data.init_args.num_workers": 0,
        "data.init_args.augment": "false", "model.init_args.freeze": [] if method == "head" else [*problem.freeze],
        "model.init_args.optimizer": {"name": "adam", "lr": rate, "schedule": "cosine", "warmup_steps": 10},
    }  # fmt: skip
    if method == "head":
        found["model.init_args.target"] = {"kind": "head"}
    if method == "ops_lr":
        sites = [
            {"name": name, "stages": stages, "sigma": problem.sigma, "queries_per_sample": QUERIES}
            for name, stages in problem.sites.items()
        ]
        own = {"sites": sites, "token_sigma": "true", "exact_head": "true"}
        found |= {f"model.init_args.strategy.init_args.{name}": value for name, value in own.items()}
    return {**found, **problem.settings, **(problem.tuning if seed == TUNING_SEED else {})}


def validation_error(cell: Cell) -> float:
    """At the end; infinite where the run diverged."""
    return math.inf if cell.diverged else 1 - float(cell.curve("val/accuracy")[-1].value)


def study(options: argparse.Namespace) -> None:
    problem = PROBLEMS[options.problem]

    def cell(method: str, rate: float, seed: int) -> Cell:
        overlay = "bp" if method == "head" else method
        files = (*problem.files, f"configs/method/{overlay}.yaml")
        own, name = settings_of(problem, method, rate, seed), f"{method}/lr_{rate:g}/seed_{seed}"
        return fit(options.output, name, files, options.extra, own, may_diverge=seed == TUNING_SEED)

    def run(cells: Sequence[Cell]) -> bool:
        return run_all(cells, **options.launch)

    tried = {method: partial(cell, method, seed=TUNING_SEED) for method in options.methods}
    grids = {method: [problem.rates[method]] if method in problem.rates else FIRST[method] for method in tried}
    chosen = choose_rates(tried, grids, run, validation_error)
    if chosen is None:
        return
    rates = {method: choice.rate for method, choice in chosen.items()}
    found = {(method, seed): cell(method, rates[method], seed) for method in rates for seed in range(options.seeds)}
    if not run([*found.values()]):
        return
    columns = ("start_accuracy", "test_accuracy", "steps", "queries", "forward_equivalents", "train_seconds")
    rows = [
        (method, rates[method], seed, *(run.summary[name] for name in columns)) for (method, seed), run in found.items()
    ]
    write_csv(options.output / "own_images.csv", ("method", "lr", "seed", *columns), rows)
    write_report(options.output / "own_images.md", table(rows))


def table(rows: Sequence[Sequence[Any]]) -> str:
    """Markdown: each method with its rate, its accuracies and what they cost."""
    lines = []
    for method in dict.fromkeys(row[0] for row in rows):
        own = [row for row in rows if row[0] == method]
        start, accuracy, steps, queries, equivalents, seconds = zip(*(row[3:] for row in own), strict=True)
        numbers = [f"{statistics.fmean(each):,.0f}" for each in (steps, queries, equivalents)]
        line = [method, f"{own[0][1]:g}", spread(accuracy), f"{statistics.fmean(start):.1%}", *numbers]
        lines.append([*line, f"{statistics.median(seconds):.0f}"])
    return markdown(
        ["method", "learning rate", "test accuracy, mean (min - max)", "at the start", "steps", "queries",
         "forward-equivalents", "training time, s (median)"], lines,
    )  # fmt: skip


def main(args: Sequence[str] | None = None) -> None:
    parser = StudyParser(__doc__, seeds=(3, "seeds 0 to N-1"), threads=(1, "threads of a run"))
    parser.add_argument("--problem", choices=list(PROBLEMS), required=True)
    parser.add_argument("--methods", nargs="+", default=list(FIRST), choices=list(FIRST))
    parser.run(study, args)


if __name__ == "__main__":
    main()
