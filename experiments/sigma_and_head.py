"""``python -m experiments.sigma_and_head --output DIR``: what per-token sigma and the exact head are worth.

**Variance**: the network of a configuration is trained with equal counts as it is configured; at a series of
checkpoints the gradient of the same batches is estimated again and again with each setting, and the variance of the
estimate summed over the parameters. The widths of tokens are learned at the checkpoint, from queries on other batches.
**Accuracy**: every setting trains from the same start, seed by seed, by ``main.py fit`` in processes of their own.

The exact head is shown twice: without the queries that it saves, and with them given to the other sites, so that the
queries are equal.

Interrupted, it continues when started again. Writes ``variance.csv``, ``accuracy.csv`` and ``sigma_and_head.md``.
"""

import argparse
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.command_line import StudyParser, configs, fit
from experiments.harness import Cell, claim, run_all
from experiments.tables import markdown, paired_difference, paired_ratio, read_csv, spread, write_csv, write_report
from experiments.training import Batch, EqualCountsRun
from flops_lightning.errors import SettingError
from flops_lightning.strategies import LikelihoodRatio
from flops_lightning.strategies.site_specs import SiteSpec
from flops_lightning.strategies.widths import HALF_LIFE

CONFIGS = ("configs/vit_tiny_digits.yaml", "configs/digits/equal.yaml")
BASE = "neither"
VARIANCE_COLUMNS = ("checkpoint", "setting", "batch", "site", "variance")
ACCURACY_COLUMNS = ("setting", "seed", "queries_per_sample", "late_loss", "test_accuracy")
Settings = Mapping[str, Any]


def compared(strategy: LikelihoodRatio) -> dict[str, Settings]:
    """Settings of the strategy that are compared, by name; :data:`BASE` changes nothing."""
    specs, names = strategy.specs, [site.name for site in strategy.sites]
    if len(specs) < 2 or len(specs) != len(names):  # the head's queries cannot be given to the others one by one
        remedy = "Name two or more sites of kind group."
        raise SettingError("strategy.sites", names, "does not have one entry for each site.", remedy)
    given = {"exact_head": True, "sites": [asdict(spec) for spec in spread_queries(specs)]}
    return {
        BASE: {},
        "token sigma": {"token_sigma": True},
        "exact head": {"exact_head": True},
        "exact head, its queries given": given,
        "both, queries given": {**given, "token_sigma": True},
    }


def spread_queries(specs: Sequence[SiteSpec]) -> list[SiteSpec]:
    """Sites that have the queries of the last one as well, in parts as equal as can be; the lower get the remainder."""
    *others, head = specs
    share, left = divmod(head.queries_per_sample, len(others))
    raised = [spec.queries_per_sample + share + (i < left) for i, spec in enumerate(others)]
    return [*(replace(spec, queries_per_sample=n) for spec, n in zip(others, raised, strict=True)), head]


def site_variances(strategy: LikelihoodRatio, batch: Batch, *, draws: int) -> dict[str, float]:
    """Sum over each site's parameters of the variance of the gradient estimate, by ``draws`` estimates of one batch."""
    gradients: dict[str, list[Tensor]] = {}
    for _ in range(draws):
        strategy.network.module.zero_grad()
        strategy.estimate(strategy.clean_pass(*batch))
        for site in (*strategy.sites, *strategy.exact_sites):
            found = [p.grad.flatten() for p in site.parameters.values() if p.grad is not None]
            gradients.setdefault(site.name, []).append(torch.cat(found).double())
    strategy.network.module.zero_grad()
    return {name: float(torch.stack(each).var(dim=0).sum()) for name, each in gradients.items()}


def _random_batches(run: EqualCountsRun, number: int, seed: int) -> list[Batch]:
    return [run.images(run.shuffled(seed * 10_000 + i)[: run.data.batch_size]) for i in range(number)]


def measure(run: EqualCountsRun, step: int, *, batches: int, draws: int) -> list[tuple[Any, ...]]:
    rows: list[tuple[Any, ...]] = []
    measured = _random_batches(run, batches, seed=2 * step)
    own = {name: getattr(run.strategy, name) for name in ("variant", "chunk_rows", "seed")}
    for name, settings in compared(run.strategy).items():
        strategy = LikelihoodRatio(**{"sites": run.strategy.specs, **own, **settings})
        strategy.bind(run.task.network, run.task.loss)
        if strategy.token_sigma:
            for batch in _random_batches(run, 3 * HALF_LIFE, seed=2 * step + 1):
                strategy.estimate(strategy.clean_pass(*batch))
        for i, batch in enumerate(measured):
            found = site_variances(strategy, batch, draws=draws)
            rows += [(step, name, i, site, value) for site, value in found.items()]
    return rows


