"""What a run has spent, logged as sums over all processes; every process must therefore log at the same time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from flops_lightning.meter import QueryMeter


class QueryLog:
    """Logs ``queries/...`` from the meter of a module's strategy."""

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
