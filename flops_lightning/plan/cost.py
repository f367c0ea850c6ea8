"""How long a run is and what a step (the training step of one batch) of it costs; pure functions."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BLOCKS, FEWEST_BLOCKS = 8, 3
"""Blocks of steps over whose means the median is taken."""


@dataclass(frozen=True)
class Cost:
    """What a method spends per sample and step and, ``_once``, in the first step beyond any other; times of steps."""

    queries: float
    forward_equivalents: float
    queries_once: float
    forward_equivalents_once: float
    seconds: float
    seconds_once: float  # time of the first step

    @classmethod
    def of(cls, curves: Mapping[str, Sequence[float]], samples: Sequence[float], **seconds: float) -> "Cost":
        """The cost behind ``curves`` of ``queries`` and ``forward_equivalents`` spent until the ends of some steps.

        The first of those is the end of the first step; ``samples`` were trained on since the moment before.
        """
        later = sum(samples[1:])
        if later:
            each = {name: (curve[-1] - curve[0]) / later for name, curve in curves.items()}
        else:  # a run of a single step
            each = {name: curve[0] / samples[0] for name, curve in curves.items()}
        once = {f"{name}_once": max(0.0, curves[name][0] - value * samples[0]) for name, value in each.items()}
        return cls(**each, **once, **seconds)


def typical_seconds(durations: Sequence[float], *, period: int = 1) -> float:
    """Mean time of a step, robust against bursts of other processes: the median of the means of blocks of steps.

    Every ``period`` steps one does more, such as logging; blocks are multiples of it where there are enough steps.
    """
    size = max(1, len(durations) // BLOCKS)
    whole = -(-size // period) * period
    size = whole if FEWEST_BLOCKS * whole <= len(durations) else size
    ends = range(size, len(durations) + 1, size)
    return statistics.median(statistics.fmean(durations[end - size : end]) for end in ends)


@dataclass(frozen=True)
class Epoch:
    """Samples and steps in an epoch of one process; None where only the run itself tells."""

    samples: int | None
    batch_size: int  # the last batch of an epoch may be smaller
    steps: int | None

    @classmethod
    def of(
        cls, samples: int | None, batch_size: int, batches: float, *,
        processes: int = 1, drop_last: bool = False, limit: float = 1.0,
    ) -> "Epoch":  # fmt: skip
        """The epoch of one of several processes.

        ``samples`` is the size of the training set, None where it has no length; ``batches`` are those of one process
        that has all of it, within ``limit`` (``limit_train_batches``), infinite if unknown.
        """
        if processes > 1 and samples is not None:
            whole, rest = divmod(samples, batch_size * processes)
            # A last batch with fewer samples than processes is dropped.
            batches = whole + (rest >= processes and not drop_last)
            samples = math.ceil(samples / processes)
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        steps = int(batches) if math.isfinite(batches) else None
        if samples is not None and steps is not None:
            samples = min(samples, steps * batch_size)
        return cls(samples, batch_size, steps)

    def steps_until(self, *, max_epochs: int, max_steps: int, accumulate: int = 1) -> int | None:
        """Steps of a run; None if no limit ends it (-1). ``accumulate`` of them make one of the ``max_steps``."""
        limits = []
        if self.steps is not None and max_epochs != -1:
            limits.append(self.steps * max_epochs)
        if max_steps != -1 and self.steps:
            whole, rest = divmod(max_steps, math.ceil(self.steps / accumulate))
            limits.append(whole * self.steps + rest * accumulate)
        elif max_steps != -1:
            limits.append(max_steps * accumulate)
        return min(limits, default=None)

    def samples_of(self, steps: int) -> int:
        """Samples in that many steps, repetitions included."""
        if not self.steps or self.samples is None:
            return steps * self.batch_size
        whole, rest = divmod(steps, self.steps)
        return whole * self.samples + rest * self.batch_size

    def validations(self, steps: int, *, every_epochs: int | None, interval: float | None) -> int | None:
        """Number of validations in a run of that many steps; None if unknown.

        ``every_epochs`` is Lightning's ``check_val_every_n_epoch``, ``interval`` its ``val_check_interval`` or, for one
        by the clock, None.
        """
        if interval is None or (self.steps is None and every_epochs not in (None, 1)):
            return None
        if every_epochs is None or self.steps is None:
            return steps // interval if isinstance(interval, int) else 0  # an epoch without end
        batches = interval if isinstance(interval, int) else max(1, int(self.steps * interval))
        whole, rest = divmod(steps, self.steps)
        last = rest // batches if (whole + 1) % every_epochs == 0 else 0
        return whole // every_epochs * (self.steps // batches) + last
