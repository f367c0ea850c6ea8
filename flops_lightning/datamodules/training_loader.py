"""A loader that goes on where the training loop that reads it goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from flops_lightning.datamodules.global_batches import GlobalBatches


class TrainingLoader(StatefulDataLoader[tuple[Tensor, ...]]):  # type: ignore[misc]  # torchdata has no types
    """torchdata's loader, which waits for the first request before it decides where to begin.

    A Trainer saves its state with every checkpoint, but does not bring it back in every run: not where the length of
    the schedule was asked for first, and not at an epoch's end. Nor does it wait with the first request for batches, on
    which workers begin to load, until the sampler knows the epoch. Batch ``i`` of an epoch being a function of the
    seed, the epoch and ``i``, the Trainer's own count of batches says all that is needed; the number of workers and of
    processes may then be another than in the interrupted run.

    Attributes:
        batches_done: Asked on the first request of an iteration: how many batches of the epoch are done already. None
            leaves that to torchdata: a loop of one's own tells the sampler the epoch and loads ``state_dict()``.
    """

    batches_done: Callable[[], int] | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Iterate over an epoch; nothing is loaded before the first batch is asked for."""
        if self.batches_done is not None and isinstance(self.sampler, GlobalBatches):
            if self.next_iter_state is not None:  # type: ignore[has-type]
                self.load_state_dict({})  # what a Trainer brought back, and what had begun before
                self.next_iter_state = None
            self.sampler.first_batch = self.batches_done()
        yield from super().__iter__()
