"""``python -m experiments.budget_rule --config FILE --output DIR``: whether the budget's rule finds the best budget.

A run chooses its budgets by ``rule: improvement`` with equal counts. At some of its steps the weights, and what the
rule thinks there, are kept. Afterwards, from the same weights:

- ``T`` of each site and ``S`` from autograd's gradients of many batches and the difference of estimates to them, and
  the averages ``A*`` that follow (``exact``), beside those of the rule;
- the decrease of the loss on training images by one step along each batch's estimate, for many batches and step sizes:
  the largest mean decrease over the step sizes, for its cost, at the rule's averages and at equal ones from 1 to 64,
  relative to the best of these. The interval is a bootstrap over the batches;
- the curvature of the loss along the noise of the estimates over that along the gradients. The rule's bound takes it to
  be the same in all directions; with the setting ``noise_curvature`` at what is measured, the rule asks for fewer
  queries, and their decrease for the cost is measured as well;
- the batch size at which a step costs twice the least number of samples, ``(V + T / A) / |g|^2`` at the rule's ``A``.

Writes ``budget_rule.md`` and ``budget_rule.csv``.
"""

import argparse
import copy
import math
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor

from experiments.command_line import StudyParser, configs
from experiments.tables import markdown, write_csv, write_report
from flops_lightning.allocators import EqualAllocator
from flops_lightning.allocators.budget import BudgetRule, best_averages
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.protocol import QueryBudget
from flops_lightning.queries import CleanPass
from flops_lightning.strategies.query_strategy import QueryStrategy

CURVED = "curved"  # the rule's averages with noise_curvature as measured
GRID = (1, 2, 4, 8, 16, 32, 64)
STEP_SIZES = 10  # of a geometric grid with the factor 2
STEP = 0.01  # of a second difference, relative to the norm of the parameters
SEEN = 600  # training images on which a decrease is measured
RESAMPLES = 2000


