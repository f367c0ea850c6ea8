"""What a step costs, read from a few of them; pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BLOCKS = 8
"""Blocks of steps whose means a median is taken of."""
FEWEST_BLOCKS = 3


@dataclass(frozen=True)
class Cost:
    """What a method spends: once at the start, then on every sample; and the time of a step.

    Attributes:
        queries: Queries of a sample and step.
        forward_equivalents: Compute of a sample and step.
        queries_once: Queries of the first step beyond those of any other.
        forward_equivalents_once: Compute of the first step beyond that of any other.
        seconds: Time of a step.
        seconds_once: Time of the first step.
    """

    queries: float
    forward_equivalents: float
    queries_once: float
    forward_equivalents_once: float
    seconds: float
    seconds_once: float

    @classmethod
    def of(
        cls, curves: Mapping[str, Sequence[float]], samples: Sequence[float], *, seconds: float, seconds_once: float
    ) -> Cost:
        """From what was spent up to some moments, the first of which is the end of the first step.

        Args:
            curves: ``queries`` and ``forward_equivalents`` so far, at each moment.
            samples: Samples trained on since the moment before.
            seconds: Time of a step.
            seconds_once: Time of the first step.
        """
        later = sum(samples[1:])
        if later:
            each = {name: (curve[-1] - curve[0]) / later for name, curve in curves.items()}
        else:  # a run of a single step
            each = {name: curve[0] / samples[0] for name, curve in curves.items()}
        once = {f"{name}_once": max(0.0, curves[name][0] - value * samples[0]) for name, value in each.items()}
        return cls(**each, **once, seconds=seconds, seconds_once=seconds_once)


def typical_seconds(durations: Sequence[float], *, period: int = 1) -> float:
    """Mean time of a step, robust against bursts of other processes: the median of means over blocks of steps.

    Args:
        durations: Of consecutive steps.
        period: Every so many steps one does more, such as logging: blocks are multiples of it where there are enough
            steps, so that each block holds its share of them.
    """
    size = max(1, len(durations) // BLOCKS)
    whole = -(-size // period) * period
    size = whole if FEWEST_BLOCKS * whole <= len(durations) else size
    ends = range(size, len(durations) + 1, size)
    return statistics.median(statistics.fmean(durations[end - size : end]) for end in ends)
