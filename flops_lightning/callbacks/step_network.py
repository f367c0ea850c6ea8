"""A ``training_step`` as the network of a strategy: one row, whose output is the loss of the batch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from flops_lightning.network.staging import Stage, StagedNetwork


class Step(nn.Module):
    """Calls the step, with whatever its module holds in the place of parameters."""

    def __init__(self, module: pl.LightningModule, loss: Callable[[], Tensor]) -> None:
        super().__init__()
        self.module, self._loss = module, loss

    def forward(self, rows: Tensor) -> Tensor:
        """``(r, 1)`` losses, all the same."""
        return self._loss().expand(len(rows), 1)


class StepNetwork(StagedNetwork):
    """A network of one stage that runs in the module's own mode: all samples of a batch share one loss."""

    module: Step
    trainer: pl.Trainer | None = None

    def __init__(self, step: Step) -> None:
        super().__init__(step, (Stage("network", step.forward, ("module",)),))

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters of the optimiser that require a gradient, by name."""
        required = super().trainable()
        if self.trainer is None or not self.trainer.optimizers:
            return required
        stepped = {id(p) for each in self.trainer.optimizers for group in each.param_groups for p in group["params"]}
        return {name: p for name, p in required.items() if id(p) in stepped}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Change nothing."""
        yield


def first_column(outputs: Tensor, _: Any) -> Tensor:
    """The losses, for a strategy that expects to compute them from outputs and targets."""
    return outputs[:, 0]
