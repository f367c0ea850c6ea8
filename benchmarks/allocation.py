"""``python -m benchmarks.allocation``: time of an allocation beside a clean pass through ViT-Base/16 at 224 pixels.

The clean pass of a batch is the least that any step at that size pays (with 20 queries at each of three groups and the
head a step takes more than 20 times that), so each share of it is an upper bound of the share of the step. Statistics
are random with the shapes of that batch; the time of the searches hardly depends on their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch

import flops_lightning as fl
from benchmarks.cases import VIT_BASE
from benchmarks.harness import Spread, alternate, command, finish, synchronizer, table
from flops_lightning.allocators import QueryBudget, TraceSettings

SITES, QUERIES, FEATURES = 4, 20, 768
PREDICTORS = ("activation.1", "activation.2", "activation.3", "head_gradient", "output_gradient", "top_gradient")
WINDOW, ROUNDS = 9, 30
"""Rounds until the allocators' windows of batches are full, and timed rounds after them."""
PREDICTED = TraceSettings(source="prediction")
ALLOCATORS: Mapping[str, Callable[[], fl.QueryAllocator]] = {
    "equal": fl.EqualAllocator,
    "bernoulli": partial(fl.BernoulliAllocator, traces=PREDICTED),
    "gaussian, pathwise": partial(fl.GaussianAllocator, traces=PREDICTED),
    "gaussian, score": partial(fl.GaussianAllocator, traces=PREDICTED, gradient="score"),
    "gaussian, exact": partial(fl.GaussianAllocator, traces=PREDICTED, gradient="exact"),
    "optimal": partial(fl.OptimalAllocator, traces=PREDICTED),
    "cost-aware": partial(fl.CostAwareAllocator, traces=PREDICTED),
}


def batch_statistics(batch: int, seed: int, device: torch.device) -> tuple[fl.SampleStatistics, fl.TraceObservation]:
    """Statistics of a batch, and what its queries might have shown."""
    generator = torch.Generator().manual_seed(seed)
    loss = torch.rand(batch, generator=generator) * 3
    log_trace = 2 * loss + torch.randn(batch, generator=generator)
    scatter = torch.rand(SITES, batch, generator=generator) + 0.5
    predictors = {name: (log_trace + torch.randn(batch, generator=generator)).exp() for name in PREDICTORS}
    known = fl.SampleStatistics(
        loss=loss.to(device),
        embedding=torch.randn(batch, FEATURES, generator=generator).to(device),
        predictors={name: value.to(device) for name, value in predictors.items()},
        counted_costs=torch.tensor([0.67, 0.33, 0.001, 0.0], device=device),
        scale=torch.ones(SITES, device=device),
    )
    traces = (log_trace.exp() * scatter).to(device)
    return known, fl.TraceObservation(traces, torch.full_like(traces, QUERIES))


def allocations(allocator: fl.QueryAllocator, batch: int, device: torch.device) -> Callable[[], object]:
    """One allocation after the other, learning included, each for a batch of its own."""
    batches: Iterator[tuple[fl.SampleStatistics, fl.TraceObservation]] = iter(
        [batch_statistics(batch, seed, device) for seed in range(1 + WINDOW + ROUNDS)]
    )

    def run() -> None:
        known, seen = next(batches)
        allocator.allocate(known, QueryBudget((QUERIES,) * SITES))
        if allocator.learns:
            allocator.observe(seen)

    return run


@torch.no_grad()
def clean_pass_seconds(batch: int, device: torch.device) -> float:
    """Seconds of a ViT-Base/16 forward pass of the batch at 224 pixels."""
    network, images, _ = VIT_BASE.load(device, batch)
    contenders = {"clean": lambda: [network.module(part) for part in images.split(16)]}
    return alternate(contenders, rounds=1, synchronize=synchronizer(device)).seconds["clean"][0]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    options = command("benchmarks.allocation", __doc__, device=True, batch=128).parse_args(argv)
    batch, device = options.batch, options.device
    whole = clean_pass_seconds(batch, device)
    contenders = {name: allocations(make(), batch, device) for name, make in ALLOCATORS.items()}
    seconds = alternate(contenders, rounds=WINDOW + ROUNDS, synchronize=synchronizer(device)).seconds
    times = {name: Spread.of(1e3 * each for each in seconds[name][WINDOW:]) for name in contenders}
    records = [{"allocator": name, "ms": ms, "share": ms.median / 1e3 / whole} for name, ms in times.items()]
    print(f"clean pass of {batch} images through ViT-Base/16 at 224 pixels: {whole:.2f} s\n")
    columns = {"allocator": "{allocator}", "ms a batch, median (quartiles)": "{ms:.1f}"}
    print(table(columns | {"share of the clean pass": "{share:.3%}"}, records))
    finish(options, [record | {"batch": batch, "clean_pass_seconds": whole} for record in records])


if __name__ == "__main__":
    main()
