"""How long a run is, in samples, steps and validations; pure functions.

A step is the training step of one batch. Where gradients of several batches are accumulated, several of them make one
step of the optimiser.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Epoch:
    """An epoch of one process; None: nobody knows before it is over.

    Attributes:
        samples: Samples trained on.
        batch_size: Samples of a batch; the last of an epoch may be smaller.
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
            samples: In the training set, of all processes together; None where that has no length.
            batch_size: Samples of a batch.
            batches: Of an epoch of one process that has the whole training set, limited; infinite if unknown.
            processes: Processes that share the samples.
            drop_last: Whether a last, smaller batch is left out.
            limit: ``limit_train_batches``: a number of batches, or a share of them.
        """
        if processes > 1 and samples is not None:
            whole, rest = divmod(samples, batch_size * processes)
            # Of a last batch too small for all processes nobody gets anything.
            batches = whole + (rest >= processes and not drop_last)
            samples = math.ceil(samples / processes)
            batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        steps = int(batches) if math.isfinite(batches) else None
        if samples is not None and steps is not None:
            samples = min(samples, steps * batch_size)
        return cls(samples, batch_size, steps)

    def steps_until(self, *, max_epochs: int, max_steps: int, accumulate: int = 1) -> int | None:
        """Steps of a run; None where neither limit (-1: none) ends it.

        Args:
            max_epochs: Epochs.
            max_steps: Steps of the optimiser.
            accumulate: Batches that make one of those; at the end of an epoch fewer may.
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
        """Samples of so many steps, each as often as it is met."""
        if not self.steps or self.samples is None:
            return steps * self.batch_size
        whole, rest = divmod(steps, self.steps)
        return whole * self.samples + rest * self.batch_size

    def validations(self, steps: int, *, every_epochs: int | None, interval: float | None) -> int | None:
        """How often is validated in so many steps; None where nobody knows.

        Args:
            steps: Of the whole run.
            every_epochs: ``check_val_every_n_epoch``; None: batches are counted over epochs.
            interval: ``val_check_interval``: a number of batches, or a share of those of an epoch; None: by the clock.
        """
        if interval is None or (self.steps is None and every_epochs not in (None, 1)):
            return None
        if every_epochs is None or self.steps is None:
            return steps // interval if isinstance(interval, int) else 0  # an epoch without end
        batches = interval if isinstance(interval, int) else max(1, int(self.steps * interval))
        whole, rest = divmod(steps, self.steps)
        last = rest // batches if (whole + 1) % every_epochs == 0 else 0
        return whole // every_epochs * (self.steps // batches) + last
