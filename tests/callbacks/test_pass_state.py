"""Queries start from the state that their pass started from, and leave no trace, whatever a module holds."""

import itertools
import random
import re
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flops_lightning.callbacks.held import FOLLOWED
from flops_lightning.callbacks.pass_state import FEW, PassState
from flops_lightning.errors import SettingError

Step = Callable[[Any], Any]


class Meter:
    """As in many training scripts."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.left = iter(range(100))

    def update(self) -> list[float]:
        self.values.append(next(self.left))
        return list(self.values)


@dataclass
class Slotted:
    __slots__ = ("count",)
    count: int


class Endless:
    """An iterator with a state of its own."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self.place += 1
        return self.place


def seen(module: Any, steps: list[Step], *, queries: bool) -> list[Any]:
    """What four steps return; with queries each runs three times more in between."""
    found = []
    for step in steps:
        before = PassState(module)
        found.append(step(module))
        if queries:
            after = PassState(module)
            for _ in range(3):
                before.restore()
                assert step(module) == found[-1]
            after.restore()
    return found


def holding(value: Any) -> nn.Module:
    module = nn.Linear(2, 2)
    module.held = value
    return module


def append(entries: Any, value: Any = 1) -> int:
    entries.append(value)
    return len(entries)


def add(tensor: Any) -> float:
    tensor += 1
    return float(tensor.sum())


def again(module: Any) -> int:
    """Restart a loader that has ended, as semi-supervised training does."""
    try:
        return next(module.held)
    except StopIteration:
        module.held = iter(torch.utils.data.DataLoader([5, 6, 7], batch_size=None, shuffle=True))
        return next(module.held)


def count(held: Any) -> int:
    held.count += 1
    return held.count


def norm(module: nn.Module) -> float:
    module(torch.ones(4, 2))
    return float(module.running_mean.sum() + module.num_batches_tracked)


