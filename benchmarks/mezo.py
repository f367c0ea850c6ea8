"""``python -m benchmarks.mezo``: a step of MeZO beside the two forward passes that it is made of.

Both sides meet the same batch in the same process, one after the other, a few rounds over; the step includes drawing
the directions, moving the weights, and drawing them again for the gradient. The optimiser's own step is left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.cases import DIGITS, VIT_MICRO, VIT_TINY, Case
from benchmarks.measurement import row_cross_entropy
from benchmarks.timing import Ratio, alternate, waiting_for
from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import MeZO

PASSES, STEP = "two forward passes", "step"


def overhead(case: Case, batch: int, *, rounds: int) -> Ratio:
    """Time of a step over that of two forward passes, at equal chunks of rows."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    network = stage_network(case.build().to(device).eval())
    inputs = torch.randn(batch, *case.image, device=device)
    targets = torch.randint(case.classes, (batch,), device=device)
    strategy = MeZO(chunk_rows=case.chunk_rows, seed=0)
    strategy.bind(network, row_cross_entropy)

    @torch.no_grad()
    def passes() -> None:
        for _ in range(2):
            for rows in inputs.split(case.chunk_rows):
                row_cross_entropy(network.module(rows), targets[: len(rows)])

    def step() -> None:
        network.module.zero_grad()
        strategy.estimate(strategy.clean_pass(inputs, targets))

    times = alternate({PASSES: passes, STEP: step}, rounds=rounds, synchronize=waiting_for(device))
    return times.speed_ratio(STEP, PASSES)


def main(args: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mezo", description=summary)
    parser.add_argument("--batch", type=int, default=64, help="samples in a batch (default 64)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--chunk-rows", type=int, default=64, help="rows of a forward pass, both sides (default 64)")
    options = parser.parse_args(args)
    print("| network | step over two forward passes, median (quartiles) |\n|---|---|")
    for case in (DIGITS, VIT_MICRO, VIT_TINY):
        ratio = overhead(replace(case, chunk_rows=options.chunk_rows), options.batch, rounds=options.rounds)
        print(f"| {case.model} | {ratio.median:.3f} ({ratio.low:.3f} - {ratio.high:.3f}) |", flush=True)


if __name__ == "__main__":
    main()
