"""Small matrices on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch's CPU operations on the calling thread alone, and restore the number of threads afterwards.

    An allocation is hundreds of operations on matrices the size of a batch. Shared between threads they gain nothing
    where cores are free, and where data loading keeps the cores busy they wait for each other: measured on two cores,
    1.3 s instead of 17 ms for a batch of 128.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
