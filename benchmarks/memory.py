"""``python -m benchmarks.memory``: peak memory of a step beside plain inference of the same rows.

Every contender runs in processes of its own. Counted is what the process holds at its peak beyond what it held before
the network was built: weights, the batch, activations, directions and gradients; on a GPU what torch allocates.
"""

import argparse
import gc
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cases import VIT_TINY, Case, site_specs
from benchmarks.harness import Record, Spread, command, finish, table
from benchmarks.speed import run_queries
from flops_lightning.network.cutting import stage_by_replay
from flops_lightning.network.memory import held
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.objectives import cross_entropy
from flops_lightning.strategies import SPSA, Backprop, EvolutionStrategies, ForwardGradientStrategy, MeZO, SiteSpec
from flops_lightning.strategies.base import add_gradients
from flops_lightning.strategies.query_strategy import QueryStrategy

INFERENCE = "inference"
OURS = "LikelihoodRatio, groups"  # the strategy of the case, which is this one in the command of this module
OURS_WITHOUT_VJP = f"{OURS}, without local VJP"
OURS_BY_REPLAY = f"{OURS}, by replay"
STEPS, QUERIES = 2, 2  # queries per sample at each site: more take longer and no more memory


def _perturbed(cls: Any, *, whole: bool = False, **settings: Any) -> Callable[[Case, StagedNetwork], Any]:
    def make(case: Case, network: StagedNetwork) -> Any:
        sites = site_specs(network, case.queries)
        if whole:
            ends = [network.stages[0].name, network.stages[-1].name]
            sites = [SiteSpec(ends, queries_per_sample=case.queries, name="network")]
        return cls(sites=sites, chunk_rows=case.chunk_rows, seed=0, sigma=1e-3, **settings)

    return make


CONTENDERS: Mapping[str, Callable[[Case, StagedNetwork], ForwardGradientStrategy]] = {
    INFERENCE: lambda *_: Backprop(),  # bound, and not asked for a step
    "MeZO": lambda case, _: MeZO(chunk_rows=case.chunk_rows, seed=0),
    "SPSA shared, whole network": _perturbed(SPSA, whole=True),
    "ES shared, whole network": _perturbed(EvolutionStrategies, whole=True),
    "SPSA shared, groups": _perturbed(SPSA),
    "SPSA factored, groups": _perturbed(SPSA, layout="factored"),
    OURS: Case.make_strategy,
    OURS_WITHOUT_VJP: Case.make_strategy,
    OURS_BY_REPLAY: Case.make_strategy,
    "backprop": lambda *_: Backprop(),
}


def peak(name: str, case: Case, device: torch.device) -> float:
    """MiB at the peak of steps of a contender: inference of ``chunk_rows`` rows, or a step of ``batch`` samples."""
    torch.set_num_threads(1)
    case.build()  # libraries are no part of a step
    gc.collect()
    before = held("VmRSS") or 0.0
    network, inputs, targets = case.load(device, case.chunk_rows if name == INFERENCE else case.batch)
    if name == OURS_BY_REPLAY:
        network = stage_by_replay(network.module, inputs[:2])
    strategy = CONTENDERS[name](case, network)
    strategy.bind(network, cross_entropy)

    def step() -> None:
        if name == INFERENCE:
            with torch.no_grad():
                network.module(inputs)
            return
        network.module.zero_grad()
        clean = strategy.clean_pass(inputs, targets)
        if name != OURS_WITHOUT_VJP or not isinstance(strategy, QueryStrategy):
            strategy.estimate(clean)
            return
        for site, sums in run_queries(strategy, clean):  # they stay until `.grad` is there
            zeros = {key: torch.zeros_like(p) for key, p in site.parameters.items()}
            add_gradients(site.parameters, sums if site.in_parameters else zeros)
            del sums

    for _ in range(STEPS):
        step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return (held("VmHWM") or 0.0) - before


def peak_in_a_process(module: str, *arguments: str) -> float:
    """The number that ``python -m module`` prints last."""
    # Freed blocks go back at once instead of staying with the process.
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    line = [sys.executable, "-m", module, *arguments]
    child = subprocess.run(line, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return float(child.stdout.split()[-1])


def report(records: Sequence[Record]) -> str:
    """Peak memory of each contender, median (minimum - maximum), and its ratio to inference."""
    peaks = [Spread.of(record["mebibytes"], tails=0) for record in records]
    shown = [
        record | {"peak": each, "ratio": each.median / peaks[0].median}
        for record, each in zip(records, peaks, strict=True)
    ]
    columns = {f"step, batch {records[0]['batch']}": "{step}", "peak memory, MiB": "{peak:.0f}"}
    return table(columns | {"over inference": "{ratio:.2f}"}, shown)


def main(argv: Sequence[str] | None = None) -> None:
    parser = command("benchmarks.memory", __doc__, device=True, rounds=3, batch=64)
    parser.add_argument("--names", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="contenders")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)  # a child process
    options = parser.parse_args(argv)
    case = replace(VIT_TINY, batch=options.batch, chunk_rows=options.batch, queries=QUERIES)
    if options.one:
        print(peak(options.one, case, options.device))
        return
    if options.device.type != "cuda" and held("VmHWM") is None:
        parser.error("peak memory is read from /proc, which this system does not have.")
    names = list(dict.fromkeys([INFERENCE, *options.names]))
    records: list[Record] = [{"step": name, "batch": options.batch, "mebibytes": []} for name in names]
    shared = ["--batch", str(options.batch), "--device", str(options.device)]
    for _ in range(options.rounds):
        for record in records:
            record["mebibytes"].append(peak_in_a_process("benchmarks.memory", "--one", record["step"], *shared))
    print(report(records))
    finish(options, records)


if __name__ == "__main__":
    main()
