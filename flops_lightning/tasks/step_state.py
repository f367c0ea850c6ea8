"""The transient state of one training step."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from flops_lightning.protocol import TraceObservation
from flops_lightning.queries import CleanPass
from flops_lightning.strategies.base import ForwardGradientStrategy


@dataclass
class StepState:
    """What is known of the batch at hand; every training step starts a new one."""

    inputs: Tensor | None = None  # of the clean pass
    clean: CleanPass | None = None
    counts: Tensor | None = None  # (s, b) queries that an allocator chose
    pilot_weights: Tensor | None = None  # (s, b), of reused pilots
    observation: TraceObservation | None = None  # traces that the step's queries showed

    def clean_pass_of(self, strategy: ForwardGradientStrategy, inputs: Tensor, targets: Tensor) -> CleanPass:
        """The clean pass of a batch, run once; the log names a number of rows that the strategy chose by itself."""
        if self.clean is None or self.inputs is not inputs:
            rows = getattr(strategy, "chunk_rows", None)
            self.inputs, self.clean = inputs, strategy.clean_pass(inputs, targets)
            resolved = getattr(strategy, "chunk_rows", None)
            if resolved != rows:
                rank_zero_info(f"model.strategy.chunk_rows: auto is {resolved} here")
        return self.clean

    def observe(self, new: TraceObservation | None) -> None:
        """Add the traces of one estimate; where sites are updated one by one, each fills its own lines."""
        before = self.observation
        self.observation = new if before is None or new is None else before.joined(new)
