"""The transient state of one training step, and the log of what steps have spent."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from flops_lightning.distributed import mean_over_ranks
from flops_lightning.errors import SettingError
from flops_lightning.meter import QueryMeter
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.protocol import GradientObservation, Metric, TraceObservation
from flops_lightning.queries import CleanPass
from flops_lightning.strategies.base import ForwardGradientStrategy
from flops_lightning.strategies.query_strategy import QueryStrategy
from flops_lightning.strategies.sites import Site
from flops_lightning.transfers import on_host


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
    inclusion: Tensor | None = None  # (s, b) probabilities with which the allocator gave samples queries
    watched: Metric | None = None  # in which the step's gradient is to be measured
    observation: TraceObservation | None = None  # traces that the step's queries showed
    gradient: GradientObservation | None = None  # what its gradient showed

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

    def observe_gradient(self, new: GradientObservation) -> None:
        """Add what the gradient of some sites showed."""
        before = self.gradient
        self.gradient = new if before is None else before.plus(new)


def measure_gradient(
    strategy: QueryStrategy[Any], clean: CleanPass, parameters: Mapping[str, nn.Parameter], sites: Sequence[str],
    weights: Mapping[str, Tensor] | None,
) -> GradientObservation:  # fmt: skip
    """Signal and noise of the ``.grad`` of some sites, which is that of all ranks.

    ``clean`` is this rank's clean pass at the present parameters, ``weights`` those of the squared derivatives in the
    metric (None: 1, as before the optimiser's first step).
    """
    gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
    weights = weights if weights and gradients.keys() <= weights.keys() else None
    weighted = {name: g * weights[name] if weights else g for name, g in gradients.items()}

    def sq_norm(site: Site) -> Tensor:
        parts = [(gradients[n] * weighted[n]).sum().double() for n in site.parameters if n in gradients]
        return torch.stack(parts).sum() if parts and site.name in sites else clean.loss.new_zeros(()).double()

    owned = {n for s in (*strategy.sites, *strategy.exact_sites) if s.name in sites for n in s.parameters}
    along = strategy.derivative_along(clean, {name: d for name, d in weighted.items() if name in owned})
    along = mean_over_ranks(strategy.communicator, along, clean.batch_size)
    squares = torch.stack([sq_norm(site) for site in strategy.sites])
    exact = sum((sq_norm(site) for site in strategy.exact_sites), torch.zeros_like(squares[0]))
    numbers = torch.cat([squares, exact[None], along.to(squares)[None]]).cpu()
    return GradientObservation(float(numbers[-1]), numbers[:-2], float(numbers[-2]))


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
            _log_sums(module, {"per_second": (queries - spent) / max(now - before, 1e-9)}, prog_bar=shows_bar(module))
        self._last_step = (now, queries)

    def epoch(self, module: pl.LightningModule, meter: QueryMeter, sites: Sequence[str]) -> None:
        """Log the queries of each site."""
        _log_sums(module, {name: meter.sites[name].queries for name in sites})


def shows_bar(module: pl.LightningModule) -> bool:
    """Whether there is a progress bar: what it would show becomes a number after every batch, and waits for it."""
    return module.trainer.progress_bar_callback is not None


def _log_sums(module: pl.LightningModule, values: Mapping[str, float], **settings: Any) -> None:
    named: dict[str, Any] = {f"queries/{name}": float(value) for name, value in values.items()}
    several = module.trainer.world_size > 1
    module.log_dict(named if several else on_host(named), sync_dist=several, reduce_fx="sum", **settings)
