"""``python -m benchmarks.scaling``: how the time of a step grows with what it is asked to do.

From a base point one quantity is changed at a time: samples in the batch, queries, depth and width of the network, and
groups that noise enters at. The prediction is what the library itself counts: forward-equivalents of the step times the
FLOPs of a forward pass. All steps of a sweep take turns in one process; only ratios of their times are reported.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.arguments import a_device, writable
from benchmarks.measurement import Setup, environment_of, one_step
from benchmarks.scaling_points import BASE, CHUNK_ROWS, SWEEPS, Point, set_up
from benchmarks.scaling_report import report
from benchmarks.timing import Ratio, Timings, alternate, waiting_for
from flops_lightning.network.staging import flops
from flops_lightning.strategies.costs import site_costs

STEP, INFERENCE = "step", "inference"


def step(setup: Setup) -> None:
    """Clean pass, all queries with equal counts, local VJPs, ``.grad``."""
    setup.network.module.zero_grad()
    one_step(setup.strategy, setup)


@torch.inference_mode()
def inference(setup: Setup) -> None:
    """A plain forward pass of the batch."""
    with setup.network.evaluating():
        for x in setup.inputs.split(CHUNK_ROWS):
            setup.network.run(x)


def forward_equivalents(setup: Setup) -> float:
    """What the meter counts for one sample and step, known before any step is made."""
    sites = setup.strategy.sites
    costs = site_costs(setup.network, sites, setup.inputs)
    return 1 + sum(site.queries_per_sample * costs.query[site.name] + costs.gradient[site.name] for site in sites)


@torch.inference_mode()
def forward_flops(setup: Setup) -> float:
    """FLOPs of a forward pass of one sample."""
    with setup.network.evaluating():
        return flops(setup.network.run, setup.inputs[:1])[0]


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log cost in log size over the upper half of the sizes (two at least), where fixed costs weigh least."""
    upper = slice(min(len(sizes) // 2, len(sizes) - 2), None)
    return float(np.polyfit(np.log(sizes[upper]), np.log(costs[upper]), 1)[0])


def measure(
    sweep: str, values: Sequence[int], *, base: Point = BASE, rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Time a sweep, all its points in every round, and return one record a point.

    Args:
        sweep: The field of :class:`Point` that is changed.
        values: Its values in ascending order, that of ``base`` among them.
        base: The base point.
        rounds: Timed rounds.
        device: Where to measure.
    """
    setups = {value: set_up(replace(base, **{sweep: value}), device) for value in values}
    contenders: dict[str, Callable[[], object]] = {}
    for value, setup in setups.items():
        contenders |= {f"{STEP} {value}": partial(step, setup), f"{INFERENCE} {value}": partial(inference, setup)}
    timings = alternate(contenders, rounds=rounds, synchronize=waiting_for(device))
    return records(sweep, setups, timings, base=base)


def records(sweep: str, setups: Mapping[int, Setup], timings: Timings, *, base: Point) -> list[dict[str, Any]]:
    """Records of the JSON file: medians, their quartiles, the counts, and on what they ran."""
    counted = {value: forward_equivalents(setup) for value, setup in setups.items()}
    work = {value: counted[value] * len(setup.inputs) * forward_flops(setup) for value, setup in setups.items()}
    rounds = list(zip(*(timings.seconds[f"{STEP} {value}"] for value in setups), strict=True))
    low, slope, high = np.quantile([exponent(list(setups), seconds) for seconds in rounds], (0.25, 0.5, 0.75))
    start = getattr(base, sweep)
    found = []
    for value, setup in setups.items():
        predicted = work[value] / work[start]
        ratios = {
            "step_over_base": timings.speed_ratio(f"{STEP} {value}", f"{STEP} {start}"),
            "step_over_inference": timings.speed_ratio(f"{STEP} {value}", f"{INFERENCE} {value}"),
            "exponent": Ratio(float(slope), float(low), float(high)),
        }
        found.append(
            {
                "sweep": sweep,
                **asdict(replace(base, **{sweep: value})),
                **{name: ratio.median for name, ratio in ratios.items()},
                "quartiles": {name: [ratio.low, ratio.high] for name, ratio in ratios.items()},
                "predicted_over_base": predicted,
                "measured_over_predicted": ratios["step_over_base"].median / predicted,
                "forward_equivalents": counted[value],
                "measured_over_counted": ratios["step_over_inference"].median / counted[value],
                "predicted_exponent": exponent(list(setups), list(work.values())),
                "strategy": f"{type(setup.strategy).__name__} ({setup.strategy.variant})",
                "rounds": len(rounds),
                "chunk_rows": setup.strategy.chunk_rows,
                **environment_of(setup.network, setup.inputs.device),
            }
        )
    return found


def main(
    argv: Sequence[str] | None = None, *, base: Point = BASE, sweeps: Mapping[str, Sequence[int]] = SWEEPS
) -> None:
    """Measure, print the tables, write the records.

    Args:
        argv: Arguments; None: those of the process.
        base: The base point.
        sweeps: What to measure, as :data:`SWEEPS`.
    """
    options = _parser(list(sweeps)).parse_args(argv)
    found = []
    for sweep in [options.only] if options.only else sweeps:
        print(f"measuring {sweep} {', '.join(map(str, sweeps[sweep]))} ...", file=sys.stderr, flush=True)
        found += measure(sweep, sweeps[sweep], base=base, rounds=options.rounds, device=options.device)
    print(report(found, asdict(base)))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _parser(sweeps: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description="Growth of the time of a step with batch, queries, depth, width and groups beside what is counted.",
    )
    parser.add_argument("--rounds", type=_rounds, default=5, help="timed rounds (default 5)")
    parser.add_argument("--only", choices=sweeps, help="a single sweep (default all)")
    parser.add_argument("--json", type=writable, metavar="FILE", help="also write the records to FILE")
    parser.add_argument("--device", type=a_device, default=torch.device("cpu"), help="cpu (default), cuda, cuda:1, ...")
    return parser


def _rounds(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} leaves nothing to take a median of. Write 1 or more, as 5.")
    return int(text)


if __name__ == "__main__":
    main()
