"""The gradient of one optimiser step: the mean over the samples of several batches and of all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flops_lightning.distributed import Communicator, reduce_gradients
from flops_lightning.strategies.base import ForwardGradientStrategy


class MeanGradient:
    """Gathers ``.grad`` over batches, each of which counts by its samples, then over ranks."""

    def __init__(self, batches: int) -> None:
        """Say how many batches make a step, 1 or more."""
        self.batches = batches
        self._gathered = 0
        self._samples = 0

    @property
    def empty(self) -> bool:
        """Whether no batch waits for its step."""
        return not self._gathered

    @contextmanager
    def adding(self, parameters: Iterable[nn.Parameter], samples: int) -> Iterator[None]:
        """Inside, the mean gradient of one more batch is added to ``.grad``.

        Args:
            parameters: All that may get one.
            samples: Of the batch, of this rank or of all.
        """
        given = list(parameters)
        if self.empty:
            for p in given:
                p.grad = None
        else:
            _scale(given, self._samples / samples)
        yield
        self._samples += samples
        self._gathered += 1
        if self._gathered > 1:
            _scale(given, samples / self._samples)

    def complete(self, *, last: bool) -> bool:
        """Whether it is time for the step; ``last``: no further batch comes in this epoch."""
        return last or self._gathered >= self.batches

    def reduce(self, strategy: ForwardGradientStrategy, parameters: Iterable[nn.Parameter]) -> bool:
        """Reduce over the ranks, and begin anew.

        Returns:
            Whether there is a gradient on any rank, on which all agree.
        """
        weight, self._samples, self._gathered = self._samples, 0, 0
        if strategy.exchange == "losses":
            return any(p.grad is not None for p in parameters)
        return reduce_gradients(strategy.communicator, parameters, weight=weight)

    def state_dict(self, strategy: ForwardGradientStrategy, parameters: Mapping[str, nn.Parameter]) -> dict[str, Any]:
        """What waits for its step, for a checkpoint in the middle of one; every rank must ask.

        Of several ranks it is the mean over them, so that a run that goes on equals the uninterrupted one up to the
        rounding of a sum in another order; in one process it is exact.
        """
        if self.empty:
            return {}
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        samples, ranks = self._samples, strategy.communicator
        if strategy.exchange == "gradients" and ranks.size > 1:
            samples = int(ranks.sum(torch.tensor([self._samples], device=next(iter(parameters.values())).device)))
            gradients = {name: _mean(ranks, p, self._samples, samples) for name, p in parameters.items()}
        return {"batches": self._gathered, "samples": samples, "gradients": gradients}

    def load_state_dict(
        self, state: Mapping[str, Any], strategy: ForwardGradientStrategy, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Restore what :meth:`state_dict` returned; where ranks sum their gradients, the first has it all."""
        if not state:
            return
        self._gathered = state["batches"]
        if strategy.exchange == "losses" or strategy.communicator.rank == 0:
            self._samples = state["samples"]
            for name, gradient in state["gradients"].items():
                p = parameters[name]
                p.grad = gradient.to(p, copy=True)


def _mean(ranks: Communicator, parameter: nn.Parameter, own: int, samples: int) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return ranks.sum(gradient * (own / samples))


@torch.no_grad()
def _scale(parameters: Iterable[nn.Parameter], factor: float) -> None:
    for p in parameters:
        if p.grad is not None and factor != 1:
            p.grad.mul_(factor)
