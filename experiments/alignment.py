"""``python -m experiments.alignment TABLE --llm DIR --encoder FILE --root DIR --output DIR``: a frozen LLM that sees.

A linear adapter between the small ViT and ``stories260k`` (section 5.3 in small), four vectors a photo:

- ``rates``: learning rates, on photos that no other table measures.
- ``sees``: 3,000 photos of CIFAR-10 with captions "a ship ."; every method from the mean embedding, 200 steps of 32.
- ``longer``: the same in twice the steps.
- ``prompt``: ``sees`` from a prompt that was learned without photos, by backprop.
- ``costs``: CPU seconds and memory of a step (Fig. 5): of tensors alone, and at chunks of 32 rows as backprop's.
- ``photos``: captioned photos (``--captions FILE``), 240 to learn from; whether the right photo helps.

``loss``, ``accuracy`` (likeliest caption) and ``shuffled`` (the loss with another photo) are of 600 held-out photos.
Each seed draws batches and noise. A result is a line of ``TABLE.jsonl``; those that are there are not made again.
Prints the table.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from experiments.alignment_problem import BATCH, Problem
from experiments.rows import resumed
from experiments.tables import markdown, mean_and_half, mean_interval
from flops_lightning.network.memory import peak_bytes

Found = tuple[dict[str, float], list[float]]
STEPS, PHOTO_STEPS = 200, 60
RATES = (0.01, 10.0)
"""Learning rate and its factor for the bias: the best of ``rates``, for backprop as for likelihood ratios."""
FROM_PROMPT = (0.02, 1.0)
"""The same where the bias has been learned."""


def trained(
    problem: Problem, adapter: Any, name: str, *, rates: tuple[float, float], steps: int, part: str = "test"
) -> Found:
    """Train by a method (``bp``, ``lr 60``, ``ops 60``, ``prompt``); what was measured, and the loss of each photo."""
    method, _, queries = name.partition(" ")
    ratios: list[dict[str, float]] = []
    if method in ("bp", "prompt"):
        step = problem.backprop_step(adapter)
    else:
        step = problem.query_step(adapter, int(queries), allocated=method == "ops", ratios=ratios)
    lr, bias = rates
    seconds = problem.train(adapter, step, steps=steps, lr=lr, bias=bias, images=method != "prompt")
    found = problem.held_out(adapter, problem.part(part))
    of_photos = {name: float(values.mean()) for name, values in found.items()}
    difference = (found["shuffled"] - found["loss"]).tolist()
    mean, low, _ = mean_interval(difference)
    result = {"loss": of_photos["loss"]}
    result |= {"accuracy": of_photos["right"]} if "right" in of_photos else {}
    result |= {"shuffled": of_photos["shuffled"], "shuffled - loss": mean, "its half interval": mean - low}
    result["seconds of a step"] = seconds
    result |= {name: statistics.fmean(each[name] for each in ratios) for name in (ratios or [{}])[0]}
    return result, [round(value, 5) for value in found["loss"].tolist()]


def rates(problem: Problem, name: str) -> Found:
    method, lr, bias = name.split(", ")
    return trained(problem, problem.adapter(), method, rates=(float(lr), float(bias)), steps=STEPS, part="val")


def sees(problem: Problem, name: str) -> Found:
    return trained(problem, problem.adapter(), name, rates=RATES, steps=STEPS)


def longer(problem: Problem, name: str) -> Found:
    return trained(problem, problem.adapter(), name, rates=RATES, steps=2 * STEPS)


def prompt(problem: Problem, name: str) -> Found:
    adapter = problem.adapter()
    first = trained(problem, adapter, "prompt", rates=RATES, steps=STEPS)
    if name == "prompt":
        return first
    return trained(problem, adapter, name, rates=FROM_PROMPT, steps=STEPS)


def costs(problem: Problem, name: str) -> Found:
    """The least of five steps, in units of a forward pass of the batch too; the most that its tensors take at once."""
    adapter, train = problem.adapter(), problem.part("train")
    batch = train.at(torch.arange(0, len(train.features), len(train.features) // BATCH)[:BATCH])
    method, _, queries = name.partition(" ")

    @torch.no_grad()
    def inference(features: Any, captions: Any) -> None:
        problem.loss(adapter(features), captions)

    step = {"inference": inference, "bp": problem.backprop_step(adapter)}.get(method)
    if step is None:
        step = problem.query_step(adapter, int(queries), allocated=method == "ops", rows=BATCH)
    seconds = {run: min(seconds_of(run, *batch) for _ in range(5)) for run in (inference, step)}
    adapter.zero_grad()
    peak = peak_bytes(torch.enable_grad()(lambda: step(*batch))) / 2**20
    ratio = seconds[step] / seconds[inference]
    return {"seconds of a step": seconds[step], "over inference": ratio, "MiB": peak}, []


def seconds_of(run: Callable[..., object], *args: Any) -> float:
    """Processor time of a call."""
    start = time.process_time()
    run(*args)
    return time.process_time() - start


def photos(problem: Problem, name: str) -> Found:
    return trained(problem, problem.adapter(), name, rates=RATES, steps=PHOTO_STEPS, part="val")


TABLES: dict[str, tuple[Callable[[Problem, str], Found], tuple[str, ...]]] = {
    "rates": (
        rates, (
            *(f"bp, {lr}, {bias}" for bias in (3, 10) for lr in (0.01, 0.02)),
            *(f"lr 20, {lr}, {bias}" for lr, bias in ((0.02, 3), (0.01, 10), (0.02, 10))),
        ),
    ),
    "sees": (sees, ("prompt", "bp", "lr 60", "ops 60", "lr 20", "ops 20", "lr 2", "lr 1")),
    "longer": (longer, ("prompt", "bp", "lr 60", "ops 60")),
    "prompt": (prompt, ("prompt", "bp", "lr 60", "ops 60")),
    "costs": (costs, ("inference", "bp", "lr 1", "lr 2", "lr 20", "lr 60", "ops 60")),
    "photos": (photos, ("prompt", "bp", "lr 20")),
}  # fmt: skip


def report(lines: Sequence[dict[str, Any]]) -> str:
    """Means over the seeds with their 95 % intervals; accuracy as a share of backprop's, seed by seed.

    The loss less that of the prompt without photos has its interval over the photos, seeds averaged first.
    """
    rows, columns = dict[str, dict[int, dict[str, Any]]](), list[str]()
    for line in lines:
        rows.setdefault(line["name"], {})[line["seed"]] = line
        columns += [name for name in line["found"] if name not in columns]

    def paired(seeds: dict[int, dict[str, Any]], beside: dict[int, dict[str, Any]]) -> list[float]:
        both = [seed for seed in seeds if seed in beside]
        pairs = [zip(seeds[seed]["losses"], beside[seed]["losses"], strict=True) for seed in both]
        return [statistics.fmean(a - b for a, b in photo) for photo in zip(*pairs, strict=True)]

    cells = []
    for name, seeds in rows.items():
        own = [
            mean_and_half([s["found"][column] for s in seeds.values() if column in s["found"]]) for column in columns
        ]
        exact = {seed: line["found"] for seed, line in rows.get("bp", {}).items()}
        shares = [
            line["found"]["accuracy"] / exact[seed]["accuracy"]
            for seed, line in seeds.items()
            if seed in exact and "accuracy" in line["found"]
        ]
        cells.append(
            [name, str(len(seeds)), *own, mean_and_half(shares), mean_and_half(paired(seeds, rows.get("prompt", {})))]
        )
    return markdown(["", "seeds", *columns, "accuracy of bp's", "loss - that of the prompt"], cells)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.alignment", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--llm", required=True, help="folder of stories260k")
    parser.add_argument("--encoder", required=True, help="weights of the small ViT")
    parser.add_argument("--root", required=True, help="class folders of CIFAR-10, or the folder of captioned photos")
    parser.add_argument("--captions", help="JSON of LLaVA's form, for the table of photos")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--names", nargs="+", help="rows to make; all of the table by default")
    options = parser.parse_args(args)
    make, names = TABLES[options.table]
    if (options.captions is None) is (options.table == "photos"):
        parser.error("--captions is for the table of photos, which needs it")
    features = options.output / ("features" if options.captions is None else "photo_features")
    problem = Problem(options.llm, options.encoder, options.root, features, captions=options.captions)

    def row(name: str, seed: int) -> dict[str, Any]:
        problem.seed = seed
        found, losses = make(problem, name)
        return {"found": found, "losses": losses}

    print(report(resumed(options.output / f"{options.table}.jsonl", options.names or names, options.seeds, row)))


if __name__ == "__main__":
    main()
