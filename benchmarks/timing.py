"""Times taken side by side, and ratios of them with their spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from flops_lightning.errors import SettingError


@dataclass(frozen=True)
class Ratio:
    """Median and quartiles of a quantity over the rounds.

    Attributes:
        median: The median.
        low: The lower quartile.
        high: The upper quartile.
    """

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timings:
    """What :func:`alternate` measured.

    Attributes:
        seconds: By contender, the seconds of each round.
    """

    seconds: dict[str, tuple[float, ...]]

    def speed_ratio(self, other: str, ours: str) -> Ratio:
        """Time of ``other`` over time of ``ours``: above 1, ours is faster.

        The ratio is taken within each round, where both met the same state of the machine, and only then the median.
        """
        return _summary(self._array(other) / self._array(ours))

    def excess_fraction(self, whole: str, part: str) -> Ratio:
        """Share of the time of ``whole`` that is not explained by the time of ``part``."""
        return _summary(1 - self._array(part) / self._array(whole))

    def _array(self, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return np.asarray(self.seconds[name], dtype=np.float64)


def waiting_for(device: torch.device) -> Callable[[], object]:
    """What waits until a device has done its work: nothing on a CPU, which is done when a call returns."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def alternate(
    contenders: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    synchronize: Callable[[], object] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Timings:
    """Run all contenders once in each round and time each run.

    The first to run moves on by one from round to round, so that none always follows the same neighbour. One round
    beforehand is not timed: it warms caches and allocators.

    Args:
        contenders: What to time, by name.
        rounds: Timed rounds.
        synchronize: Waits for the device; called before every look at the clock.
        clock: Seconds.

    Raises:
        SettingError: fewer than one round.
    """
    if rounds < 1:
        raise SettingError("rounds", rounds, "leaves nothing to take a median of.", "Write 1 or more, for example 5.")
    for run in contenders.values():
        run()
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            synchronize()
            start = clock()
            contenders[name]()
            synchronize()
            seconds[name].append(clock() - start)
    return Timings({name: tuple(taken) for name, taken in seconds.items()})


def _summary(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Ratio:
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75))
    return Ratio(float(median), float(low), float(high))