def measure_variances(run: EqualCountsRun, path: Path, *, checkpoints: int, batches: int, draws: int) -> None:
    """Train and measure before the first step, at halves of the run and at its end, where the file has no rows yet."""
    steps = {0, *(run.steps // 2**k for k in range(checkpoints - 1))}
    left = sorted(steps - {int(row["checkpoint"]) for row in read_csv(path)})
    for step, (images, labels) in run.batches(0):
        if not left:
            return
        if step == left[0]:
            rows = measure(run, left.pop(0), batches=batches, draws=draws)
            write_csv(path, VARIANCE_COLUMNS, rows, append=True)
            print(f"variance measured before step {step} of {run.steps}", flush=True)
        run.step(run.strategy.clean_pass(images, labels))


def variance_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown: variance without a setting over variance with it, at each checkpoint and site."""
    values = {tuple(row[name] for name in VARIANCE_COLUMNS[:-1]): float(row["variance"]) for row in rows}
    checkpoints, settings, batches, sites = (list(dict.fromkeys(each)) for each in zip(*values, strict=True))
    lines = []
    for checkpoint, setting in product(checkpoints, [name for name in settings if name != BASE]):
        line = [checkpoint, setting]
        for group in (sites, *([site] for site in sites)):
            before, after = (
                [sum(values[checkpoint, name, batch, site] for site in group) for batch in batches]
                for name in (BASE, setting)
            )
            exact = all(a <= 1e-9 * b for a, b in zip(after, before, strict=True))
            line.append("exact" if exact else paired_ratio(before, after))
        lines.append(line)
    return markdown(["before step", "setting", "all parameters", *sites], lines)


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: every setting against the one without either, seed by seed."""
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        queries, loss, accuracy, _, *base = (
            [row[column] for row in rows if row["setting"] == name]
            for name, column in product((setting, BASE), ACCURACY_COLUMNS[2:])
        )
        gained, ratio = paired_difference(accuracy, base[1]), paired_ratio(loss, base[0])
        if setting == BASE:
            gained = ratio = ""
        lines.append([setting, f"{queries[0]:g}", spread(accuracy), gained, f"{statistics.fmean(loss):.3f}", ratio])
    columns = ["setting", "queries per sample", "test accuracy, mean (min - max)", "difference, points",
               "training loss, last quarter", "ratio"]  # fmt: skip
    return markdown(columns, lines)


def cells(settings: Mapping[str, Settings], options: argparse.Namespace) -> dict[tuple[str, int], Cell]:
    found = {}
    for seed, (name, changed) in product(range(options.seeds), settings.items()):
        own = {"seed_everything": seed, "trainer.log_every_n_steps": 1}
        own |= {f"model.init_args.strategy.init_args.{key}": value for key, value in changed.items()}
        folder = f"{name.replace(', ', '_').replace(' ', '_')}/seed_{seed}"
        found[name, seed] = fit(options.output, folder, options.config, options.extra, own)
    return found


def study(options: argparse.Namespace) -> None:
    options.config = options.config or list(CONFIGS)
    arguments = [*configs(options.config), *options.extra]
    torch.set_num_threads(options.threads)
    run, variance = EqualCountsRun(arguments), options.output / "variance.csv"
    runs = cells(compared(run.strategy), options)
    if not options.dry_run:
        measured = {name: getattr(options, name) for name in ("checkpoints", "batches", "draws")}
        claim(options.output, {"arguments": arguments, **measured})
        measure_variances(run, variance, **measured)
    if not run_all([*runs.values()], **options.launch):
        return
    rows = [
        {**cell.summary, "setting": name, "seed": seed, "late_loss": cell.late_loss}
        for (name, seed), cell in runs.items()
    ]
    write_csv(options.output / "accuracy.csv", ACCURACY_COLUMNS, [[row[c] for c in ACCURACY_COLUMNS] for row in rows])
    text = f"{variance_table(read_csv(variance))}\n{accuracy_table(rows)}"
    write_report(options.output / "sigma_and_head.md", text)


def main(args: Sequence[str] | None = None) -> None:
    parser = StudyParser(
        __doc__, seeds=(5, "seeds 0 to N-1"), checkpoints=(3, "checkpoints of the variance"),
        batches=(5, "batches measured at each"), draws=(20, "estimates of each batch"),
        threads=(os.cpu_count() or 1, "threads of a run"),
    )  # fmt: skip
    parser.add_argument("--config", action="append", help=f"configuration file; may be repeated (default {CONFIGS})")
    parser.run(study, args)


if __name__ == "__main__":
    main()
