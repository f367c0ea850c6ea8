"""``python -m benchmarks``: speed and memory of a training step beside the inference it is made of, as ratios."""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.cases import FULL_CASES, QUICK_CASES, Case
from benchmarks.harness import Record, at_least, command, finish, say, table
from benchmarks.memory import INFERENCE, OURS, OURS_WITHOUT_VJP, peak, peak_in_a_process
from benchmarks.speed import measure
from flops_lightning.network.memory import held

CASE = ("model", "batch", "queries", "strategy", "sites", "allocation", "compiled")
"""Keys in the record that say what was measured."""

LEGEND = {
    "ratio_full_inference": ("full", "inference of the queries, each a row through the whole network / our step"),
    "ratio_suffix_inference": (
        "suffix", "inference of the same rows through each site's suffix / our queries: noise, suffixes, losses and "
        "sums; no clean pass, no local VJP",
    ),
    "ratio_backprop": ("backprop", "forward and backward pass of the batch / our step"),
    "ratio_checkpointed_backprop": ("checkpointed", "the same with every stage checkpointed / our step"),
    "ratio_reference": (
        "reference", "eq. 1 as it reads (one query at a time through the whole network, one VJP each) / our step",
    ),
    "ratio_batched_reference": ("batched", "the same in batches, with one VJP a sample / our step"),
    "overhead_fraction": (
        "overhead", "share of our step beyond inference of its suffixes: clean pass, noise, sums, local VJP, host",
    ),
    "memory_over_inference": (
        "memory", "peak memory of our step without local VJP, .grad included / of inference in chunks of as many rows",
    ),
    "memory_with_vjp_over_inference": ("with VJP", "the same of the whole step"),
    "memory_over_backprop": ("of backprop's", "peak memory of our step / of a backprop step of the batch"),
}  # fmt: skip
"""Key in the record -> (column, what it counts). Peaks of memory are taken in processes of their own."""

MEMORY = tuple(name for name in LEGEND if name.startswith("memory_"))


def main(argv: Sequence[str] | None = None, *, cases: Sequence[Case] | None = None) -> None:
    """Measure, print the table, write the records; given ``cases`` instead of the built-in ones have no memory."""
    parser = command("benchmarks", __doc__, device=True)
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds: below a minute on two cores")
    parser.add_argument("--models", nargs="+", help="only models whose names contain one of these, as ViT-Tiny")
    parser.add_argument("--rounds", type=at_least(1), help="timed rounds (default: each case's own)")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)  # a child process: case and contender
    options = parser.parse_args(argv)
    known = cases or (QUICK_CASES if options.quick else FULL_CASES)
    chosen = [case for case in known if not options.models or any(part in case.model for part in options.models)]
    if options.peak:
        print(peak(options.peak[1], chosen[int(options.peak[0])], options.device))
        return
    records = []
    for i, case in enumerate(chosen):
        say(f"measuring {case.model}, batch {case.batch}, {case.queries} queries ...")
        record = measure(replace(case, rounds=options.rounds or case.rounds), options.device)
        with_memory = cases is None and (held("VmHWM") is not None or options.device.type == "cuda")
        records.append(record | (memory_ratios(options, i) if with_memory else dict.fromkeys(MEMORY)))
    print(report(records))
    finish(options, records)


def memory_ratios(options: argparse.Namespace, place: int) -> dict[str, float]:
    """Peak memory of our step over that of inference and of backprop, at one of the cases that the options choose."""
    given = [*["--quick"] * options.quick, *(["--models", *options.models] if options.models else [])]
    given += ["--device", str(options.device), "--peak", str(place)]
    inference, alone, ours, backprop = (
        peak_in_a_process("benchmarks", *given, name) for name in (INFERENCE, OURS_WITHOUT_VJP, OURS, "backprop")
    )
    return dict(zip(MEMORY, (alone / inference, ours / inference, ours / backprop), strict=True))


def report(records: Sequence[Record]) -> str:
    columns = {name: f"{{{name}}}" for name in CASE} | {
        column: f"{{{name}:.2f}}" for name, (column, _) in LEGEND.items()
    }
    shares = []
    for record in records:
        seconds = record.get("seconds_by_phase", {})
        parts = (f"{name} {taken / sum(seconds.values()):.1%}" for name, taken in seconds.items())
        shares.append("  {model}, {strategy}, {sites}, {allocation}: ".format(**record) + ", ".join(parts))
    width = max(len(column) for column, _ in LEGEND.values())
    return "\n".join([
        table(columns, records),
        "\nShares of a step's time, its optimiser (AdamW) included:",
        *shares,
        "\nOur step: clean pass, all queries, local VJP, .grad; where an allocator chooses the counts, also its pilots",
        "and the allocation. The optimiser is only in the shares by phase.",
        "Ratios of speed: above 1, this project is faster. Median over the rounds (quartiles).",
        *(f"  {column:<{width}}  {meaning}" for column, meaning in LEGEND.values()),
    ])  # fmt: skip


if __name__ == "__main__":
    main()
