"""``python -m benchmarks.ranks``: time and bytes of a step on several ranks.

Measured with real processes on this machine, then modelled for nodes of several GPUs (``ranks_model.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.arguments import a_number, writable
from benchmarks.ranks_load import StepLoad
from benchmarks.ranks_measured import Job, launch
from benchmarks.ranks_methods import METHODS, MODELS, batch_of, load_of, vit_loads
from benchmarks.ranks_model import Link, Machine, Scaling, efficiency, step_seconds
from benchmarks.ranks_report import SCALINGS, measured_tables, modelled_tables
from flops_lightning.network.staging import stage_network

VITS = {"ViT-Base/16": "vit_base_patch16_224", "ViT-Large/16": "vit_large_patch16_224"}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, model, print both apart, write the records."""
    parser = _parser()
    options = parser.parse_args(argv)
    _check(parser, options)
    records: dict[str, Any] = {}
    if options.ranks:
        records["measured"] = measure(
            options.model, options.ranks, batch=options.batch, queries=options.queries, rounds=options.rounds
        )
        print(measured_tables(records["measured"]))
    if options.modelled_ranks:
        assumptions = {
            "flops_per_second": options.flops_per_second, "draws_per_second": options.draws_per_second,
            "bandwidth": options.bandwidth, "latency": options.latency, "ranks_per_node": options.ranks_per_node,
            "itemsize": 4, "queries": options.queries,
        }  # fmt: skip
        rows = model(assumptions, options.modelled_ranks, batch=options.modelled_batch)
        records["modelled"] = {"assumptions": assumptions, "steps": rows}
        print("\n" * bool(options.ranks) + modelled_tables(rows, assumptions))
    if options.json:
        options.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


