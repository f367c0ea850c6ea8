"""Rows of a study as lines of a JSON file: those that are there are not made again."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


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
