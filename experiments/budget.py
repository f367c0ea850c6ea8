"""``python -m experiments.budget --problem NAME --output DIR``: what a budget that is chosen at every step saves.

The reference trains with 20 queries for every sample and site, equal counts, for all epochs of the configuration. The
others choose the budget (``flops_lightning.allocators.budget``) and split it by an allocator. They end, and their
learning rate falls to zero, when they have spent a share of what the reference spends: ``--queries`` of its queries and
clean passes under ``price: queries``, ``--compute`` of its forward-equivalents under ``price: compute``. Noise widths
by token and the exact head are on. Each has a learning rate of its own, the best by the late training loss of a run
with a seed that is not used again, and not at the edge of its grid: that is extended until it is not. Arms such as
``4_optimal`` spend the same share of queries with a fixed average, here 4 at each site (1: without widths);
``backprop`` and ``fixed_muon`` take as many steps as the reference, with its queries in the second. Names with ``muon``
learn with Muon in the place of Adam, and ``queries_muon`` and ``compute_muon`` split by the optimal allocator.

Accuracies are compared with the reference's seed by seed; non-inferiority by a point is what the lower bound of the
difference (Student's t, one-sided, 95 %) says. Where an average ran with equal counts as well, a second table has what
the allocator adds. Finished runs are not repeated. Writes ``budget.md``, ``budget.csv`` and ``budget.png``.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from experiments.budget_tables import draw, report, spent
from experiments.command_line import StudyParser, arguments, fit
from experiments.harness import Cell, run_all
from experiments.pictures import draw_if_possible
from experiments.rates import TUNING_SEED, choose_rates
from experiments.tables import write_csv, write_report

ALLOCATORS = {
    "equal": "EqualAllocator", "gaussian": "GaussianAllocator", "optimal": "OptimalAllocator",
    "bernoulli": "BernoulliAllocator", "muon": "OptimalAllocator",
}  # fmt: skip
WHOLE = {"fixed": "allocators/equal", "fixed_muon": "method/lr_muon", "backprop": "method/bp"}
"""Overlays of the arms that train for the epochs of the configuration."""


@dataclass(frozen=True)
class Problem:
    config: str
    rates: tuple[float, ...]
    settings: Mapping[str, Any]


CIFAR = {"batch_size": 32, "val_images": 300, "test_images": 2000}
PROBLEMS = {
    "digits": Problem("configs/vit_tiny_digits.yaml", (1e-3, 2e-3, 4e-3), {}),
    "cifar10": Problem(
        "configs/vit_micro_cifar10.yaml", (1e-3, 2e-3, 4e-3),
        {"trainer.max_epochs": 1, **{f"data.init_args.{n}": v for n, v in {**CIFAR, "images_per_class": 200}.items()}},
    ),
    "cifar100": Problem(
        "configs/vit_micro_cifar10.yaml", (1e-3, 2e-3, 4e-3),
        {
            "data.class_path": "flops_lightning.datamodules.CIFAR100DataModule", "trainer.max_epochs": 1,
            **{f"data.init_args.{n}": v for n, v in {**CIFAR, "images_per_class": 40}.items()},
        },
    ),
}  # fmt: skip


def sites_with(config: str, average: int) -> list[dict[str, Any]]:
    """The sites of a configuration with another average."""
    strategy = yaml.safe_load(Path(config).read_text())["model"]["init_args"]["strategy"]
    return [{**site, "queries_per_sample": average} for site in strategy["init_args"]["sites"]]


def splitting(allocator: str, price: str) -> list[dict[str, Any]]:
    """Callbacks of a run that chooses its budget by a price, or has its own (no price)."""
    least = {} if allocator == "equal" else {"min_queries": 0.25 if allocator in ("optimal", "muon") else 1}
    traces = {} if allocator == "equal" else {"traces": {"source": "prediction"}}
    split = {"class_path": f"flops_lightning.allocators.{ALLOCATORS[allocator]}", "init_args": {**least, **traces}}
    rule = {"rule": "improvement", "price": price, "least": 0.25}
    return [
        {
            "class_path": "flops_lightning.callbacks.QueryAllocatorCallback",
            "init_args": {"allocator": split, **({"budget": rule} if price else {})},
        },
        {"class_path": "flops_lightning.callbacks.RunSummary"},
    ]


def study(options: argparse.Namespace) -> None:
    problem = PROBLEMS[options.problem]
    common = (*arguments(problem.settings), *options.extra)

    def run(cells: Sequence[Cell]) -> bool:
        return run_all(list(cells), **options.launch)

    def cell(arm: str, rate: float, seed: int, files: Sequence[str], own: Mapping[str, Any]) -> Cell:
        name, may_diverge = f"{arm}/lr_{rate:g}/seed_{seed}", seed == TUNING_SEED
        return fit(options.output, name, files, common, own, may_diverge=may_diverge)

    def whole(arm: str, rate: float, seed: int) -> Cell:
        files = (problem.config, f"configs/{WHOLE[arm]}.yaml")
        own = {"seed_everything": seed, "trainer.log_every_n_steps": 1, "model.init_args.optimizer.lr": rate}
        return cell(arm, rate, seed, files, own)

    def limited(arm: str, limit: float, rate: float, seed: int) -> Cell:
        price, _, allocator = arm.partition("_")
        by_compute, average = price == "compute", int(price) if price.isdigit() else 0
        overlay = "optimal" if average else "least_compute" if by_compute else "few_queries"
        files = (problem.config, f"configs/allocators/{overlay}.yaml")
        queries: dict[str, Any] = {"queries": round(limit), "clean_passes": "true"}
        own = {
            "seed_everything": seed, "trainer.log_every_n_steps": 1, "trainer.max_epochs": -1,
            "trainer.callbacks": splitting(allocator, "" if average else price), "model.init_args.optimizer.lr": rate,
            "model.init_args.spend": {"forward_equivalents": limit} if by_compute else queries,
        }  # fmt: skip
        if allocator == "muon":
            own["model.init_args.optimizer.name"] = "muon"
        if average:
            own["model.init_args.strategy.init_args.sites"] = sites_with(problem.config, average)
            # Widths are learned from pairs of a sample's queries.
            own["model.init_args.strategy.init_args.token_sigma"] = str(average > 1).lower()
            own["model.init_args.strategy.init_args.exact_head"] = "true"
        return cell(arm, rate, seed, files, own)

    rates, runs = dict[str, float](), dict[str, list[Cell]]()
    for arm in ("fixed", *options.arms):
        if arm in WHOLE:
            cell_of = partial(whole, arm)
        else:
            price = "compute" if arm.startswith("compute") else "queries"
            reference = statistics.fmean(spent(cell, price) for cell in runs["fixed"])
            cell_of = partial(limited, arm, reference * getattr(options, price) / 100)
        chosen = choose_rates({arm: partial(cell_of, seed=TUNING_SEED)}, {arm: problem.rates}, run)
        if chosen is None:
            return
        rates[arm] = chosen[arm].rate
        runs[arm] = [cell_of(rates[arm], seed=seed) for seed in range(options.seeds)]
        if not run(runs[arm]):
            return
    rows = [
        (name, rates[name], seed, one.summary["steps"], *(spent(one, price) for price in ("queries", "compute")),
         one.summary["test_accuracy"], one.late_loss)
        for name, own in runs.items() for seed, one in enumerate(own)
    ]  # fmt: skip
    columns = ["arm", "lr", "seed", "steps", "queries_and_clean", "forward_equivalents", "test_accuracy", "late_loss"]
    write_csv(options.output / "budget.csv", columns, rows)
    write_report(options.output / "budget.md", report(runs, rates))
    draw_if_possible(partial(draw, runs), options.output)


CHOSEN = [f"{price}_{name}" for price in ("queries", "compute", "1", "2", "4", "8", "20") for name in ALLOCATORS]


def main(args: Sequence[str] | None = None) -> None:
    parser = StudyParser(
        __doc__, seeds=(15, "seeds 0 to N-1"), queries=(15, "per cent of the reference's queries"),
        compute=(40, "per cent of the reference's forward-equivalents"),
    )  # fmt: skip
    parser.add_argument("--problem", choices=list(PROBLEMS), required=True)
    parser.add_argument(
        "--arms",
        nargs="+",
        default=["queries_optimal", "queries_equal", "compute_optimal"],
        choices=[*CHOSEN, "backprop", "fixed_muon"],
    )
    parser.run(study, args)


if __name__ == "__main__":
    main()
