"""``python -m benchmarks.memory``: peak memory of a step beside plain inference of the same rows.

Every contender runs in a process of its own, a few times over. Counted is what the process holds at its peak beyond
what it held before the network was built: weights, the batch, activations, kept activations, directions and gradients.
On a GPU it is what torch allocates at its peak.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import VIT_TINY, Case
from benchmarks.measurement import row_cross_entropy
from flops_lightning.network.process_memory import held
from flops_lightning.network.staging import StagedNetwork, stage_network
from flops_lightning.strategies import (
    SPSA,
    Backprop,
    EvolutionStrategies,
    ForwardGradientStrategy,
    LikelihoodRatio,
    MeZO,
    SiteSpec,
)
from flops_lightning.strategies.base import add_gradients
from flops_lightning.strategies.query_strategy import QueryStrategy
from flops_lightning.strategies.site_queries import QueriedOutput
from flops_lightning.strategies.site_specs import default_specs

INFERENCE = "inference"
OURS = "ours"
QUERIES_ALONE = "ours, without local VJP"
LR_QUERIES_ALONE = "LikelihoodRatio, groups, without local VJP"
STEPS = 2
QUERIES = 2
"""Of a sample at each site: more take longer and no more memory."""


def contenders(network: StagedNetwork, rows: int) -> dict[str, Callable[[], ForwardGradientStrategy]]:
    """Strategies by name; the chunks of all have ``rows`` rows."""
    whole = [SiteSpec([network.stages[0].name, network.stages[-1].name], queries_per_sample=QUERIES, name="network")]
    groups = [replace(spec, queries_per_sample=QUERIES) for spec in default_specs(network)]
    shared: dict[str, Any] = {"chunk_rows": rows, "seed": 0, "sigma": 1e-3}
    return {
        "MeZO": lambda: MeZO(chunk_rows=rows, seed=0),
        "SPSA shared, whole network": lambda: SPSA(sites=whole, **shared),
        "SPSA shared, groups": lambda: SPSA(sites=groups, **shared),
        "ES shared, whole network": lambda: EvolutionStrategies(sites=whole, **shared),
        "SPSA factored, groups": lambda: SPSA(sites=groups, layout="factored", **shared),
        "LikelihoodRatio, groups": lambda: LikelihoodRatio(sites=groups, chunk_rows=rows, seed=0),
        LR_QUERIES_ALONE: lambda: LikelihoodRatio(sites=groups, chunk_rows=rows, seed=0),
        "backprop": Backprop,
    }


NAMES = (
    INFERENCE, "MeZO", "SPSA shared, whole network", "ES shared, whole network", "SPSA shared, groups",
    "SPSA factored, groups", "LikelihoodRatio, groups", LR_QUERIES_ALONE, "backprop",
)  # fmt: skip


def run(name: str, batch: int, case: Case = VIT_TINY, make: Callable[[StagedNetwork], Any] | None = None) -> float:
    """Peak memory in MiB of steps of one contender, beyond what was held before.

    Args:
        name: Of the contender.
        batch: Samples in a batch; inference runs on ``case.chunk_rows`` rows where ``make`` is given.
        case: The network and the size of its inputs.
        make: The strategy of the name ``OURS``, unbound.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    case.build()  # libraries are no part of a step
    gc.collect()
    before = held("VmRSS") or 0.0
    torch.manual_seed(0)
    network = stage_network(case.build().to(device).eval())
    rows = case.chunk_rows if name == INFERENCE and make is not None else batch
    inputs = torch.randn(rows, *case.image, device=device)
    targets = torch.randint(case.classes, (rows,), device=device)
    if name == INFERENCE:
        with torch.no_grad():
            for _ in range(STEPS):
                network.module(inputs)
    else:
        ours = make is not None and name in (OURS, QUERIES_ALONE)
        strategy = make(network) if ours and make is not None else contenders(network, batch)[name]()
        strategy.bind(network, row_cross_entropy)
        alone = name in (QUERIES_ALONE, LR_QUERIES_ALONE)
        for _ in range(STEPS):
            network.module.zero_grad()
            if alone and isinstance(strategy, QueryStrategy):
                step_without_vjp(strategy, inputs, targets)
            else:
                strategy.estimate(strategy.clean_pass(inputs, targets))
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return (held("VmHWM") or 0.0) - before


@torch.no_grad()
def step_without_vjp(strategy: QueryStrategy[Any], inputs: Tensor, targets: Tensor) -> None:
    """A step that leaves out nothing but what takes the sums at a site's output to its parameters.

    The sums stay until ``.grad`` is there, which is filled with zeros.
    """
    clean = strategy.clean_pass(inputs, targets)
    with strategy.network.evaluating():
        for site in strategy.sites:
            counts = np.full(len(inputs), site.queries_per_sample)
            queried = strategy.engine.query(site, clean, counts)
            delta = queried.sums.delta() if isinstance(queried, QueriedOutput) else None
            add_gradients(site.parameters, {name: torch.zeros_like(p) for name, p in site.parameters.items()})
            del queried, delta


def in_a_process(module: str, *arguments: str) -> float:
    """What a module prints last, as a number, run in a process of its own."""
    # Freed blocks go back at once instead of staying with the process.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", module, *arguments]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(child.stdout.split()[-1])


def table(peaks: dict[str, list[float]], batch: int) -> str:
    """Markdown: peak memory of each contender and its ratio to inference, medians."""
    inference = statistics.median(peaks[INFERENCE])
    lines = [f"| step, batch {batch} | peak memory, MiB | over inference |", "|---|---|---|"]
    for name, found in peaks.items():
        peak = statistics.median(found)
        lines.append(f"| {name} | {peak:.0f} ({min(found):.0f} - {max(found):.0f}) | {peak / inference:.2f} |")
    return "\n".join(lines) + "\n"


def main(args: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    summary = (__doc__ or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=summary)
    parser.add_argument("--batch", type=int, default=64, help="samples in a batch (default 64)")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each contender (default 3)")
    parser.add_argument("--names", nargs="+", choices=NAMES, default=list(NAMES), help="contenders")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--one", choices=NAMES, help=argparse.SUPPRESS)  # a child process
    options = parser.parse_args(args)
    if options.one:
        print(run(options.one, options.batch))
        return
    if not torch.cuda.is_available() and held("VmHWM") is None:
        parser.error("peak memory is read from /proc, which this system does not have.")
    peaks: dict[str, list[float]] = {name: [] for name in dict.fromkeys([INFERENCE, *options.names])}
    for _ in range(options.rounds):
        for name, found in peaks.items():
            found.append(in_a_process("benchmarks.memory", "--one", name, "--batch", str(options.batch)))
    print(table(peaks, options.batch))
    if options.json:
        options.json.write_text(json.dumps({"batch": options.batch, "mebibytes": peaks}, indent=1) + "\n")


if __name__ == "__main__":
    main()
