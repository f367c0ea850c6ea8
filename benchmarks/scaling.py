"""``python -m benchmarks.scaling``: how the time of a step grows with what it is asked to do.

From a base point one quantity is changed at a time: samples in the batch, queries, depth and width of the network, and
groups that noise enters at. The prediction is what the library itself counts: forward-equivalents of the step times the
FLOPs of a forward pass. All steps of a sweep take turns in one process; only ratios of their times are reported.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.cases import Case, vit
from benchmarks.harness import Record, Spread, Timings, alternate, command, finish, say, synchronizer, table
from benchmarks.speed import Setup, forward_equivalents, set_up, step
from flops_lightning.network.operations import flops

STEP, INFERENCE = "step", "inference"
CHUNK_ROWS = 32


@dataclass(frozen=True)
class Point:
    """A step of a ViT with random weights on images of ``image`` x ``image`` pixels, patches of 8 x 8.

    ``batch`` samples with ``queries`` each at every site; ``depth`` blocks in ``groups`` groups, beside the head;
    tokens of ``width`` features, 64 in a head of attention (all where there are fewer than 128).
    """

    batch: int = 8
    queries: int = 16
    depth: int = 6
    width: int = 192
    groups: int = 3
    image: int = 64

    def case(self) -> Case:
        size: dict[str, Any] = {"img_size": self.image, "patch_size": 8, "depth": self.depth, "embed_dim": self.width}
        build = partial(vit, num_classes=10, num_heads=max(1, self.width // 64), **size)
        image = (3, self.image, self.image)
        return Case("ViT", build, image, 10, self.batch, self.queries, CHUNK_ROWS, rounds=5, groups=self.groups)


BASE = Point()
SWEEPS: Mapping[str, Sequence[int]] = {
    "batch": (2, 4, 8, 16, 32), "queries": (4, 8, 16, 32, 64), "depth": (3, 6, 12, 24), "width": (96, 192, 384, 768),
    "groups": (2, 3, 6),
}  # fmt: skip
"""By the quantity that is changed: its values, the base point's among them."""

LEGEND = {
    "step / base": ("{step_over_base:.2f}", "time of the step / time of the base point's, both in the same rounds"),
    "predicted": ("{predicted_over_base:.2f}", "the same by count: forward-equivalents x FLOPs of a forward pass"),
    "measured / predicted": ("{measured_over_predicted:.2f}", "above 1: slower than the count says"),
    "step / inference": ("{step_over_inference:.2f}", "time of the step / time of a plain forward pass of its batch"),
    "counted": ("{forward_equivalents:.2f}", "forward-equivalents of the step a sample, clean pass included"),
    "measured / counted": (
        "{measured_over_counted:.2f}", "above 1: a forward-equivalent takes longer than plain inference of a sample",
    ),
    "exponent": ("{exponent:.2f}", "slope of log(time) in log(quantity) over the upper half of the quantity's values"),
}  # fmt: skip
"""Column -> (its cells, what it counts)."""


@torch.inference_mode()
def inference(setup: Setup) -> None:
    with setup.network.evaluating():
        for x in setup.inputs.split(CHUNK_ROWS):
            setup.network.run(x)


@torch.inference_mode()
def forward_flops(setup: Setup) -> float:
    with setup.network.evaluating():
        return flops(setup.network.run, setup.inputs[:1])[0]


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Slope of log cost in log size over the upper half of the sizes (two at least), where fixed costs weigh least."""
    upper = slice(min(len(sizes) // 2, len(sizes) - 2), None)
    return float(np.polyfit(np.log(sizes[upper]), np.log(costs[upper]), 1)[0])


def measure(
    sweep: str, values: Sequence[int], *, base: Point = BASE, rounds: int, device: torch.device
) -> list[Record]:
    """Time a field of :class:`Point` at ascending values, that of ``base`` among them, and return a record of each."""
    setups = {value: set_up(replace(base, **{sweep: value}).case(), device) for value in values}
    contenders: dict[str, Callable[[], object]] = {}
    for value, setup in setups.items():
        contenders |= {f"{STEP} {value}": partial(step, setup), f"{INFERENCE} {value}": partial(inference, setup)}
    return records(sweep, setups, alternate(contenders, rounds=rounds, synchronize=synchronizer(device)), base=base)


def records(sweep: str, setups: Mapping[int, Setup], timings: Timings, *, base: Point) -> list[Record]:
    start, sizes = getattr(base, sweep), list(setups)
    counted = {value: forward_equivalents(setup.strategy, setup.inputs) for value, setup in setups.items()}
    work = {value: counted[value] * len(setup.inputs) * forward_flops(setup) for value, setup in setups.items()}
    rounds = list(zip(*(timings.seconds[f"{STEP} {value}"] for value in setups), strict=True))
    slope = Spread.of(exponent(sizes, seconds) for seconds in rounds)
    found = []
    for value, setup in setups.items():
        over_base, over_inference = (
            timings.ratio(f"{STEP} {value}", other) for other in (f"{STEP} {start}", f"{INFERENCE} {value}")
        )
        predicted = work[value] / work[start]
        found.append({
            "sweep": sweep, **asdict(replace(base, **{sweep: value})), "step_over_base": over_base,
            "predicted_over_base": predicted, "measured_over_predicted": over_base.median / predicted,
            "step_over_inference": over_inference, "forward_equivalents": counted[value],
            "measured_over_counted": over_inference.median / counted[value], "exponent": slope,
            "predicted_exponent": exponent(sizes, list(work.values())), "rounds": len(rounds),
            "strategy": f"{type(setup.strategy).__name__} ({setup.strategy.variant})", "chunk_rows": CHUNK_ROWS,
        })  # fmt: skip
    return found


def report(found: Sequence[Record], base: Point) -> str:
    columns = {"sweep": "{sweep}", "value": "{value}"} | {name: cell for name, (cell, _) in LEGEND.items()}
    slopes = {"sweep": "{sweep}", "exponent": columns.pop("exponent"), "predicted": "{predicted_exponent:.2f}"}
    legend = "\n".join(f"- {column}: {meaning}" for column, (_, meaning) in LEGEND.items())
    return f"""{table(columns, [record | {"value": record[record["sweep"]]} for record in found])}

{table(slopes, {record["sweep"]: record for record in found}.values())}

Base point: {", ".join(f"{name} {value}" for name, value in asdict(base).items())}; patches of 8x8 pixels.
A step: clean pass, all queries with equal counts, local VJPs, .grad; no optimiser.
Measured: median (quartiles) over the rounds.

{legend}"""


def main(
    argv: Sequence[str] | None = None, *, base: Point = BASE, sweeps: Mapping[str, Sequence[int]] = SWEEPS
) -> None:
    parser = command("benchmarks.scaling", __doc__, device=True, rounds=5)
    parser.add_argument("--only", choices=list(sweeps), help="a single sweep (default all)")
    options = parser.parse_args(argv)
    found = []
    for sweep in [options.only] if options.only else sweeps:
        say(f"measuring {sweep} {', '.join(map(str, sweeps[sweep]))} ...")
        found += measure(sweep, sweeps[sweep], base=base, rounds=options.rounds, device=options.device)
    print(report(found, base))
    finish(options, found)


if __name__ == "__main__":
    main()
