"""Rows of a study as lines of a JSON file: those that are there are not made again."""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.tables import markdown, mean_interval

Tables = Mapping[str, tuple[Callable[[argparse.Namespace, str, int], dict[str, float]], list[str]]]
"""What makes a row of each table, from the options, its name and a seed; and the names of its rows."""


def resumed(
    file: Path, names: Sequence[str], seeds: Sequence[int], make: Callable[[str, int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Make the rows that the file lacks, seed by seed, and add each to it; all its lines.

    Args:
        file: The lines, ``{"name": ..., "seed": ..., **row}``; its folder is made.
        names: Names of the rows of a seed.
        seeds: The seeds.
        make: Makes a row of a name and a seed; ``found`` of it is printed.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    if file.exists():
        lines = [json.loads(line) for line in file.read_text().splitlines()]
    for seed in seeds:
        for name in names:
            if any((line["name"], line["seed"]) == (name, seed) for line in lines):
                continue
            lines.append({"name": name, "seed": seed, **make(name, seed)})
            with file.open("a") as results:
                results.write(json.dumps(lines[-1]) + "\n")
            print(name, seed, lines[-1]["found"], flush=True)
    return lines


def study_options(
    doc: str | None, tables: Tables, files: Mapping[str, str], args: Sequence[str] | None
) -> argparse.Namespace:
    """The options of a study.

    Args:
        doc: The docstring of its module, which begins with the command.
        tables: Its tables.
        files: Files that it reads, required options with their help.
        args: The command line; None: that of the process.
    """
    first = (doc or "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog=first.strip("`").partition(" TABLE")[0], description=first)
    parser.add_argument("table", choices=tables)
    for name, help_text in files.items():
        parser.add_argument(f"--{name}", type=Path, required=True, help=help_text)
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--names", nargs="+", help="rows to make; all by default")
    return parser.parse_args(args)


def table(options: argparse.Namespace, tables: Tables) -> str:
    """Make the rows of the table that is asked for; means with their 95 % intervals over the seeds, as Markdown."""
    make, names = tables[options.table]

    def row(name: str, seed: int) -> dict[str, Any]:
        return {"found": make(options, name, seed)}

    return report(resumed(options.output / f"{options.table}.jsonl", options.names or names, options.seeds, row))


def report(lines: Sequence[dict[str, Any]]) -> str:
    """Means with their 95 % intervals over the seeds."""
    names, columns = dict.fromkeys(line["name"] for line in lines), dict.fromkeys(c for x in lines for c in x["found"])
    cells = []
    for name in names:
        own = [line["found"] for line in lines if line["name"] == name]
        row = [name, str(len(own))]
        for column in columns:
            values = [found[column] for found in own if column in found]
            mean = statistics.fmean(values) if values else 0.0
            half = mean - mean_interval(values)[1] if len(values) > 1 else 0.0
            row.append(f"{mean:.4g}" + (f" ± {half:.2g}" if half else "") if values else "-")
        cells.append(row)
    return markdown(["", "seeds", *columns], cells)
