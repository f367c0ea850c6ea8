"""The transient state of one training step, and the log of what steps have spent."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.meter import QueryMeter
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.protocol import TraceObservation
from flops_lightning.queries import CleanPass
from flops_lightning.strategies.base import ForwardGradientStrategy


class Unstaged:
    """The network of a task before ``stage`` was called."""

    def __get__(self, task: Any, kind: Any) -> StagedNetwork:
        """Refuse to give one."""
        raise SettingError(
            "network", None, "the task has not staged its network.",
            "Call self.stage(network, example) in its __init__.",
        )  # fmt: skip


@dataclass
class StepState:
    """What is known of the batch at hand; every training step starts a new one."""

    batch: Any = None  # of the clean pass
    clean: CleanPass | None = None
    counts: Tensor | None = None  # (s, b) queries that an allocator chose
    pilot_weights: Tensor | None = None  # (s, b), of reused pilots
    observation: TraceObservation | None = None  # traces that the step's queries showed

    def run_clean_pass(self, strategy: ForwardGradientStrategy, batch: Any, inputs: Any, targets: Any) -> None:
        """Run the clean pass of a batch; the log names a number of rows that the strategy chose by itself."""
        rows = getattr(strategy, "chunk_rows", None)
        self.batch, self.clean = batch, strategy.clean_pass(inputs, targets)
        resolved = getattr(strategy, "chunk_rows", None)
        if resolved != rows:
            rank_zero_info(f"model.strategy.chunk_rows: auto is {resolved} here")

    def observe(self, new: TraceObservation | None) -> None:
        """Add the traces of one estimate; where sites are updated one by one, each fills its own lines."""
        before = self.observation
        self.observation = new if before is None or new is None else before.joined(new)


class QueryLog:
    """Logs ``queries/...`` from the meter of a module's strategy, as sums over all processes: all must log at once."""

    def __init__(self) -> None:
        self._last_step: tuple[float, int] | None = None

    def batch(self, module: pl.LightningModule, meter: QueryMeter) -> None:
        """Log totals."""
        total = meter.total()
        counts = {"total": total.queries, "lost": total.lost, "forward_equivalents": total.forward_equivalents}
        _log_sums(module, counts)

    def step(self, module: pl.LightningModule, meter: QueryMeter) -> None:
        """Log queries per second since the step before."""
        now, queries = time.monotonic(), meter.total().queries
        if self._last_step is not None:
            before, spent = self._last_step
            _log_sums(module, {"per_second": (queries - spent) / max(now - before, 1e-9)}, prog_bar=True)
        self._last_step = (now, queries)

    def epoch(self, module: pl.LightningModule, meter: QueryMeter, sites: Sequence[str]) -> None:
        """Log the queries of each site."""
        _log_sums(module, {name: meter.sites[name].queries for name in sites})


def _log_sums(module: pl.LightningModule, values: Mapping[str, float], **settings: Any) -> None:
    named = {f"queries/{name}": float(value) for name, value in values.items()}
    module.log_dict(named, sync_dist=module.trainer.world_size > 1, reduce_fx="sum", **settings)
