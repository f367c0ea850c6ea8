"""``python -m experiments.prompts TABLE --clip DIR --root CIFAR10 --output DIR``: prompts for the small CLIP.

Prompts move the CLIP of :mod:`experiments.mini_clip` to grey images of CIFAR-10, with 16 to train of each class.

- ``cosines``: of estimates with the exact gradient, by pairing, with losses as they are and rounded to two decimals.
- ``allocation``: what unequal image queries gain in ``J``, from exact traces and from a prediction; text and image
  queries of a step at equal compute.
- ``training``: both prompts, by every method at equal image passes.
- ``text``: a text prompt alone, at equal text passes.

Each seed draws images, ``W``, noise and batches. A result is a line of ``TABLE.jsonl``; those that are there are not
made again. Prints the table.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.prompt_problem import (
    JointWithSharedText,
    Problem,
    backprop_step,
    descend,
    losses,
    query_step,
    rounded,
    search,
)
from experiments.rows import resumed
from experiments.tables import markdown, mean_and_half
from flops_lightning.allocators import OptimalAllocator, TraceSettings
from flops_lightning.allocators.cost_aware import cheapest_counts
from flops_lightning.allocators.objective import optimal_shares
from flops_lightning.allocators.rounding import largest_remainder
from flops_lightning.strategies import SPSA, EvolutionStrategies

PAIRINGS: dict[str, dict[str, Any]] = {
    "split, clean loss": {}, "split, leave-one-out": {"variant": "leave_one_out"},
    "crossed": {"variant": "leave_one_out", "pairing": "crossed"}, "joint": {"joint": True},
    "joint, text draws shared": {"joint": True, "kind": JointWithSharedText},
}  # fmt: skip


def cosines(make: Callable[..., Problem], name: str) -> dict[str, float]:
    """Mean over 30 estimates of 16 + 16 draws, B = 32, 100 + 100 numbers, at the start."""
    problem = make(dim=100)
    loss, pairing = name.split(": ")
    strategy = problem.strategy(queries=(16, 16), loss=rounded if loss == "rounded" else losses, **PAIRINGS[pairing])
    found: dict[str, list[float]] = {"text": [], "image": []}
    for index in problem.batches(32, 5):
        exact = {side: problem.gradients_of_samples(index, f"{side}_prompt").mean(0) for side in found}
        for _ in range(6):
            strategy.estimate(strategy.clean_pass(problem.train[index], problem.labels[index]))
            for side, values in found.items():
                z = problem.network.module.get_parameter(f"{side}_prompt.z")
                values.append(float(torch.cosine_similarity(torch.as_tensor(z.grad), exact[side], dim=0)))
                z.grad = None
    return {side: statistics.fmean(values) for side, values in found.items()}


def allocation(make: Callable[..., Problem], name: str) -> dict[str, float]:
    """B = 64, K = 10: every tenth of 60 steps by learned counts, ``J`` by the exact traces of that batch."""
    del name
    problem, found = make(), dict[str, list[float]]()
    allocator = OptimalAllocator(traces=TraceSettings(predictors=["head_gradient", "loss"]), min_queries=1)
    strategy = problem.strategy()
    step, count = query_step(problem, strategy, allocator), 0

    def watched(index: Tensor) -> None:
        nonlocal count
        count += 1
        if count % 10 == 0:
            measure(index)
        step(index)

    def measure(index: Tensor) -> None:
        of_image = problem.gradients_of_samples(index, "image_prompt").square().sum(1)
        of_text = problem.gradients_of_samples(index, "text_prompt").mean(0).square().sum()
        clean = strategy.clean_pass(problem.train[index], problem.labels[index])
        known = strategy.sample_statistics(clean, {*allocator.requests, "predictors.head_gradient"})
        counts = allocator.allocate(known, strategy.budget).counts[0]
        gains = {"exact": optimal_shares(of_image[None].double())[0], "learned": counts.double()}
        gains |= {"head_gradient alone": known.predictors["head_gradient"].double().sqrt(), "loss alone": clean.loss}
        equal = float(of_image.sum()) / 10
        for way, share in gains.items():
            whole = largest_remainder(share.double() / share.sum(), 640, minimum=1, multiple=1)
            found.setdefault(way, []).append(equal / float((of_image / whole).sum()))
        variance = 501 * torch.stack([of_image, torch.full_like(of_image, float(of_text) * len(index))]).double()
        for classes, ratio in ((100, 3.5), (1000, 35.0)):
            costs = torch.tensor([1.0, ratio / len(index)], dtype=torch.float64)
            own = torch.tensor([60.0, 60.0], dtype=torch.float64)
            best = cheapest_counts(
                variance, costs, float((costs * own).sum()) * len(index), least=1.0, most=own * 10, multiple=1,
                shared=(False, True),
            )  # fmt: skip
            found.setdefault(f"both sites, {classes} classes", []).append(
                float((variance / 60).sum() / (variance / best).sum())
            )

    descend(problem, watched, problem.batches(64, 60))
    return {way: statistics.fmean(values) for way, values in found.items()}


def training(make: Callable[..., Problem], name: str) -> dict[str, float]:
    """500 + 500 numbers, B = 32, K = M = 10, Adam at 0.2, 150 steps; CMA-ES: 55 generations of the same images."""
    problem = make()
    if name == "manual":
        return problem.manual()
    batches = problem.batches(32, 150)
    if name == "cma_es":  # 30 x 32 images a generation: as many image passes
        search(problem, batches[:55])
    elif name != "start":
        kind = SPSA if name == "spsa" else EvolutionStrategies
        directions = "shared" if name == "all_shared" else "own"
        allocator = OptimalAllocator() if name == "ops_lr" else None
        strategy = problem.strategy(kind, directions=directions)
        backprop = name == "bp"
        descend(problem, backprop_step(problem) if backprop else query_step(problem, strategy, allocator), batches)
    return problem.measure()


def text(make: Callable[..., Problem], name: str) -> dict[str, float]:
    """A text prompt of 500 numbers and 1,200 text passes: draws a step and images a batch, or CMA-ES."""
    problem = make(image=False)
    draws, size = (int(part) for part in name.partition(" draws, ")[::2]) if "draws" in name else (30, 160)
    batches = problem.batches(size, 1200 // draws)
    if "draws" in name:
        descend(problem, query_step(problem, problem.strategy(queries=(draws, draws))), batches)
    else:
        search(problem, batches)
    return problem.measure()


TABLES: dict[str, tuple[Callable[[Callable[..., Problem], str], dict[str, float]], tuple[str, ...]]] = {
    "cosines": (cosines, tuple(f"{loss}: {p}" for loss in ("exact", "rounded") for p in PAIRINGS)),
    "allocation": (allocation, ("ops_lr",)),
    "training": (
        training, ("manual", "start", "lr", "ops_lr", "cma_es", "bp", "spsa", "all_shared"),
    ),
    "text": (text, ("10 draws, 160", "20 draws, 160", "10 draws, 32", "cma_es")),
}  # fmt: skip


def report(lines: Sequence[dict[str, Any]]) -> str:
    """Means with their 95 % intervals, and the difference of each row to ``lr`` by seed where it is there."""
    rows, columns = dict[str, dict[int, dict[str, float]]](), list[str]()
    for line in lines:
        rows.setdefault(line["name"], {})[line["seed"]] = line["found"]
        columns += [name for name in line["found"] if name not in columns]

    beside = rows.get("lr", {})
    head = ["", "seeds", *columns, *([f"{columns[0]} less that of lr"] if beside else [])]
    cells = []
    for name, seeds in rows.items():
        differences = [found[columns[0]] - beside[seed][columns[0]] for seed, found in seeds.items() if seed in beside]
        own = [mean_and_half([found[column] for found in seeds.values()]) for column in columns]
        cells.append(
            [name, str(len(seeds)), *own, *([mean_and_half(differences) if differences else "-"] if beside else [])]
        )
    return markdown(head, cells)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.prompts", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--clip", type=Path, required=True, help="folder that experiments.mini_clip wrote")
    parser.add_argument("--root", required=True, help="folder of CIFAR-10")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    options = parser.parse_args(args)
    make, names = TABLES[options.table]

    def row(name: str, seed: int) -> dict[str, Any]:
        return {"found": make(lambda **own: Problem(options.clip, options.root, seed, **own), name)}

    print(report(resumed(options.output / f"{options.table}.jsonl", names, options.seeds, row)))


if __name__ == "__main__":
    main()
