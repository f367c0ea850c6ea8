"""Tables of the studies: Markdown to read, CSV to go on with."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return tabulate(list(rows), headers=list(columns), tablefmt="github", disable_numparse=True) + "\n"


def spread(values: Sequence[float], middle: Callable[[Sequence[float]], float] = statistics.fmean) -> str:
    """Shares between 0 and 1 as ``mean (min - max)`` in percent."""
    return f"{middle(values):.1%} ({min(values):.1%} - {max(values):.1%})"


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, append: bool = False) -> None:
    """Write rows below a header, or append them to a table that has one."""
    header = not (append and path.exists())
    with path.open("a" if append else "w", newline="") as file:
        writer = csv.writer(file)
        if header:
            writer.writerow(columns)
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a table; none if there is no file."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
