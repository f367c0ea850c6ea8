"""Confidence intervals over seeds and batches (Student's t, two-sided, 95 %)."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from scipy.stats import t


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the bounds of its confidence interval; NaN bounds for a single value."""
    mean, number, half = statistics.fmean(values), len(values), math.nan
    if number > 1:
        half = float(t.ppf(0.975, number - 1)) * statistics.stdev(values) / math.sqrt(number)
    return mean, mean - half, mean + half


def geometric_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean and the bounds of its confidence interval, from the logarithms."""
    mean, low, high = mean_interval([math.log(value) for value in values])
    return math.exp(mean), math.exp(low), math.exp(high)


def paired_ratio(own: Sequence[float], base: Sequence[float], note: str = "") -> str:
    """Geometric mean of the ratios, pair by pair, as ``mean (low - high)``."""
    mean, low, high = geometric_interval([a / b for a, b in zip(own, base, strict=True)])
    return f"{mean:.2f} ({low:.2f} - {high:.2f}{note})"


def paired_difference(own: Sequence[float], base: Sequence[float]) -> str:
    """Mean of the differences of shares, pair by pair, in points, as ``mean (low to high)``."""
    mean, low, high = mean_interval([100 * (a - b) for a, b in zip(own, base, strict=True)])
    return f"{mean:+.1f}" if math.isnan(low) else f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
