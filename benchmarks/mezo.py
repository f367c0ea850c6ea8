"""``python -m benchmarks.mezo``: a step of MeZO beside the two forward passes that it is made of.

The step draws the directions, moves the weights, and draws the directions again for the gradient; no optimiser.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from benchmarks.cases import DIGITS, VIT_MICRO, VIT_TINY, Case
from benchmarks.harness import Spread, alternate, command, finish, synchronizer, table
from benchmarks.speed import infer, set_up, step
from flops_lightning.objectives import cross_entropy
from flops_lightning.strategies import MeZO


def overhead(case: Case, *, rounds: int, device: torch.device) -> Spread:
    """Time of a step over that of two forward passes, at equal chunks of rows."""
    setup, strategy = set_up(case, device), MeZO(chunk_rows=case.chunk_rows, seed=0)
    strategy.bind(setup.network, cross_entropy)
    passes = partial(infer, setup.network, [(0, setup.inputs.split(case.chunk_rows))] * 2)
    contenders = {"passes": passes, "step": partial(step, setup, strategy)}
    return alternate(contenders, rounds=rounds, synchronize=synchronizer(device)).ratio("step", "passes")


def main(argv: Sequence[str] | None = None) -> None:
    options = command("benchmarks.mezo", __doc__, device=True, rounds=5, batch=64, chunk_rows=64).parse_args(argv)
    size = {"batch": options.batch, "chunk_rows": options.chunk_rows}
    records = []
    for case in (DIGITS, VIT_MICRO, VIT_TINY):
        ratio = overhead(replace(case, **size), rounds=options.rounds, device=options.device)
        records.append({"model": case.model, **size, "step_over_passes": ratio})
    column = "step over two forward passes, median (quartiles)"
    print(table({"network": "{model}", column: "{step_over_passes:.3f}"}, records))
    finish(options, records)


if __name__ == "__main__":
    main()
