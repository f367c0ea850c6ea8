"""How long a run is and what a step of it costs; pure functions.

A step is the training step of one batch. Where gradients are accumulated, several of them make one step of the
optimiser.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

BLOCKS = 8
"""Blocks of steps over whose means the median is taken."""
FEWEST_BLOCKS = 3


@dataclass(frozen=True)
class Cost:
    """What a method spends on every sample and once at the start, and the time of a step.

    Attributes:
        queries: Queries per sample and step.
        forward_equivalents: Compute per sample and step.
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
        """The cost behind running totals, read at several moments; the first is the end of the first step.

        Args:
            curves: ``queries`` and ``forward_equivalents`` spent so far, at each moment.
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
    """Mean time of a step, robust against bursts of other processes: the median of the means of blocks of steps.

    Args:
        durations: Times of consecutive steps.
        period: Steps after which one does more, such as logging. Blocks are multiples of it where there are enough
            steps, so that each block has its share of the slower ones.
    """
    size = max(1, len(durations) // BLOCKS)
    whole = -(-size // period) * period
    size = whole if FEWEST_BLOCKS * whole <= len(durations) else size
    ends = range(size, len(durations) + 1, size)
    return statistics.median(statistics.fmean(durations[end - size : end]) for end in ends)


@dataclass(frozen=True)
class Epoch:
    """An epoch of one process; None where only the run itself tells.

    Attributes:
        samples: Samples trained on.
        batch_size: Samples in a batch; the last of an epoch may be smaller.
        steps: Batches.
    """

    samples: int | None
    batch_size: int
    steps: int | None

    @classmethod
    def of(
        cls,
        samples: int | None,
        batch_size: int,
        batches: float,
        *,
        processes: int = 1,
        drop_last: bool = False,
        limit: float = 1.0,
    ) -> Epoch:
        """The epoch of one of several processes.

        Args:
            samples: Size of the training set; None where it has no length.
            batch_size: Samples in a batch of one process.
            batches: Batches of one process that has the whole training set, limited; infinite if unknown.
            processes: Processes that share the samples.
            drop_last: Whether a last, smaller batch is left out.
            limit: ``limit_train_batches``: a number of batches, or a share of them.
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
        """Steps of a run; None if no limit ends it.

        Args:
            max_epochs: Epochs; -1 for no limit.
            max_steps: Steps of the optimiser; -1 for no limit.
            accumulate: Batches in one of those; the last of an epoch may have fewer.
        """
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

        Args:
            steps: Steps of the whole run.
            every_epochs: ``check_val_every_n_epoch``; None counts batches across epochs.
            interval: ``val_check_interval``: a number of batches, or a share of an epoch; None for one by the clock.
        """
        if interval is None or (self.steps is None and every_epochs not in (None, 1)):
            return None
        if every_epochs is None or self.steps is None:
            return steps // interval if isinstance(interval, int) else 0  # an epoch without end
        batches = interval if isinstance(interval, int) else max(1, int(self.steps * interval))
        whole, rest = divmod(steps, self.steps)
        last = rest // batches if (whole + 1) % every_epochs == 0 else 0
        return whole // every_epochs * (self.steps // batches) + last
