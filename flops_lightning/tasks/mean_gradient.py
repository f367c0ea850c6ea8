"""The gradient of one optimiser step: the mean over the samples of several batches and of all ranks."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flops_lightning.distributed import Communicator, reduce_gradients
from flops_lightning.strategies.base import ForwardGradientStrategy

Parameters = Mapping[str, nn.Parameter]


class MeanGradient:
    """Accumulates ``.grad`` over the ``batches`` of a step, each weighted by its samples, then over ranks."""

    def __init__(self, batches: int) -> None:
        self.batches = batches
        self.saved: Mapping[str, Any] = {}  # to be restored once training starts
        self._done = 0
        self._samples = 0

    @property
    def empty(self) -> bool:
        """Whether no batch waits for its step."""
        return not self._done

    @contextmanager
    def adding(
        self, strategy: ForwardGradientStrategy, parameters: Iterable[nn.Parameter], *, samples: int
    ) -> Iterator[None]:
        """Inside, the mean gradient of one more batch of this rank's ``samples`` is added to ``.grad``."""
        given = list(parameters)
        if strategy.exchange == "losses" and self.batches > 1:  # the gradient is that of the samples of all ranks
            samples = int(strategy.communicator.sum(torch.tensor([samples], device=given[0].device)))
        if self.empty:
            for p in given:
                p.grad = None
        else:
            _scale(given, self._samples / samples)
        yield
        self._samples += samples
        self._done += 1
        if self._done > 1:
            _scale(given, samples / self._samples)

    def complete(self, *, last: bool) -> bool:
        """Whether it is time for the step; ``last``: no further batch comes in this epoch."""
        return last or self._done >= self.batches

    def reduce(self, strategy: ForwardGradientStrategy, parameters: Parameters, sites: Sequence[str]) -> bool:
        """Average the gradients of the sites' parameters (no sites: of all) over the ranks, and start anew.

        Returns:
            Whether any rank has a gradient, on which all agree.
        """
        named = [site for site in (*strategy.sites, *strategy.exact_sites) if site.name in sites]
        owned = {name for site in named for name in site.parameters} if named else parameters.keys()
        reduced = [p for name, p in parameters.items() if name in owned]  # in the same order on every rank
        weight, self._samples, self._done = self._samples, 0, 0
        if strategy.exchange == "losses":
            return any(p.grad is not None for p in reduced)
        return reduce_gradients(strategy.communicator, reduced, weight=weight)

    def state_dict(self, strategy: ForwardGradientStrategy, parameters: Parameters) -> dict[str, Any]:
        """What waits for its step, for a checkpoint in the middle of one; every rank must ask.

        Of several ranks it is their mean, so that a resumed run equals the uninterrupted one up to the rounding of a
        sum in another order; in one process it is exact.
        """
        if self.empty:
            return {}
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        samples, ranks = self._samples, strategy.communicator
        if strategy.exchange == "gradients" and ranks.size > 1:
            samples = int(ranks.sum(torch.tensor([self._samples], device=next(iter(parameters.values())).device)))
            gradients = {name: _mean(ranks, p, self._samples, samples) for name, p in parameters.items()}
        return {"batches": self._done, "samples": samples, "gradients": gradients}

    def restore(self, strategy: ForwardGradientStrategy, parameters: Parameters) -> None:
        """Restore the ``saved`` state, if any; where ranks sum their gradients, the first rank gets it all."""
        saved, self.saved = self.saved, {}
        if not saved:
            return
        self._done = saved["batches"]
        if strategy.exchange == "losses" or strategy.communicator.rank == 0:
            self._samples = saved["samples"]
            for name, gradient in saved["gradients"].items():
                parameters[name].grad = gradient.to(parameters[name], copy=True)


def _mean(ranks: Communicator, parameter: nn.Parameter, own: int, samples: int) -> Tensor:
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    return ranks.sum(gradient * (own / samples))


@torch.no_grad()
def _scale(parameters: Iterable[nn.Parameter], factor: float) -> None:
    for p in parameters:
        if p.grad is not None and factor != 1:
            p.grad.mul_(factor)