class Keeping(pl.Callback):
    """Keeps the weights, the strategy's state and the rule at some steps."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.steps, self.kept = steps, dict[int, dict[str, Any]]()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: object) -> None:
        if trainer.global_step in self.steps:
            rule = next(c for c in trainer.callbacks if isinstance(c, QueryAllocatorCallback))._rule
            parts = {"weights": pl_module.state_dict(), "strategy": pl_module.strategy.state_dict(), "rule": rule}
            self.kept[trainer.global_step] = copy.deepcopy(parts)


class Network:
    """The task of a configuration, for estimates and exact gradients of batches."""

    def __init__(self, task: Any, data: Any) -> None:
        self.task, self.data = task, data
        self.strategy: QueryStrategy[Any] = task.strategy
        self.sites = (*self.strategy.sites, *self.strategy.exact_sites)

    def load(self, kept: dict[str, Any]) -> None:
        self.task.load_state_dict(kept["weights"])
        self.strategy.load_state_dict(kept["strategy"])

    def images(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = zip(*(self.data.train_set[int(i)] for i in indices), strict=True)
        return torch.stack(images), torch.as_tensor(labels)

    def gradient(self) -> dict[str, Tensor]:
        """``.grad`` by site, flat."""
        found = {site.name: torch.cat([p.grad.flatten() for p in site.parameters.values()]) for site in self.sites}
        self.task.zero_grad()
        return found

    def exact(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        with self.task.network.evaluating(), torch.enable_grad():
            self.task.loss(self.task(batch[0]), batch[1]).mean().backward()
        return self.gradient()

    def estimate(self, clean: CleanPass, averages: Sequence[float], allocator: EqualAllocator) -> dict[str, Tensor]:
        own = self.strategy.budget
        budget = QueryBudget(tuple(float(n) for n in averages), own.multiple, own.minimum)
        allocation = allocator.allocate(self.strategy.sample_statistics(clean), budget)
        self.strategy.estimate(clean, allocation.counts, inclusion=allocation.inclusion)
        return self.gradient()

    def curvature(self, direction: dict[str, Tensor], length: float, seen: tuple[Tensor, Tensor]) -> Tensor:
        """Second derivative of that loss along a direction, over its squared norm, by a difference over ``length``."""
        size = length / torch.stack([d.square().sum() for d in direction.values()]).sum().sqrt()
        both = self.decreases(direction, torch.stack([size, -size]), seen)
        return -both.sum() / length**2

    @torch.no_grad()
    def decreases(self, direction: dict[str, Tensor], sizes: Tensor, seen: tuple[Tensor, Tensor]) -> Tensor:
        """Decrease of the mean loss of the ``seen`` images by a step of each size down a direction."""
        parts = {site.name: list(site.parameters.values()) for site in self.sites}
        start = {name: [p.clone() for p in ps] for name, ps in parts.items()}
        losses = []
        for size in (torch.zeros(()), *sizes):
            for name, ps in parts.items():
                pieces = direction[name].split([p.numel() for p in ps])
                for p, p0, d in zip(ps, start[name], pieces, strict=True):
                    p.copy_(p0 - size * d.view_as(p))
            with self.task.network.evaluating():
                losses.append(self.task.loss(self.task(seen[0]), seen[1]).double().mean())
        for name, ps in parts.items():
            for p, p0 in zip(ps, start[name], strict=True):
                p.copy_(p0)
        return (losses[0] - torch.stack(losses[1:])).nan_to_num(nan=-1e9, neginf=-1e9)


def measured(
    network: Network, rule: BudgetRule, options: argparse.Namespace, generator: torch.Generator
) -> dict[str, Any]:
    """What is true at the weights of the moment, and what the rule says."""
    strategy, number = network.strategy, len(network.data.train_set)
    order = torch.randperm(number, generator=generator)
    seen = network.images(order[:SEEN])
    allocator, probe = EqualAllocator(), 8
    norm = float(torch.stack([p.square().sum() for p in network.task.parameters()]).sum().sqrt().detach())
    signals, noises, cleans, curvatures, total_gradient = [], [], [], [], torch.zeros(())
    for _ in range(options.batches):
        chosen = torch.randperm(number, generator=generator)[: network.data.batch_size]
        batch = network.images(chosen)
        exact, clean = network.exact(batch), strategy.clean_pass(*batch)
        cleans.append(clean)
        found = network.estimate(clean, [probe] * len(strategy.sites), allocator)
        whole = torch.cat(list(exact.values()))
        signals.append(whole.square().sum())
        total_gradient = total_gradient + whole
        own_noise = {name: found[name] - exact[name] for name in exact}
        noises.append(torch.stack([own_noise[s.name].square().sum() for s in strategy.sites]))
        of_both = [network.curvature(direction, STEP * norm, seen) for direction in (own_noise, exact)]
        curvatures.append(torch.stack(of_both))
    statistics = strategy.sample_statistics(clean, {"counted_costs", "fixed_costs"})
    assert statistics.counted_costs is not None
    assert statistics.fixed_costs is not None
    costs, fixed = statistics.counted_costs.double(), float(statistics.fixed_costs.sum())
    size = network.data.batch_size
    signal = float(torch.stack(signals).mean())
    noise = torch.stack(noises).mean(0).double() * probe
    best = best_averages(noise, signal, costs, fixed)
    total = float((noise.sum() * fixed / (costs.sum() * signal)).sqrt())
    # Products of different batches' gradients: |g|^2 without bias. V = S - B |g|^2, with S = B |G|^2.
    number_of = len(signals)
    squared = float((total_gradient.square().sum() - torch.stack(signals).sum()) / (number_of * (number_of - 1)))
    own = rule.choose(strategy.budget, statistics).queries_per_sample
    of_queries = float((noise / torch.tensor(own)).sum())
    critical = size * (signal - squared + of_queries) / squared if squared > 0 else math.inf
    own_total = float((rule._noise.sum() * fixed / (costs.sum() * rule._signal)).sqrt())
    # One step from here.
    of_noise, of_gradient = torch.stack(curvatures).mean(0)
    curvature = float(of_noise / of_gradient)
    arms: dict[str, list[float]] = {"rule": list(own), **{str(n): [n] * len(strategy.sites) for n in GRID}}
    arms[CURVED] = [max(rule.settings.least, n * max(curvature, 0.0) ** 0.5) for n in own]
    largest = 0.3 * norm / float((signal + noise.sum() / 8) ** 0.5)
    sizes = largest * 0.5 ** torch.arange(STEP_SIZES)
    tables = {}
    for name, averages in arms.items():
        rows = [network.decreases(network.estimate(clean, averages, allocator), sizes, seen) for clean in cleans]
        cost = fixed + float((costs * torch.tensor(averages).double()).sum())
        tables[name] = torch.stack(rows).numpy() / cost
    ratio = relative(tables, "rule", np.random.default_rng(0))
    curved = {f"{CURVED}_{name}": value for name, value in relative(tables, CURVED, np.random.default_rng(0)).items()}
    return {
        "exact": best.tolist(), "rule": list(own), "exact_total": total, "rule_total": own_total, **ratio, **curved,
        "T_over_S": float(noise.sum()) / signal, "batch": critical,
        "curvature": curvature,
    }  # fmt: skip


def relative(tables: dict[str, np.ndarray], arm: str, generator: np.random.Generator) -> dict[str, Any]:
    """Decrease for its cost at an arm's averages over the best of the grid, with a 90 % bootstrap interval."""
    batches, grid = len(tables[arm]), [name for name in tables if name.isdigit()]

    def value(chosen: np.ndarray) -> tuple[float, dict[str, float]]:
        best = {name: float(rows[chosen].mean(axis=0).max()) for name, rows in tables.items()}
        return best[arm] / max(best[name] for name in grid), best

    ratio, best = value(np.arange(batches))
    drawn = [value(generator.integers(0, batches, batches))[0] for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [0.05, 0.95])
    at = max(grid, key=best.__getitem__)
    return {"ratio": ratio, "low": float(low), "high": float(high), "best": at}


