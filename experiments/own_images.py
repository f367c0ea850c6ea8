"""``python -m experiments.own_images --problem NAME --output DIR -- --data.init_args.root FOLDER``: images of your own.

Forward passes alone (likelihood ratio with few queries, the optimal allocator, widths for each token and an exact
head), backprop, backprop on the head alone, and MeZO train ``configs/image_folder.yaml`` on a folder of images, from a
small pretrained ViT or from a ConvNeXt with random weights, by ``main.py fit`` in processes of their own.

The learning rate of each method is the best of a ladder by the validation accuracy of one run with a seed that is not
used again; the ladder is climbed until both neighbours of the best are worse. ConvNeXt's rates are chosen by runs of
one epoch, those of the ViT on CIFAR-100 on UC Merced. Finished runs are not repeated. Writes ``own_images.md`` and
``own_images.csv``.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from experiments.command_line import StudyParser, fit
from experiments.harness import Cell, run_all
from experiments.tables import markdown, spread, write_csv, write_report

BASE = "configs/image_folder.yaml"
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
FIRST = {"ops_lr": 3e-3, "bp": 1e-3, "head": 1e-2, "mezo": 3e-3}  # where each method begins to climb
TUNING_SEED = 1000
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


def best_rate(accuracies: Mapping[float, float], first: float) -> tuple[float, list[float]]:
    """The best rate so far, and its neighbours on the ladder that have no accuracy yet."""
    best = max(accuracies, key=accuracies.__getitem__, default=first)
    i = LADDER.index(best)
    return best, [rate for rate in LADDER[max(0, i - 1) : i + 2] if rate not in accuracies]


def study(options: argparse.Namespace) -> None:
    problem = PROBLEMS[options.problem]

    def cell(method: str, rate: float, seed: int) -> Cell:
        overlay = "bp" if method == "head" else method
        files = (*problem.files, f"configs/method/{overlay}.yaml")
        own, name = settings_of(problem, method, rate, seed), f"{method}/lr_{rate:g}/seed_{seed}"
        return fit(options.output, name, files, options.extra, own, may_diverge=seed == TUNING_SEED)

    rates = {method: problem.rates.get(method, 0.0) for method in options.methods}
    for method in (name for name, rate in rates.items() if not rate):
        tried: dict[float, float] = {}
        while left := best_rate(tried, FIRST[method])[1]:
            runs = {rate: cell(method, rate, TUNING_SEED) for rate in left}
            if not run_all([*runs.values()], **options.launch):
                return
            tried |= {r: 0.0 if run.diverged else run.curve("val/accuracy")[-1].value for r, run in runs.items()}
        rates[method] = best_rate(tried, FIRST[method])[0]
    found = {(method, seed): cell(method, rates[method], seed) for method in rates for seed in range(options.seeds)}
    if not run_all([*found.values()], **options.launch):
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
