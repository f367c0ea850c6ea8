"""``python -m experiments.tune --output DIR``: how good the settings are that ``main.py tune`` finds.

For every seed, ``tune`` searches as a user would. Then the widths it tried are compared by the cosine of the estimate
with the gradient by backprop, on batches that it has not seen; and runs with its rate, with eight rates half a decade
apart and with the configuration's own compare the final loss, the mean clean loss of the last quarter of a run. One run
ranks neighbouring rates by luck, so every rate has several, whose order of batches and noise are not those of the
search; each of these is the same for all rates. The runs have the widths that were found, but for those with the
configuration's rate, which have its widths.

Interrupted, it continues with the next seed when started again. Writes ``sigma.csv``, ``rate.csv`` and ``tune.md``.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from experiments.command_line import StudyParser, configs
from experiments.harness import claim
from experiments.tables import markdown, read_csv, write_csv, write_report
from flops_lightning.errors import LostQueriesError
from flops_lightning.strategies import Backprop, ForwardGradientStrategy
from flops_lightning.tasks import ForwardModule
from flops_lightning.tune.rate import Recorder, Trial, returning, short_fit
from flops_lightning.tune.search import Tuned, tune

CONFIG = "configs/vit_tiny_digits.yaml"
GRID = [i / 2 for i in range(-4, 4)]  # decades around the rate of the configuration
UNSEEN, DRAWS = 3, 2  # batches after those of the search, and estimates of each
SIGMA = ("seed", "site", "kind", "sigma", "cosine")
RATE = ("seed", "kind", "rate", "repeat", "loss", "seconds")
ORDERS = 1000  # seed of the order of batches in the first of the runs that compare rates
OWN, FOUND, TRIED = "configuration", "found", "grid"

Row = tuple[Any, ...]


class Seed:
    """A configuration with a seed, and what ``tune`` finds for it."""

    def __init__(self, arguments: Sequence[str], seed: int, options: argparse.Namespace) -> None:
        from flops_lightning.cli.command import build

        cli = build([*arguments, "--seed_everything", str(seed)])
        self.seed, self.task, self.data = seed, cli.model, cli.datamodule
        self.settings, self.run = dict(cli.config_init["trainer"]), cli.trainer
        self.steps, self.repeats, began = options.steps, options.repeats, time.monotonic()
        assert isinstance(self.task, ForwardModule)
        assert self.task.strategy is not None
        self.strategy: ForwardGradientStrategy = self.task.strategy
        self.tuned: Tuned = tune(self.task, self.data, self.settings, steps=options.tuning_steps)
        self.seconds = time.monotonic() - began

    def sigma_rows(self) -> list[Row]:
        """Cosines with the gradient at every width that was tried and at those before."""
        with returning(self.task, self.strategy) as start:
            measured = Cosines(self.task, self.tuned)
            start.weights()
            short_fit(self.task, self.data, self.run, self.settings, steps=measured.last, callback=measured)
        rows = []
        for site, search in self.tuned.sigmas.items():
            kinds = {search.found: FOUND}
            for column, sigma in enumerate((*search.sigmas, search.given)):
                kind = OWN if column == len(search.sigmas) else kinds.get(sigma, TRIED)
                rows.append((self.seed, site, kind, sigma, measured.cosines[column][site]))
        return rows

    def rate_rows(self) -> list[Row]:
        """Final losses."""
        assert self.tuned.rate is not None
        own, given = self.task.optimizer_settings.lr, self.strategy.sigmas
        rows = self.losses(OWN, own, 0.0)
        self.strategy.set_sigmas(self.tuned.widths)
        rows += self.losses(FOUND, self.tuned.rate.found, self.seconds)
        rows += [row for i in GRID for row in self.losses(TRIED, own * 10**i, 0.0)]
        self.strategy.set_sigmas(given)
        return rows

    def losses(self, kind: str, rate: float, seconds: float) -> list[Row]:
        return [(self.seed, kind, rate, i, self.loss(rate, i), seconds) for i in range(self.repeats)]

    def loss(self, rate: float, repeat: int) -> float:
        seed = os.environ["PL_GLOBAL_SEED"]
        with returning(self.task, self.strategy):
            self.task.optimizer_settings, recorder = replace(self.task.optimizer_settings, lr=rate), Recorder()
            self.strategy.draw, os.environ["PL_GLOBAL_SEED"] = 10**6 * (1 + repeat), str(ORDERS + repeat)
            try:
                short_fit(self.task, self.data, self.run, self.settings, steps=self.steps, callback=recorder)
            except LostQueriesError:
                return math.inf
            finally:
                os.environ["PL_GLOBAL_SEED"] = seed
        return Trial(rate, self.steps, tuple(recorder.losses)).loss


class Cosines(Recorder):
    """With the gradient by backprop, at each site and width, on batches after those of the search."""

    def __init__(self, task: ForwardModule, tuned: Tuned, seen: int = 3) -> None:
        super().__init__()
        self.task, self.tuned, self.seen, self.last = task, tuned, seen, seen + UNSEEN
        self.start = {name: p.detach().clone() for name, p in task.named_parameters()}
        self.batches: list[Any] = []
        self.cosines: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(self.task.split(batch))
        if len(self.batches) == self.last:
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                for name, p in self.task.named_parameters():
                    p.copy_(self.start[name])
                self.measure()

    def measure(self) -> None:
        strategy, exact = self.task.strategy, Backprop()
        assert strategy is not None
        exact.bind(self.task.network, self.task.loss)
        given, batches = strategy.sigmas, self.batches[self.seen :]
        truth = [self.gradients(exact, batch, strategy) for batch in batches]
        widths = [[*search.sigmas, search.given] for search in self.tuned.sigmas.values()]
        for column in zip(*widths, strict=True):
            strategy.set_sigmas(dict(zip(self.tuned.sigmas, column, strict=True)))
            found: dict[str, list[Tensor]] = {name: [] for name in self.tuned.sigmas}
            for i, batch in enumerate(batches):
                for draw in range(DRAWS):
                    strategy.draw = 1_000_000 + i * DRAWS + draw  # the same noise at every width
                    for name, own in self.gradients(strategy, batch, strategy).items():
                        found[name].append(torch.cosine_similarity(own, truth[i][name], dim=0))
            self.cosines.append({name: float(torch.stack(each).mean()) for name, each in found.items()})
        strategy.set_sigmas(given)

    def gradients(
        self, estimator: ForwardGradientStrategy, batch: Any, sites: ForwardGradientStrategy
    ) -> dict[str, Tensor]:
        self.task.zero_grad()
        estimator.estimate(estimator.clean_pass(*batch))
        found = {}
        for site in sites.sites:
            parts = [p.grad.flatten() for p in site.parameters.values() if p.grad is not None]
            found[site.name] = torch.cat(parts).double()
        return found


def report(sigma: Sequence[Mapping[str, str]], rate: Sequence[Mapping[str, str]]) -> str:
    """Markdown: widths by site, then rates by seed."""
    lines = []
    for site in dict.fromkeys(row["site"] for row in sigma):
        for seed in dict.fromkeys(row["seed"] for row in sigma):
            own = [row for row in sigma if row["site"] == site and row["seed"] == seed]
            best = max(float(row["cosine"]) for row in own)
            cells = {row["kind"]: row for row in own if row["kind"] != TRIED}
            shares = [f"{float(cells[kind]['cosine']) / best:.3f}" for kind in (OWN, FOUND)]
            widths = [f"{float(cells[kind]['sigma']):.2g}" for kind in (OWN, FOUND)]
            lines.append([site, seed, widths[0], shares[0], widths[1], shares[1], f"{best:.3f}"])
    columns = ["site", "seed", "sigma before", "share of the best cosine", "sigma found", "share of the best cosine",
               "best cosine"]  # fmt: skip
    widths_table, lines = markdown(columns, lines), []
    for seed in dict.fromkeys(row["seed"] for row in rate):
        runs: dict[tuple[str, float], list[float]] = {}
        for row in rate:
            if row["seed"] == seed:
                runs.setdefault((row["kind"], float(row["rate"])), []).append(float(row["loss"]))
        top = min((key for key in runs if key[0] == TRIED), key=lambda key: statistics.fmean(runs[key]))
        chosen, before = (next(key for key in runs if key[0] == kind) for kind in (FOUND, OWN))
        seconds = max(float(row["seconds"]) for row in rate if row["seed"] == seed)
        lines.append([seed, f"{chosen[1]:.2g}", _mean(runs[chosen]), f"{top[1]:.2g}", _mean(runs[top]),
                      _ratio(runs[chosen], runs[top]), _mean(runs[before]), f"{seconds:.0f}"])  # fmt: skip
    columns = ["seed", "rate found", "final loss", "best of 8", "its final loss", "ratio", "as configured",
               "seconds of the search"]  # fmt: skip
    return f"{widths_table}\n{markdown(columns, lines)}"


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4g}"


def _ratio(found: Sequence[float], best: Sequence[float]) -> str:
    """Of the means, with the standard error of the difference over pairs."""
    mean = statistics.fmean(best)
    if len(best) < 2:
        return f"{found[0] / mean:.2f}"
    error = statistics.stdev(a - b for a, b in zip(found, best, strict=True)) / math.sqrt(len(best))
    return f"{statistics.fmean(found) / mean:.2f} ± {error / mean:.2f}"


def study(options: argparse.Namespace) -> None:
    arguments = [*configs(options.config or [CONFIG]), *options.extra]
    torch.set_num_threads(options.threads)
    claim(
        options.output,
        {"arguments": arguments} | {n: getattr(options, n) for n in ("steps", "tuning_steps", "repeats")},
    )
    files: list[Path] = [options.output / "sigma.csv", options.output / "rate.csv"]
    done = {int(row["seed"]) for row in read_csv(files[1])}
    for seed in (each for each in range(options.seeds) if each not in done):
        one = Seed(arguments, seed, options)
        for file, columns, rows in zip(files, (SIGMA, RATE), (one.sigma_rows(), one.rate_rows()), strict=True):
            write_csv(file, columns, rows, append=True)
        print(f"seed {seed} is done", flush=True)
    write_report(options.output / "tune.md", report(*map(read_csv, files)))


def main(args: Sequence[str] | None = None) -> None:
    parser = StudyParser(
        __doc__, runs=False, seeds=(3, "seeds 0 to N-1"), steps=(60, "steps of the runs that are compared"),
        tuning_steps=(40, "steps of the longer runs of tune"), repeats=(4, "runs of every rate that is compared"),
        threads=(1, "threads"),
    )  # fmt: skip
    parser.add_argument("--config", action="append", help=f"configuration file; may be repeated (default {CONFIG})")
    parser.run(study, args)


if __name__ == "__main__":
    main()