def shift(entries: Any) -> list[Any]:
    entries.append(entries.pop(0))
    return list(entries[:3])


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "lists in a dict": (lambda: {"a": [1]}, lambda held: append(held["a"])),
    "a dict of lists, empty at first": (lambda: defaultdict(list), lambda held: append(held["a"])),
    "a list in a tuple": (lambda: (1, [2]), lambda held: append(held[1])),
    "a list that holds itself": (lambda: [[]], lambda held: append(held, held)),
    "lists in a queue": (lambda: deque([[]]), lambda held: append(held[0])),
    "a queue that is full": (lambda: deque([1, 2], maxlen=2), lambda held: (append(held, sum(held)), list(held))),
    "bytes": (bytearray, append),
    "counts": (Counter, lambda held: held.update("ab") or held.total()),
    "a set": (lambda: {0}, lambda held: held.add(len(held)) or len(held)),
    "a long list": (lambda: list(range(2 * FOLLOWED)), shift),
    "tensors in a list": (lambda: [torch.zeros(2)], lambda held: add(held[0])),
    "tensors in a tuple in a dict": (lambda: {"a": (torch.zeros(2),)}, lambda held: add(held["a"][0])),
    "an array": (lambda: np.zeros(2), add),
    "an array of lists": (lambda: np.array([[], None], dtype=object), lambda held: append(held[0])),
    "arrays in a dict": (lambda: {"a": np.zeros(2)}, lambda held: add(held["a"])),
    "random.Random": (lambda: random.Random(0), random.Random.random),
    "random.SystemRandom": (random.SystemRandom, lambda held: held.random() < 1),
    "RandomState": (lambda: np.random.RandomState(0), lambda held: held.rand()),
    "Generator": (lambda: np.random.default_rng(0), lambda held: held.random()),
    "torch's generators": (lambda: [torch.Generator()], lambda held: torch.rand(1, generator=held[0]).item()),
    "an iterator": (lambda: iter([3, 4, 5, 6]), next),
    "a counter": (lambda: [itertools.count()], lambda held: next(held[0])),
    "a generator": (lambda: {"a": (2 * i for i in range(9))}, lambda held: next(held["a"])),
    "an iterator of one's own": (Endless, next),
    "an object": (Meter, Meter.update),
    "objects in a list": (lambda: [Meter()], lambda held: held[0].update()),
    "a namespace": (lambda: SimpleNamespace(count=0), count),
    "slots": (lambda: Slotted(0), count),
    "a module that is not registered": (lambda: [nn.BatchNorm1d(2)], lambda held: norm(held[0])),
    "what cannot change": (lambda: (1, "a", Slotted, append), lambda held: held[:2]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_attributes_are_held_still(name):
    make, use = CASES[name]
    steps: list[Step] = [lambda module: use(module.held)] * 4
    assert seen(holding(make()), steps, queries=True) == seen(holding(make()), steps, queries=False)


def test_a_loader_that_starts_again_gives_each_query_the_same_batches():
    found = []
    for queries in (True, False):
        torch.manual_seed(0)
        module = holding(iter(torch.utils.data.DataLoader([1, 2], batch_size=None)))
        found.append(seen(module, [again] * 7, queries=queries))
    assert found[0] == found[1]
    assert found[0][:2] == [1, 2]
    assert {*found[0][2:5]} == {5, 6, 7}


def resize(module: Any) -> float:
    module.held.resize_(len(module.held) + 1).fill_(2.0)
    return float(module.held.sum())


def new_memory(module: Any) -> float:
    module.held.data = torch.cat([module.held, torch.ones(1)])
    return float(module.held.sum())


def new_tensor(module: Any) -> float:
    module.held = torch.cat([module.held.flatten(), torch.ones(1)])
    return float(module.held.sum())


def in_place(module: Any) -> float:
    module.held[:1] += 1
    return float(module.held.sum())


def doubled(module: Any) -> float:
    module.held = module.held + module.held
    return float(module.held.to_dense().sum())


BUFFERS: dict[str, tuple[Callable[[], Tensor], Step]] = {
    "resized": (lambda: torch.zeros(1), resize),
    "with new memory": (lambda: torch.zeros(1), new_memory),
    "replaced": (lambda: torch.zeros(1), new_tensor),
    "a view": (lambda: torch.zeros(6)[::2], in_place),
    "expanded": (lambda: torch.zeros(1).expand(3), in_place),
    "overlapping": (lambda: torch.zeros(6).as_strided((3, 3), (1, 1)), new_tensor),
    "sparse": (lambda: torch.eye(3).to_sparse(), doubled),
    "of no number": (lambda: torch.zeros(0), new_tensor),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_are_held_still(name):
    make, step = BUFFERS[name]
    found = []
    for queries in (True, False):
        module = nn.Linear(2, 2)
        module.register_buffer("held", make())
        found.append(seen(module, [step] * 4, queries=queries))
    assert found[0] == found[1]
    assert len(set(found[1])) == 4


def test_a_teacher_that_follows_is_held_still_and_larger_frozen_weights_are_guarded():
    def step(module: Any) -> float:
        with torch.no_grad():
            for old, new in zip(module["teacher"].parameters(), module["student"].parameters(), strict=True):
                old.data.mul_(0.9).add_(new, alpha=0.1)
        return float(module["teacher"].weight.detach().sum())

    torch.manual_seed(0)
    module = nn.ModuleDict({"student": nn.Linear(2, 2), "teacher": nn.Linear(2, 2)})
    moved = list(module["student"].parameters())
    before = PassState(module, moved)
    first = step(module)
    before.restore()
    assert step(module) == first
    with torch.no_grad():
        moved[0].add_(1.0)
        kept = moved[0].clone()
        before.restore()
    assert torch.equal(moved[0], kept)  # what queries move stays

    module = nn.ModuleDict({"head": nn.Linear(2, 2), "body": nn.Linear(1, FEW + 1)})
    state = PassState(module, list(module["head"].parameters()))
    state.check(module)
    for write in (lambda p: p.add_(1.0), lambda p: setattr(p, "data", p + 1)):
        with torch.no_grad():
            write(module["body"].weight)
        message = "training_step = 'body.weight': is written to by the step, and every query would write to it again"
        with pytest.raises(SettingError, match=re.escape(message)):
            state.check(module)
        state = PassState(module, list(module["head"].parameters()))
