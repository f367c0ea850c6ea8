"""``python -m benchmarks.allocation``: what choosing the counts costs beside the step they are for.

The clean pass of a batch through a ViT-Base is the least that any step at that size pays (with 20 queries at each of
three groups and the head a step is more than 20 times that), so each share of it is an upper bound of the share of the
step. Statistics are random with the shapes of that batch; the time of the searches hardly depends on their values.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from flops_lightning.allocators import (
    BernoulliAllocator,
    CostAwareAllocator,
    EqualAllocator,
    GaussianAllocator,
    OptimalAllocator,
    QueryAllocator,
    QueryBudget,
    SampleStatistics,
    TraceObservation,
    TraceSettings,
)

SITES, QUERIES, FEATURES = 4, 20, 768
PREDICTORS = ("activation.1", "activation.2", "activation.3", "head_gradient", "output_gradient", "top_gradient")
ROUNDS = 30
PREDICTED = TraceSettings(source="prediction")
ALLOCATORS: dict[str, Callable[[], QueryAllocator]] = {
    "equal": EqualAllocator,
    "bernoulli": lambda: BernoulliAllocator(traces=PREDICTED),
    "gaussian, pathwise": lambda: GaussianAllocator(traces=PREDICTED),
    "gaussian, score": lambda: GaussianAllocator(traces=PREDICTED, gradient="score"),
    "gaussian, exact": lambda: GaussianAllocator(traces=PREDICTED, gradient="exact"),
    "optimal": lambda: OptimalAllocator(traces=PREDICTED),
    "cost-aware": lambda: CostAwareAllocator(traces=PREDICTED),
}


def batch_statistics(batch: int, seed: int, device: torch.device) -> tuple[SampleStatistics, TraceObservation]:
    """Statistics of a batch, and what its queries might have shown."""
    generator = torch.Generator().manual_seed(seed)
    loss = torch.rand(batch, generator=generator) * 3
    log_trace = 2 * loss + torch.randn(batch, generator=generator)
    scatter = torch.rand(SITES, batch, generator=generator) + 0.5
    predictors = {name: (log_trace + torch.randn(batch, generator=generator)).exp() for name in PREDICTORS}
    statistics_ = SampleStatistics(
        loss=loss.to(device),
        embedding=torch.randn(batch, FEATURES, generator=generator).to(device),
        predictors={name: value.to(device) for name, value in predictors.items()},
        counted_costs=torch.tensor([0.67, 0.33, 0.001, 0.0], device=device),
        scale=torch.ones(SITES, device=device),
    )
    seen = (log_trace.exp() * scatter).to(device)
    return statistics_, TraceObservation(seen, torch.full_like(seen, QUERIES))


def allocation_seconds(make: Callable[[], QueryAllocator], batch: int, device: torch.device) -> list[float]:
    """Seconds of each of a series of allocations, learning included, once the window of batches is full."""
    allocator, budget, seconds = make(), QueryBudget((QUERIES,) * SITES), []
    for i in range(ROUNDS + 10):
        told, seen = batch_statistics(batch, i, device)
        start = time.perf_counter()
        allocator.allocate(told, budget)
        if allocator.learns:
            allocator.observe(seen)
        seconds.append(time.perf_counter() - start)
    return seconds[10:]


@torch.no_grad()
def clean_pass_seconds(batch: int, device: torch.device) -> float:
    """Seconds of a ViT-Base/16 forward pass of the batch at 224 pixels, the faster of two."""
    import timm

    network = timm.create_model("vit_base_patch16_224").to(device).eval()
    images = torch.randn(batch, 3, 224, 224, device=device)
    times = []
    for _ in range(2):
        start = time.perf_counter()
        for part in images.split(16):
            network(part)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.allocation",
        description="Time of an allocation beside a clean pass through ViT-Base/16 at 224 pixels.",
    )
    parser.add_argument("--batch", type=int, default=128, help="samples in a batch (default 128)")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda")
    options = parser.parse_args(argv)
    whole = clean_pass_seconds(options.batch, options.device)
    print(f"clean pass of {options.batch} images through ViT-Base/16 at 224 pixels: {whole:.2f} s\n")
    print("| allocator | ms a batch, median (quartiles) | share of the clean pass |\n|---|---|---|")
    for name, make in ALLOCATORS.items():
        low, median, high = statistics.quantiles(allocation_seconds(make, options.batch, options.device), n=4)
        print(f"| {name} | {1e3 * median:.1f} ({1e3 * low:.1f} - {1e3 * high:.1f}) | {median / whole:.3%} |")


if __name__ == "__main__":
    main()
