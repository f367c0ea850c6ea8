"""A part of ``python -m benchmarks.gpu``: speed beside inference and backprop, with and without kernels."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.cases import PILOTS, Case
from benchmarks.gpu_parts import BASE, LARGE, SMALL, Plan, goal, precision, within
from benchmarks.harness import Record, Spread, alternate, synchronizer
from benchmarks.speed import (
    BACKPROP,
    CHECKPOINTED,
    FULL,
    QUERIES,
    STEP,
    SUFFIX,
    Setup,
    contenders,
    full_rows,
    infer,
    set_up,
    step,
)
from flops_lightning.noise.generators import kernels_on
from flops_lightning.objectives import cross_entropy
from flops_lightning.phases import PHASES, PhaseClock, phase, timed_phases
from flops_lightning.strategies import LikelihoodRatio

TABLE_1 = 10 * (1_281_167 - 10_000)
"""Images of Table 1's ViT-Large row on ImageNet: ten epochs, less the images that validate."""
Timing = tuple[Case, str]
WITHOUT_KERNELS: dict[str, Any] = {"generator": "torch"}
COMPILED: dict[str, Any] = {"compiled": True}
ALLOCATED: dict[str, Any] = {"allocation": "gaussian"}
FIRST: Sequence[Timing] = (
    (BASE, "bfloat16"), (LARGE, "bfloat16"), (BASE, "float32"), (BASE, "TF32"),
    (replace(BASE, **WITHOUT_KERNELS), "bfloat16"), (replace(BASE, **ALLOCATED), "bfloat16"),
)  # fmt: skip
OTHERS: Sequence[Timing] = (
    (LARGE, "TF32"), (replace(BASE, **COMPILED), "bfloat16"), (LARGE, "float32"),
    (replace(LARGE, **COMPILED), "bfloat16"), (replace(BASE, **WITHOUT_KERNELS), "float32"),
    (replace(BASE, **COMPILED), "TF32"), (replace(LARGE, **WITHOUT_KERNELS), "bfloat16"),
)  # fmt: skip
"""In order of value; a network in float32 takes longest."""


def speed(timings: Sequence[Timing], plan: Plan) -> Iterator[Record]:
    """(c) and (e): ratios as in ``python -m benchmarks``, seconds by phase, images a second, hours of Table 1's row."""
    for case, name in timings:
        if case.compiled and plan.device.type == "cpu":
            yield {"model": case.model, "precision": name, "left out": "compiling for a CPU takes minutes"}
            continue
        if plan.quick and case.model == LARGE.model:
            yield {"model": case.model, "precision": name, "left out": "quick has one network"}
            continue
        chosen = quick(case) if plan.quick else case
        yield timed(fitted(chosen, plan.device, name), plan.device, name)


def quick(case: Case) -> Case:
    """The tiny network in the place of a case."""
    queries = 2 * PILOTS if case.allocation == "gaussian" else SMALL.queries
    same: dict[str, Any] = {name: getattr(case, name) for name in ("allocation", "generator", "compiled")}
    return replace(SMALL, model=f"tiny, for {case.model}", queries=queries, **same)


def fitted(case: Case, device: torch.device, name: str) -> Case:
    """The case with as many rows in a forward pass as ``chunk_rows: auto`` takes."""
    with precision(name, device):
        network, inputs, targets = case.load(device, 2)
        strategy = LikelihoodRatio(chunk_rows="auto", seed=0)
        strategy.bind(network, cross_entropy)
        strategy.clean_pass(inputs, targets)
    return replace(case, chunk_rows=strategy.chunk_rows)


