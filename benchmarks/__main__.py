"""``python -m benchmarks [--quick] [--json FILE] [--device DEVICE]``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from benchmarks.arguments import a_device, writable
from benchmarks.cases import Case, full_cases, quick_cases
from benchmarks.measurement import measure, strategy_of
from benchmarks.memory import INFERENCE, OURS, QUERIES_ALONE, in_a_process, run
from benchmarks.report import table
from flops_lightning.network.process_memory import held


def main(argv: Sequence[str] | None = None, *, cases: Sequence[Case] | None = None) -> None:
    """Measure, print the table, write the records.

    Args:
        argv: Arguments; None: those of the process.
        cases: What to measure instead of the built-in cases.
    """
    options = _parser().parse_args(argv)
    known = list(cases or (quick_cases() if options.quick else full_cases()))
    chosen = [case for case in known if not options.models or any(part in case.model for part in options.models)]
    if options.rounds:
        chosen = [replace(case, rounds=options.rounds) for case in chosen]
    if options.peak:
        print(peak(chosen[int(options.peak[0])], options.peak[1]))
        return
    records = []
    for place, case in enumerate(chosen):
        print(f"measuring {case.model}, batch {case.batch}, {case.queries} queries ...", file=sys.stderr, flush=True)
        records.append(measure(case, options.device))
        if cases is None and held("VmHWM") is not None:
            records[-1] |= memory_ratios(_given(options), place)
    print(table(records))
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


def peak(case: Case, name: str) -> float:
    """Peak memory in MiB of a contender at a case, in this process."""
    return run(name, case.batch, case, lambda network: strategy_of(case, network))


def memory_ratios(given: Sequence[str], place: int) -> dict[str, float]:
    """Peak memory of our step over that of inference and of backprop, each in a process of its own.

    Args:
        given: Arguments that choose the cases.
        place: Of the case among them.
    """
    peaks = {
        name: in_a_process("benchmarks", *given, "--peak", str(place), name)
        for name in (INFERENCE, QUERIES_ALONE, OURS, "backprop")
    }
    return {
        "memory_over_inference": peaks[QUERIES_ALONE] / peaks[INFERENCE],
        "memory_with_vjp_over_inference": peaks[OURS] / peaks[INFERENCE],
        "memory_over_backprop": peaks[OURS] / peaks["backprop"],
    }


def _given(options: argparse.Namespace) -> list[str]:
    return [*(["--quick"] if options.quick else []), *(["--models", *options.models] if options.models else [])]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Speed of a forward-only training step beside the inference it is made of, as ratios.",
    )
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds: below a minute on two cores")
    parser.add_argument("--models", nargs="+", help="only models whose names contain one of these, as ViT-Tiny")
    parser.add_argument("--rounds", type=int, default=0, help="timed rounds (default: each case's own)")
    parser.add_argument("--json", type=writable, metavar="FILE", help="also write the records to FILE")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # a child process: case and contender
    parser.add_argument("--device", type=a_device, default=torch.device("cpu"), help="cpu (default), cuda, cuda:1, ...")
    return parser


if __name__ == "__main__":
    main()
