"""The variance part of the study of per-token sigma and the exact head, and the settings that it compares."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.allocation import Run
from experiments.allocation_scores import interval
from flops_lightning.errors import SettingError
from flops_lightning.strategies import LikelihoodRatio
from flops_lightning.strategies.site_specs import SiteSpec
from flops_lightning.strategies.token_sigma import HALF_LIFE

BASE = "neither"
VARIANCE_COLUMNS = ("checkpoint", "setting", "batch", "site", "variance")
Settings = Mapping[str, Any]
Batch = tuple[Tensor, Tensor]


def compared(strategy: LikelihoodRatio) -> dict[str, Settings]:
    """Settings of the strategy that are compared, by name; :data:`BASE` changes nothing.

    Raises:
        SettingError: the strategy names no sites, or several by one entry, so that the head's queries cannot be given
            to others one by one.
    """
    specs = strategy.specs
    if len(specs) < 2 or len(specs) != len(strategy.sites):
        raise SettingError(
            "strategy.sites", [site.name for site in strategy.sites], "is not one site for each entry.",
            "Name two or more sites of kind group.",
        )  # fmt: skip
    given = {"exact_head": True, "sites": [asdict(spec) for spec in spread_queries(specs)]}
    return {
        BASE: {},
        "token sigma": {"token_sigma": True},
        "exact head": {"exact_head": True},
        "exact head, its queries given": given,
        "both, queries given": {**given, "token_sigma": True},
    }


def spread_queries(specs: Sequence[SiteSpec]) -> list[SiteSpec]:
    """Sites that have the queries of the last one as well, in parts as equal as can be; the lower get what is left."""
    share, left = divmod(specs[-1].queries_per_sample, len(specs) - 1)
    more = [share + (i < left) for i in range(len(specs) - 1)]
    raised = [
        replace(spec, queries_per_sample=spec.queries_per_sample + n) for spec, n in zip(specs[:-1], more, strict=True)
    ]
    return [*raised, specs[-1]]


def site_variances(strategy: LikelihoodRatio, batch: Batch, *, draws: int) -> dict[str, float]:
    """Sum over each site's parameters of the variance of the gradient estimate, by ``draws`` estimates of one batch."""
    sites = (*strategy.sites, *strategy.exact_sites)
    parameters = list(strategy.network.trainable().values())
    sums: dict[str, Tensor] = {}
    squares = dict.fromkeys((site.name for site in sites), 0.0)
    for _ in range(draws):
        for parameter in parameters:
            parameter.grad = None
        strategy.estimate(strategy.clean_pass(*batch))
        for site in sites:
            found = [p.grad for p in site.parameters.values() if p.grad is not None]
            flat = torch.cat([g.flatten() for g in found]).double()
            squares[site.name] += float(flat.square().sum())
            sums[site.name] = sums.get(site.name, torch.zeros_like(flat)) + flat
    for parameter in parameters:
        parameter.grad = None
    scatter = {name: squares[name] - float(total.square().sum()) / draws for name, total in sums.items()}
    return {name: value / (draws - 1) for name, value in scatter.items()}


def random_batches(run: Run, number: int, seed: int) -> list[Batch]:
    """Batches of the training set."""
    size, found = run.data.batch_size, []
    for i in range(number):
        generator = torch.Generator().manual_seed(seed * 10_000 + i)
        chosen = torch.randperm(len(run.data.train_set), generator=generator)[:size]
        images, labels = zip(*(run.data.train_set[int(j)] for j in chosen), strict=True)
        found.append((torch.stack(images), torch.as_tensor(labels)))
    return found


def measure(run: Run, step: int, *, batches: int, draws: int) -> list[tuple[Any, ...]]:
    """Rows of ``variance.csv`` at one checkpoint."""
    rows: list[tuple[Any, ...]] = []
    measured = random_batches(run, batches, seed=2 * step)
    for name, settings in compared(run.strategy).items():
        own = {"sites": run.strategy.specs, "variant": run.strategy.variant, "chunk_rows": run.strategy.chunk_rows}
        strategy = LikelihoodRatio(**{**own, "seed": run.strategy.seed, **settings})
        strategy.bind(run.task.network, run.task.loss)
        if strategy.token_sigma:
            for batch in random_batches(run, 3 * HALF_LIFE, seed=2 * step + 1):
                strategy.estimate(strategy.clean_pass(*batch))
        for i, batch in enumerate(measured):
            found = site_variances(strategy, batch, draws=draws)
            rows += [(step, name, i, site, value) for site, value in found.items()]
    return rows


def measure_variances(arguments: Sequence[str], path: Path, *, checkpoints: int, batches: int, draws: int) -> None:
    """Train as configured and measure at so many checkpoints: before the first step, at halves of the run, at its end.

    Checkpoints that are in the file already are passed over.
    """
    run = Run(arguments)
    compared(run.strategy)
    steps = {0, *(run.steps // 2**k for k in range(checkpoints - 1))}
    done = {int(row["checkpoint"]) for row in read_table(path)}
    left = sorted(steps - done)
    for step, (images, labels) in run.batches(0):
        if not left:
            return
        if step == left[0]:
            append(path, VARIANCE_COLUMNS, measure(run, left.pop(0), batches=batches, draws=draws))
            print(f"variance measured before step {step} of {run.steps}", flush=True)
        run.step(run.strategy.clean_pass(images, labels))


def variance_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Markdown: variance without a setting over variance with it, at each checkpoint and site."""
    values = {(row["checkpoint"], row["setting"], row["batch"], row["site"]): float(row["variance"]) for row in rows}
    sites, settings, checkpoints = (
        list(dict.fromkeys(row[k] for row in rows)) for k in ("site", "setting", "checkpoint")
    )
    lines = ["| before step | setting | all parameters | " + " | ".join(sites) + " |", "|" + "---|" * (3 + len(sites))]
    for checkpoint in checkpoints:
        batches = dict.fromkeys(row["batch"] for row in rows if row["checkpoint"] == checkpoint)
        for setting in settings:
            if setting == BASE:
                continue
            cells = []
            for group in (sites, *([site] for site in sites)):
                pairs = [
                    [sum(values[checkpoint, name, batch, site] for site in group) for name in (BASE, setting)]
                    for batch in batches
                ]
                exact = all(after <= 1e-9 * before for before, after in pairs)
                cells.append("exact" if exact else ratio([before / after for before, after in pairs]))
            lines.append(f"| {checkpoint} | {setting} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def ratio(ratios: Sequence[float]) -> str:
    """Geometric mean of ratios with its 95 % interval."""
    mean, low, high = interval(ratios)
    return f"{mean:.2f} ({low:.2f} - {high:.2f})"


def read_table(path: Path) -> list[dict[str, str]]:
    """Rows of a table; none if it is not there."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Append rows, under a header."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([columns, *rows] if new else rows)