def measure(word: str, ranks: Sequence[int], *, batch: int, queries: int, rounds: int) -> list[dict[str, Any]]:
    """Records of every method, scaling and number of ranks.

    Args:
        word: Of :data:`MODELS`.
        ranks: Numbers of processes.
        batch: Samples: of all ranks together under strong scaling, of each rank under weak.
        queries: Of a sample at each site.
        rounds: Timed steps of each.
    """
    case = MODELS[word]
    network = stage_network(case.build())
    records = []
    for n in ranks:
        print(f"measuring {n} rank(s) ...", file=sys.stderr, flush=True)
        job = Job(word, [method.name for method in METHODS], sorted({batch // n, batch}), queries, rounds)
        found = launch(job, n)
        for per_rank in zip(*found, strict=True):
            method = next(each for each in METHODS if each.name == per_rank[0]["method"])
            strategy = method.strategy(network, queries=queries, chunk_rows=case.chunk_rows)
            load = load_of(method, strategy, batch_of(case, 1, 1, 0)[0])
            known = {"model": case.model, "queries": queries, "rounds": rounds, **_environment()}
            record = known | summary(per_rank, load)
            sizes: dict[Scaling, int] = {"strong": batch // n, "weak": batch}
            records += [record | {"scaling": how} for how, samples in sizes.items() if samples == record["samples"]]
    for record in records:
        alone = _of_one_rank(records, record)
        gain = efficiency(alone["seconds"], record["seconds"], record["ranks"], record["scaling"]) if alone else None
        record["efficiency"] = gain
    return records


def summary(per_rank: Sequence[Mapping[str, Any]], load: StepLoad) -> dict[str, Any]:
    """What all ranks saw of the steps of one method, beside what the model counts.

    A step takes as long as its slowest rank; the rank that waits least tells the time of the exchange itself.
    """
    n, samples = len(per_rank), per_rank[0]["samples"]
    seconds = np.array([rank["seconds"] for rank in per_rank]).max(0)
    exchange = np.array([rank["exchange"] for rank in per_rank])
    one_pass, one_draw = (statistics.median(np.array([r[key] for r in per_rank]).max(0)) for key in ("pass", "draw"))
    low, middle, high = np.quantile(seconds, (0.25, 0.5, 0.75))
    passes, draws = load.forward_equivalents(samples), load.drawn_numbers(samples, n)
    return {
        "method": per_rank[0]["method"], "ranks": n, "samples": samples, "sites": len(load.sites),
        "seconds": float(middle), "seconds_quartiles": [float(low), float(high)],
        "exchange_seconds": float(np.median(exchange.min(0))), "waiting_seconds": float(np.median(exchange.max(0))),
        "pass_seconds": float(one_pass), "draw_seconds": float(one_draw),
        "predicted_seconds": float(passes * one_pass + draws * one_draw),
        "bytes": max(rank["bytes"] for rank in per_rank), "model_bytes": load.bytes_sent(samples, n),
        "forward_equivalents": max(rank["forward_equivalents"] for rank in per_rank),
        "model_forward_equivalents": passes, "drawn_numbers": draws,
        "alike": len({rank["gradient_bits"] for rank in per_rank}) == 1,
        "gradient_norm": per_rank[0]["gradient_norm"],
    }  # fmt: skip


def model(assumptions: Mapping[str, Any], ranks: Sequence[int], *, batch: int) -> list[dict[str, Any]]:
    """Modelled steps of ViT-Base and ViT-Large.

    Args:
        assumptions: Speeds and queries, as of the command line.
        ranks: Numbers of ranks.
        batch: Samples of all ranks under strong scaling; under weak scaling each rank has its share at the most ranks.
    """
    methods = [method for method in METHODS if not method.allocated]
    node, network = (
        Link(gigabytes * 1e9, microseconds * 1e-6)
        for gigabytes, microseconds in zip(assumptions["bandwidth"], assumptions["latency"], strict=True)
    )
    rows = []
    for title, name in VITS.items():
        loads, flops = vit_loads(name, methods, queries=assumptions["queries"])
        passes, draws = assumptions["flops_per_second"] / flops, assumptions["draws_per_second"]
        machine = Machine(passes, draws, node, network, assumptions["ranks_per_node"])
        for scaling in SCALINGS:
            for word, load in loads.items():
                for n in ranks:
                    samples = batch // n if scaling == "strong" else batch // max(ranks)
                    alone = step_seconds(load, batch if scaling == "strong" else samples, 1, machine)
                    step = step_seconds(load, samples, n, machine)
                    rows.append({
                        "model": title, "method": word, "scaling": scaling, "ranks": n, "samples": samples,
                        "queries": sum(site.queries for site in load.sites), "passes_seconds": step.passes,
                        "draws_seconds": step.draws, "exchange_seconds": step.exchange,
                        "exchange_share": step.exchange_share, "bytes": load.bytes_sent(samples, n),
                        "efficiency": efficiency(alone.total, step.total, n, scaling), "forward_flops": flops,
                        "parameters": load.numbers,
                    })  # fmt: skip
    return rows


def _of_one_rank(records: Sequence[Mapping[str, Any]], like: Mapping[str, Any]) -> Mapping[str, Any] | None:
    same = (r for r in records if r["ranks"] == 1 and all(r[key] == like[key] for key in ("method", "scaling")))
    return next(same, None)


def _environment() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "cores": cores, "processor": platform.processor() or platform.machine(), "torch": torch.__version__,
        "backend": "gloo", "threads": 1,
    }  # fmt: skip


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    # Found out before the measurement, not after it.
    splits = (
        ("batch", options.batch, options.ranks),
        ("modelled-batch", options.modelled_batch, options.modelled_ranks),
    )
    for name, batch, ranks in splits:
        for n in ranks:
            if batch % n:
                parser.error(f"--{name} {batch} cannot be split over {n} ranks. Write a multiple of the ranks.")
    if options.queries % 2:
        parser.error(f"--queries {options.queries} makes no antithetic pairs. Write an even number.")


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no speed or time. Write a number above 0.")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ranks",
        description="Time and bytes of a step on several ranks: measured here, modelled for more.",
    )
    add = parser.add_argument
    add(
        "--ranks",
        type=a_number,
        nargs="*",
        default=[1, 2, 4],
        help="processes to measure (default 1 2 4); none: no run",
    )
    add("--model", choices=list(MODELS), default="digits", help="network to measure (default digits)")
    add("--batch", type=a_number, default=64, help="samples: of all ranks (strong) or of each (weak) (default 64)")
    add("--queries", type=a_number, default=20, help="queries of a sample at each site, an even number (default 20)")
    add("--rounds", type=a_number, default=5, help="timed steps (default 5)")
    add("--modelled-ranks", type=a_number, nargs="*", default=[1, 8, 16, 64], help="ranks to model (default 1 8 16 64)")
    add("--modelled-batch", type=a_number, default=1024, help="samples of all modelled ranks (default 1024)")
    add("--ranks-per-node", type=a_number, default=8, help="GPUs of a node (default 8)")
    pair: dict[str, Any] = {"type": _positive, "nargs": 2, "metavar": ("NODE", "NETWORK")}
    add("--bandwidth", default=[300.0, 25.0], **pair, help="GB/s of a link, one direction (assumed: 300 25)")
    add("--latency", default=[3.0, 10.0], **pair, help="microseconds of a message (assumed: 3 10)")
    add("--flops-per-second", type=_positive, default=1e14, help="FLOPs/s of forward passes on a GPU (assumed: 1e14)")
    add("--draws-per-second", type=_positive, default=5e10, help="random numbers/s, drawn and added (assumed: 5e10)")
    add("--json", type=writable, metavar="FILE", help="also write the records to FILE")
    return parser


if __name__ == "__main__":
    main()
