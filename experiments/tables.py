"""Tables of the studies, Markdown to read and CSV to go on with, and intervals (Student's t, two-sided, 95 %)."""

import csv
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t
from tabulate import tabulate


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return tabulate(list(rows), headers=list(columns), tablefmt="github", disable_numparse=True) + "\n"


def write_report(path: Path, text: str) -> None:
    path.write_text(text)
    print(f"\n{text}\nwritten to {path.parent}")


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, append: bool = False) -> None:
    """Write rows below a header, or append them to a table that has one."""
    header = not (append and path.exists())
    with path.open("a" if append else "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows] if header else rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a table; none if there is no file."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def spread(values: Sequence[float], middle: Callable[[Sequence[float]], float] = statistics.fmean) -> str:
    """Shares between 0 and 1 as ``mean (min - max)`` in percent."""
    return f"{middle(values):.1%} ({min(values):.1%} - {max(values):.1%})"


def mean_deviation(shares: Sequence[float], expected: int) -> str:
    """Mean and standard deviation of shares in percent; how many there are where others are ``expected``."""
    done = [100 * share for share in shares]
    deviation = f" ± {statistics.stdev(done):.1f}" if len(done) > 1 else ""
    missing = f" ({len(done)} of {expected} seeds)" if len(done) < expected else ""
    return f"{statistics.fmean(done):.1f}{deviation}{missing}" if done else "-"


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the bounds of its confidence interval; NaN bounds for a single value."""
    mean, number, half = statistics.fmean(values), len(values), math.nan
    if number > 1:
        half = float(t.ppf(0.975, number - 1)) * statistics.stdev(values) / math.sqrt(number)
    return mean, mean - half, mean + half


def mean_and_half(values: Sequence[float]) -> str:
    """The mean and half of its 95 % interval, where there is one; empty without values."""
    if not values:
        return ""
    mean, low, _ = mean_interval(values)
    return f"{mean:.3f}" + ("" if math.isnan(low) else f" ± {mean - low:.3f}")


def geometric_interval(values: Iterable[float]) -> tuple[float, float, float]:
    """Geometric mean and the bounds of its confidence interval, from the logarithms."""
    mean, low, high = map(math.exp, mean_interval([math.log(value) for value in values]))
    return mean, low, high


def paired_ratio(own: Sequence[float], base: Sequence[float], note: str = "") -> str:
    """Geometric mean of the ratios, pair by pair, as ``mean (low - high)``."""
    mean, low, high = geometric_interval(a / b for a, b in zip(own, base, strict=True))
    return f"{mean:.2f} ({low:.2f} - {high:.2f}{note})"


def paired_difference(own: Sequence[float], base: Sequence[float]) -> str:
    """Mean of the differences of shares, pair by pair, in points, as ``mean (low to high)``."""
    mean, low, high = mean_interval([100 * (a - b) for a, b in zip(own, base, strict=True)])
    return f"{mean:+.1f}" if math.isnan(low) else f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