def timed(case: Case, device: torch.device, name: str) -> Record:
    """Of FULL the rows of one site are run, and count for each site: they are alike, and take longest."""
    setup, wait = set_up(case, device), synchronizer(device)
    with precision(name, device):
        runs, sites = contenders(setup), len(setup.strategy.sites)
    runs[FULL] = partial(infer, setup.network, full_rows(setup.strategy.sites[:1], setup.inputs, case.chunk_rows))
    timings = alternate(
        {what: within(name, device, run) for what, run in runs.items()}, rounds=case.rounds, synchronize=wait
    )
    once = timings.ratio(FULL, STEP)
    full, suffix = Spread(once.median * sites, once.low * sites, once.high * sites), timings.ratio(SUFFIX, QUERIES)
    with precision(name, device):
        shares = shares_by_phase(setup, device)
    seconds = float(np.median(timings.seconds[STEP]))
    a_second, kernels = case.batch / seconds, kernels_on(device) is not None and case.generator != "torch"
    goals = [
        goal("inference of the suffixes / queries", suffix.median, least=0.95),
        goal("inference of the queries as whole passes / step", full.median, least=3.0),
        goal("noise and sums / step", shares["noise"] + shares["accumulation"], most=0.02),
    ]
    if case.allocation != "equal":
        goals = [goal("allocator / step", shares["allocation"], most=0.01)]
    return {
        "model": case.model, "precision": name, "batch": case.batch, "queries": case.queries,
        "chunk rows": case.chunk_rows, "kernels": kernels, "compiled": case.compiled, "allocation": case.allocation,
        "step seconds": seconds, "images a second": a_second,
        "hours of Table 1's row": hours(a_second) if case.model == LARGE.model else None,
        "full inference / step": full, "suffix inference / queries": suffix,
        "backprop / step": timings.ratio(BACKPROP, STEP),
        "checkpointed backprop / step": timings.ratio(CHECKPOINTED, STEP),
        "shares": shares, "goals": goals if kernels and not case.compiled else [],
    }  # fmt: skip


class HostMark:
    """A mark where there is no timeline but the host's."""

    def __init__(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: "HostMark") -> float:
        """Milliseconds until another mark."""
        return 1e3 * (end.time - self.time)


def hours(images_a_second: float) -> float:
    """Of Table 1's ViT-Large row on ImageNet, on one such GPU."""
    return TABLE_1 / images_a_second / 3600


@dataclass
class EventClock(PhaseClock):
    """Seconds between marks on the device's own timeline, looked at when all is over: nothing waits in the step.

    Attributes:
        mark: Sets a mark, which knows the ``elapsed_time`` in milliseconds until another.
    """

    mark: Callable[[], Any] = HostMark
    _last: Any = None
    _spans: list[tuple[str, Any, Any]] = field(default_factory=list)

    def _charge(self) -> None:
        now = self.mark()
        if self._open:
            self._spans.append((self._open[-1], self._last, now))
        self._last = now

    def read(self) -> dict[str, float]:
        """Seconds of each phase; the device must have come to the last mark."""
        for name, start, end in self._spans:
            self.seconds[name] = self.seconds.get(name, 0.0) + start.elapsed_time(end) / 1e3
        self._spans.clear()
        return self.seconds


def cuda_mark() -> Any:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def shares_by_phase(setup: Setup, device: torch.device) -> dict[str, float]:
    """Share of each phase in a step, its optimiser (AdamW) included, and of the ``rest``; the second of two steps."""
    optimizer = torch.optim.AdamW(setup.network.module.parameters(), lr=0.0)
    wait, clock = synchronizer(device), EventClock(mark=cuda_mark if device.type == "cuda" else HostMark)
    for _ in range(2):
        clock = EventClock(mark=clock.mark)
        wait()
        with timed_phases(clock=clock):
            start = clock.mark()
            step(setup)
            with phase("optimiser"):
                optimizer.step()
            end = clock.mark()
        wait()
    whole, seconds = start.elapsed_time(end) / 1e3, clock.read()
    shares: dict[str, float] = {name: seconds.get(name, 0.0) / whole for name in PHASES}
    return shares | {"rest": 1 - sum(shares.values())}
