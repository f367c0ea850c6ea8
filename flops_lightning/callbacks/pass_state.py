"""What a pass through a module changes beside its result, to be put back before and after a query."""

import random
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn


class PassState:
    """Random numbers, buffers, metrics and Python attributes of a module at one moment; parameters are not copied.

    Dropout, mixup, running statistics, counters, lists that a ``training_step`` appends to: a query starts where the
    pass that it repeats started, and leaves no trace.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> state = PassState(norm)
        >>> drawn = norm(torch.randn(4, 2))
        >>> state.restore()
        >>> norm.running_mean
        tensor([0., 0.])
        >>> torch.equal(drawn, norm(torch.randn(4, 2)))
        True
    """

    def __init__(self, module: nn.Module) -> None:
        """Copy what a pass may change."""
        parameter = next(module.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        self._random = list(_random_states(device))
        self._attributes = [(vars(each), dict(vars(each))) for each in module.modules()]
        self._contents: list[Callable[[], object]] = []
        seen: set[int] = set()
        for _, attributes in self._attributes:
            for name, value in attributes.items():
                if name not in ("_parameters", "_modules") and id(value) not in seen:
                    seen.add(id(value))
                    self._keep(value)

    def _keep(self, value: Any) -> None:
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter) and not value.is_inference():  # the latter are never written to
                self._contents.append(_Copied(value))
        elif isinstance(value, (dict, list, set, deque)):
            self._contents.append(_Contents(value))
            if isinstance(value, dict):  # such as buffers; lists of results are only ever added to
                for each in value.values():
                    if isinstance(each, Tensor):
                        self._keep(each)
        elif isinstance(value, torch.Generator):
            self._contents.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, np.random.Generator):
            self._contents.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        elif isinstance(value, random.Random):
            self._contents.append(partial(value.setstate, value.getstate()))

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back in place: the same objects with the same contents."""
        for set_state, state in self._random:
            set_state(state)
        for live, saved in self._attributes:
            for name in live.keys() - saved.keys():
                del live[name]
            live.update(saved)
        for put_back in self._contents:
            put_back()


class _Copied:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._copy = tensor, tensor.detach().clone()

    def __call__(self) -> None:
        self._tensor.detach().copy_(self._copy)


class _Contents:
    def __init__(self, value: Any) -> None:
        self._value, self._saved = value, (dict if isinstance(value, dict) else list)(value)

    def __call__(self) -> None:
        if self._value or self._saved:
            self._value.clear()
            (self._value.extend if isinstance(self._value, (list, deque)) else self._value.update)(self._saved)


def _random_states(device: torch.device) -> Iterator[tuple[Callable[[Any], object], Any]]:
    """What sets the state of each generator that draws by default, and its state."""
    yield random.setstate, random.getstate()
    yield np.random.set_state, np.random.get_state()  # noqa: NPY002  (the global one, which modules use)
    yield torch.set_rng_state, torch.get_rng_state()
    if device.type != "cpu":
        accelerator = torch.get_device_module(device)
        yield accelerator.set_rng_state, accelerator.get_rng_state()


def copied(batch: Any) -> Any:
    """Containers and tensors of a batch that a ``training_step`` may change without a trace in the original."""
    return apply_to_collection(batch, Tensor, Tensor.clone, allow_frozen=True)


def silence(module: pl.LightningModule) -> None:
    """Let ``self.log`` and ``self.log_dict`` do nothing, until :meth:`PassState.restore`."""
    for each in module.modules():
        if isinstance(each, pl.LightningModule):
            vars(each).update(log=_nothing, log_dict=_nothing)


def _nothing(*_: Any, **__: Any) -> None:
    """Log nothing."""
