"""The tables of the scaling benchmark in Markdown, and what their columns count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report import measured_on

LEGEND = {
    "step / base": "time of the step / time of the base point's, both in the same rounds",
    "predicted": "the same by count: forward-equivalents of the step x FLOPs of a forward pass of its network",
    "measured / predicted": "above 1: slower than the count says",
    "step / inference": "time of the step / time of a plain forward pass of its batch, both in the same rounds",
    "counted": "forward-equivalents of the step a sample: clean pass, queries by their suffixes, local VJPs",
    "measured / counted": "above 1: a forward-equivalent of the step takes longer than plain inference of a sample",
    "exponent": "slope of log(time of the step) in log(quantity) over the upper half of the quantity's values",
}
"""Column -> what it counts."""


def report(records: Sequence[Mapping[str, Any]], base: Mapping[str, int]) -> str:
    """Two tables in Markdown, the points and the exponents; then the legend, with the base point."""
    sweeps = {record["sweep"]: record for record in records}
    *columns, exponent = LEGEND
    points = [[record["sweep"], str(record[record["sweep"]]), *_cells(record)] for record in records]
    slopes = [[s, _spread(record, "exponent"), f"{record['predicted_exponent']:.2f}"] for s, record in sweeps.items()]
    lines = [
        *_table(["sweep", "value", *columns], points),
        "",
        *_table(["sweep", exponent, "predicted"], slopes),
        "",
        f"Base point: {', '.join(f'{name} {value}' for name, value in base.items())}; patches of 8x8 pixels.",
        "A step: clean pass, all queries with equal counts, local VJPs, .grad; no optimiser.",
        "Measured: median (quartiles) over the rounds.",
        "",
        *(f"- {column}: {meaning}" for column, meaning in LEGEND.items()),
        "",
        *measured_on(records),
    ]
    return "\n".join(lines)


def _cells(record: Mapping[str, Any]) -> list[str]:
    return [
        _spread(record, "step_over_base"),
        f"{record['predicted_over_base']:.2f}",
        f"{record['measured_over_predicted']:.2f}",
        _spread(record, "step_over_inference"),
        f"{record['forward_equivalents']:.2f}",
        f"{record['measured_over_counted']:.2f}",
    ]


def _spread(record: Mapping[str, Any], name: str) -> str:
    low, high = record["quartiles"][name]
    return f"{record[name]:.2f} ({low:.2f} - {high:.2f})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
