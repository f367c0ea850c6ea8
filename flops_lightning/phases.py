"""Names for the parts of a step: ranges in the traces of torch's profiler, and seconds for those who ask.

``with phase("noise"):`` marks a part of the work. Under ``torch.profiler`` (Lightning's ``PyTorchProfiler``) it appears
as ``flops_lightning/noise``; :func:`timed_phases` adds up its seconds. Nobody asking, it costs microseconds.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch.profiler import record_function

Phase = Literal["clean pass", "pilots", "allocation", "noise", "suffix", "accumulation", "local VJP", "optimiser"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""In the order of a step. ``noise`` draws and adds it, ``suffix`` runs the network from a site to the losses,
``accumulation`` sums over queries, ``local VJP`` takes sums at a site's output to its parameters."""


@dataclass
class PhaseClock:
    """Seconds of each phase, by its name; a phase inside another counts for itself alone, but all of a pilot is pilot.

    Attributes:
        seconds: What was measured so far.
        synchronize: Waits for the device; called before every look at the clock.
        clock: Seconds.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    synchronize: Callable[[], object] = lambda: None
    clock: Callable[[], float] = time.perf_counter
    _open: list[str] = field(default_factory=list)
    _since: float = 0.0

    def enter(self, name: Phase) -> None:
        """Begin a phase."""
        self._charge()
        self._open.append("pilots" if "pilots" in self._open else name)

    def leave(self) -> None:
        """End the phase that began last."""
        self._charge()
        self._open.pop()

    def _charge(self) -> None:
        self.synchronize()
        now = self.clock()
        if self._open:
            self.seconds[self._open[-1]] = self.seconds.get(self._open[-1], 0.0) + now - self._since
        self._since = now


_clocks: list[PhaseClock] = []


@contextmanager
def phase(name: Phase) -> Iterator[None]:
    """Mark what happens in the context as part of a phase."""
    with record_function(f"flops_lightning/{name}"):
        asked = list(_clocks)
        for each in asked:
            each.enter(name)
        try:
            yield
        finally:
            for each in asked:
                each.leave()


@contextmanager
def timed_phases(
    synchronize: Callable[[], object] = lambda: None, *, clock: PhaseClock | None = None
) -> Iterator[dict[str, float]]:
    """Seconds of each phase while the context lasts, by its name; those of a phase that did not occur are missing.

    ``synchronize`` waits for the device, as ``torch.cuda.synchronize``; without it a device's work is charged to
    whoever waits for it. ``clock`` measures in its place.
    """
    clock = clock or PhaseClock(synchronize=synchronize)
    _clocks.append(clock)
    try:
        yield clock.seconds
    finally:
        _clocks.remove(clock)
