"""The table on screen, and what its columns count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

CASE = ("model", "batch", "queries", "strategy", "sites", "allocation", "compiled")
"""Keys in the record that say what was measured."""

LEGEND = {
    "ratio_full_inference": (
        "full",
        "inference of the step's queries, each one row through the whole network / our step",
    ),
    "ratio_suffix_inference": (
        "suffix",
        "inference of the same rows through each site's suffix alone / our queries: noise, suffixes, losses and sums; "
        "no clean pass, no local VJP",
    ),
    "ratio_backprop": ("backprop", "forward and backward pass of the batch / our step"),
    "ratio_checkpointed_backprop": (
        "checkpointed",
        "the same with every stage checkpointed: its activations are computed again in the backward pass / our step",
    ),
    "ratio_reference": (
        "reference",
        "eq. 1 as it reads (one query at a time through the whole network, one VJP each) / our step",
    ),
    "ratio_batched_reference": (
        "batched",
        "the same in batches, with one VJP a sample / our step",
    ),
    "overhead_fraction": (
        "overhead",
        "share of our step beyond inference of its suffixes: clean pass, noise, sums, local VJP, host",
    ),
}
"""Key in the record -> (column, what it counts)."""


MEMORY = {
    "memory_over_inference": (
        "memory",
        "peak memory of our step without local VJP, .grad included / of inference with the same chunk of rows",
    ),
    "memory_with_vjp_over_inference": ("with VJP", "the same of the whole step"),
    "memory_over_backprop": ("of backprop's", "peak memory of our step / of a backprop step of the batch"),
}
"""Key in the record -> (column, what it counts); measured in processes of their own."""


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """Readable table of records: medians with quartiles, then what each column counts."""
    header = [*CASE, *(column for column, _ in (*LEGEND.values(), *MEMORY.values()))]
    lines = [header, *(_line(record) for record in records)]
    return "\n".join([aligned(lines), "", *_phases(records), *_explanation(records)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Lines of cells as text with columns, a rule below the first."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([rows[0], "-" * max(len(row) for row in rows), *rows[1:]])


def measured_on(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each machine that records were measured on."""
    ran = {f"{r['device']}, {r['threads']} thread(s), {r['dtype']}, torch {r['versions']['torch']}" for r in records}
    return [f"Measured on {line}." for line in sorted(ran)]


def _phases(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where the time of each step goes."""
    measured = [record for record in records if record.get("seconds_by_phase")]
    if not measured:
        return []
    lines = ["Shares of a step's time, its optimiser (AdamW) included:"]
    for record in measured:
        seconds = record["seconds_by_phase"]
        whole = sum(seconds.values())
        shares = ", ".join(f"{name} {taken / whole:.1%}" for name, taken in seconds.items())
        lines.append(f"  {_name(record)}: {shares}")
    return [*lines, ""]


def _name(record: Mapping[str, Any]) -> str:
    return ", ".join(str(record[name]) for name in ("model", "strategy", "sites", "allocation")) + (
        ", compiled" if record["compiled"] else ""
    )


def _line(record: Mapping[str, Any]) -> list[str]:
    cells = [str(record[name]) for name in CASE]
    for name in (*LEGEND, *MEMORY):
        low, high = record["quartiles"].get(name, (None, None))
        spread = "" if low is None else f" ({low:.2f}-{high:.2f})"
        cells.append("-" if record[name] is None else f"{record[name]:.2f}{spread}")
    return cells


def _explanation(records: Sequence[Mapping[str, Any]]) -> list[str]:
    width = max(len(column) for column, _ in (*LEGEND.values(), *MEMORY.values()))
    return [
        "Our step: clean pass, all queries, local VJP, .grad; where an allocator chooses the counts, its pilots and",
        "the allocation too. No optimiser, but in the shares by phase.",
        "Ratios of speed: above 1, this project is faster. Median over the rounds (quartiles).",
        *(f"  {column.ljust(width)}  {meaning}" for column, meaning in (*LEGEND.values(), *MEMORY.values())),
        *measured_on(records),
    ]
