"""How the objects that a module may hold are put back in place, by class."""

import random
import sys
from argparse import Namespace
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import cache, partial
from io import IOBase
from itertools import tee
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

FOLLOWED = 1000
"""Entries up to which those of a container are held still too; of longer ones, which entries there are."""

NOT_FOLLOWED = (
    *(type, FunctionType, MethodType, ModuleType, Enum, IOBase),
    *(Dataset, DataLoader, Sampler, pl.Trainer, pl.Callback, pl.LightningDataModule, Logger),
)
"""Objects that a step only reads, or that are no part of its module."""

PutBack = Callable[[], object]
Held = tuple[list[PutBack], Iterable[Any]]
"""What puts an object back, and what else to hold still: its entries."""


class Copied:
    """A tensor's memory and numbers, should the step resize it or give it other memory."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._memory = tensor, tensor.detach()
        self._strided = tensor.layout is torch.strided and not tensor.is_nested
        self._numbers = self._once(self._memory).clone()

    def _once(self, memory: Tensor) -> Tensor:
        """Each number once: an expanded tensor cannot be written to."""
        if self._strided and 0 in memory.stride():
            return memory[tuple(slice(None) if step else slice(1) for step in memory.stride())]
        return memory

    def __call__(self) -> None:
        """Put them back."""
        tensor, memory = self._tensor, self._memory
        if self._strided and (
            tensor.data_ptr() != memory.data_ptr() or tensor.shape != memory.shape or tensor.stride() != memory.stride()
        ):
            tensor.data = memory.detach()
        self._once(memory).copy_(self._numbers)


class Contents:
    """Entries of a container, or attributes; iterators among them go on from here each time."""

    def __init__(self, value: Any, iterators: Iterable[Any] = ()) -> None:
        self._value, self._iterators = value, iterators
        self._saved = (dict if isinstance(value, dict) else list)(value)
        self._go_on()

    def _go_on(self) -> None:
        for place in self._iterators:
            self._value[place], self._saved[place] = tee(self._saved[place])

    def __call__(self) -> None:
        """Put them back."""
        value, saved = self._value, self._saved
        if isinstance(value, (list, bytearray)):
            value[:] = saved
        else:
            value.clear()
            (value.extend if isinstance(value, deque) else value.update)(saved)
        self._go_on()


@cache
def rule_for(kind: type) -> Callable[[Any], Held] | None:
    """How to hold objects of a class still; None: nothing of them can change, or they are left alone."""
    for each, rule in RULES:
        if issubclass(kind, each):
            return rule
    return _object if _is_own(kind) else None


@cache
def _is_own(kind: type) -> bool:
    """Whether the class is the user's, and not one of an installed package."""
    if issubclass(kind, (SimpleNamespace, Namespace)):
        return True
    path = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    standard = kind.__module__.partition(".")[0] in sys.stdlib_module_names
    return not standard and "-packages" not in path and not issubclass(kind, NOT_FOLLOWED)


@cache
def _goes_on(kind: type) -> bool:
    return issubclass(kind, Iterator) and not issubclass(kind, IOBase) and not _is_own(kind)


def tensor_copy(value: Tensor) -> Held:
    """Memory and numbers."""
    return ([] if value.is_inference() else [Copied(value)]), ()  # no step writes to a tensor of inference mode


def _array(value: np.ndarray) -> Held:
    entries = value.flat if value.dtype.hasobject and value.size <= FOLLOWED else ()
    return ([partial(np.copyto, value, value.copy())] if value.flags.writeable else []), entries


def contents(value: dict[Any, Any]) -> Held:
    """Entries of a dictionary."""
    entries, iterators = _entries(value.items()) if len(value) <= FOLLOWED else ([], [])
    return [Contents(value, iterators)], entries


def listing(value: Any) -> Held:
    """Entries of a list, a set or a queue."""
    entries, iterators = _entries(enumerate(value)) if len(value) <= FOLLOWED else ([], [])
    return [Contents(value, iterators if isinstance(value, list) else ())], entries


def constant_listing(value: tuple[Any, ...]) -> Held:
    """The entries of a tuple may change, but not which they are."""
    return [], value if len(value) <= FOLLOWED else ()


def _module(value: nn.Module) -> Held:
    attributes = vars(value)
    # What queries put in the place of parameters stays.
    inside = ((name, each) for name, each in attributes.items() if name not in ("_parameters", "_modules"))
    entries, iterators = _entries(inside)
    registered = (value.parameters(recurse=False), value.buffers(recurse=False), value.children())
    return [Contents(attributes, iterators)], [*entries, *(each for part in registered for each in part)]


def _object(value: Any) -> Held:
    """Attributes of an object of the user's own classes."""
    put_back: list[PutBack] = []
    names = {name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())} - {"__dict__"}
    entries: list[Any] = []
    for name in names:
        if hasattr(value, name):
            entries.append(getattr(value, name))
            put_back.append(partial(object.__setattr__, value, name, entries[-1]))
    if hasattr(value, "__dict__"):
        inside, iterators = _entries(vars(value).items())
        return [*put_back, Contents(vars(value), iterators)], [*entries, *inside]
    return put_back, entries


def _entries(named: Iterable[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    """What to hold still among entries, and the places of iterators."""
    entries, iterators = [], []
    for place, each in named:
        kind: Any = type(each)
        if _goes_on(kind):
            iterators.append(place)
        elif rule_for(kind) is not None:
            entries.append(each)
    return entries, iterators


RULES: tuple[tuple[Any, Callable[[Any], Held] | None], ...] = (
    ((bool, int, float, str, bytes, np.memmap, random.SystemRandom), None),
    (Tensor, tensor_copy),
    (nn.Module, _module),
    (np.ndarray, _array),
    (dict, contents),
    ((list, set, deque, bytearray), listing),
    (tuple, constant_listing),
    (torch.Generator, lambda value: ([partial(value.set_state, value.get_state())], ())),
    (random.Random, lambda value: ([partial(value.setstate, value.getstate())], ())),
    (np.random.RandomState, lambda value: ([partial(value.set_state, value.get_state())], ())),
    (np.random.BitGenerator, lambda value: ([partial(setattr, value, "state", value.state)], ())),
    (np.random.Generator, lambda value: ([], (value.bit_generator,))),
)