def study(options: argparse.Namespace) -> None:
    from flops_lightning.cli.command import build

    given = [*configs(options.config), *options.extra]
    cli = build(given)
    run, data = cli.model, cli.datamodule
    budget: Any = {"rule": "improvement", "price": "compute", "least": 0.25}
    keeping = Keeping(options.steps)
    callback = QueryAllocatorCallback(allocator=EqualAllocator(), budget=budget)
    pl.Trainer(
        accelerator="cpu", max_steps=max(options.steps), callbacks=[callback, keeping], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    ).fit(run, data)  # fmt: skip
    network = Network(run, data)
    generator = torch.Generator().manual_seed(0)
    rows = []
    for step, kept in keeping.kept.items():
        network.load(kept)
        rows.append({"step": step, **measured(network, kept["rule"], options, generator)})
        print(rows[-1], flush=True)
    names = [site.name for site in network.strategy.sites]
    options.output.mkdir(parents=True, exist_ok=True)
    columns = list(rows[0])
    write_csv(options.output / "budget_rule.csv", columns, [[row[c] for c in columns] for row in rows])
    table = [
        [
            str(row["step"]), f"{row['T_over_S']:.0f}", f"{row['exact_total']:.1f}", f"{row['rule_total']:.1f}",
            f"{row['rule_total'] / row['exact_total']:.2f}",
            *(f"{a:.1f} / {b:.1f}" for a, b in zip(row["rule"], row["exact"], strict=True)),
            *(f"{row[f'{k}ratio']:.2f} ({row[f'{k}low']:.2f} - {row[f'{k}high']:.2f})" for k in ("", f"{CURVED}_")),
            row["best"], f"{row['curvature']:.2f}", f"{row['batch']:.0f}",
        ]
        for row in rows
    ]  # fmt: skip
    heads = ["step", "T / S", "A* exact", "A* by the rule", "ratio", *(f"{name}: rule / exact" for name in names),
             "decrease for its cost, rule / best of the grid", "with the curvature measured", "best of the grid",
             "curvature, noise / gradient", "(V + T / A) / |g|^2"]  # fmt: skip
    write_report(options.output / "budget_rule.md", markdown(heads, table))


def main(args: Sequence[str] | None = None) -> None:
    parser = StudyParser(__doc__, runs=False, batches=(48, "batches of every measurement"))
    parser.add_argument("--config", nargs="+", required=True)
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 60, 120, 180, 235])
    parser.run(study, args)


if __name__ == "__main__":
    main()
