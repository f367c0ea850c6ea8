"""Tables of steps on several ranks: what was measured, and, apart from it, what the model says of larger machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.ranks_model import Scaling, even_bandwidth
from benchmarks.report import aligned

SCALINGS: dict[Scaling, str] = {
    "strong": "strong scaling: one batch split over the ranks; efficiency T(1) / (n T(n))",
    "weak": "weak scaling: a batch of one size on every rank; efficiency T(1) / T(n)",
}
MEASURED = (
    "step: median over the rounds (quartiles) of the slowest rank's seconds, up to the gradients of all; no optimiser.",
    "exchange: within collectives, of the rank that waited least. passes + draws: forward-equivalents and drawn",
    "numbers of a rank times the seconds of one pass and one number, taken in the same processes between the steps.",
    "bytes: handed to collectives by a rank in a step, beside those of the model. alike: same gradients, bit for bit.",
)


def measured_tables(records: Sequence[Mapping[str, Any]]) -> str:
    """Tables of measured steps by scaling, and what may be read from them."""
    first = records[0]
    parts = [
        f"MEASURED: {first['model']}, {first['queries']} queries of a sample at each of {first['sites']} sites, "
        f"{first['rounds']} rounds, gloo on 127.0.0.1, one thread a rank, {first['cores']} cores."
    ]
    header = [
        "method", "ranks", "samples a rank", "step s", "exchange s", "passes + draws s", "forward-equivalents a rank",
        "bytes", "bytes, model", "alike", "efficiency",
    ]  # fmt: skip
    for scaling, title in SCALINGS.items():
        chosen = [record for record in records if record["scaling"] == scaling]
        parts += ["", title, aligned([header, *(_measured_line(record) for record in chosen)])]
    parts += ["", *MEASURED]
    if any(record["ranks"] > record["cores"] for record in records):
        parts.append(
            "*: more ranks than cores, which take turns: a test of bytes and gradients, not of seconds and efficiency."
        )
    return "\n".join(parts)


def _measured_line(record: Mapping[str, Any]) -> list[str]:
    low, high = record["seconds_quartiles"]
    crowded = "*" if record["ranks"] > record["cores"] else ""
    gain = record["efficiency"]
    return [
        record["method"], f"{record['ranks']}{crowded}", str(record["samples"]),
        f"{record['seconds']:.4f} ({low:.4f}-{high:.4f})", f"{record['exchange_seconds']:.4f}",
        f"{record['predicted_seconds']:.4f}", f"{record['forward_equivalents']:.1f}", f"{record['bytes']:.0f}",
        str(record["model_bytes"]), "yes" if record["alike"] else "NO", "-" if gain is None else f"{gain:.2f}{crowded}",
    ]  # fmt: skip


def modelled_tables(rows: Sequence[Mapping[str, Any]], assumptions: Mapping[str, Any]) -> str:
    """Tables of modelled steps by scaling, with all that is assumed, and where the two exchanges are even."""
    node, network = assumptions["bandwidth"]
    node_latency, network_latency = assumptions["latency"]
    parts = [
        "MODEL, not measured: T(n) = passes + draws + exchange, ring collectives, nothing overlaps, no rank waits.",
        f"Assumed of a rank: {assumptions['flops_per_second']:.3g} FLOPs/s of forward passes, "
        f"{assumptions['draws_per_second']:.3g} random numbers/s drawn and added; {assumptions['itemsize']} bytes a "
        "number.",
        f"Assumed of links: {node:g} GB/s and {node_latency:g} us a message within a node of "
        f"{assumptions['ranks_per_node']} ranks, {network:g} GB/s and {network_latency:g} us between nodes.",
    ]
    header = [
        "model", "method", "ranks", "samples a rank", "queries", "compute s", "of it draws s", "exchange s",
        "exchange share", "efficiency",
    ]  # fmt: skip
    for scaling, title in SCALINGS.items():
        lines = [_modelled_line(row) for row in rows if row["scaling"] == scaling]
        parts += ["", title, aligned([header, *lines])]
    parts += [
        "",
        "queries: of a sample at all sites together. Every rank has directions of its own: of SPSA with shared",
        "directions, n ranks try n times as many, and splitting a batch makes none of them cheaper to draw.",
        "Not in it: noise of LikelihoodRatio (a percent of a step on a CPU), optimiser, data.",
    ]
    several = sorted({row["ranks"] for row in rows} - {1})
    if several:
        pairs, draws = assumptions["queries"] // 2, assumptions["draws_per_second"]
        limits = ", ".join(f"{even_bandwidth(pairs, n, draws) / 1e9:.3g} GB/s on {n} ranks" for n in several)
        parts.append(f"Exchanging losses is faster than exchanging gradients below {limits}, whatever the model.")
    return "\n".join(parts)


def _modelled_line(row: Mapping[str, Any]) -> list[str]:
    return [
        row["model"], row["method"], str(row["ranks"]), str(row["samples"]), str(row["queries"]),
        f"{row['passes_seconds'] + row['draws_seconds']:.4g}", f"{row['draws_seconds']:.3g}",
        f"{row['exchange_seconds']:.3g}", f"{row['exchange_share']:.2%}", f"{row['efficiency']:.3f}",
    ]  # fmt: skip
