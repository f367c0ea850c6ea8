"""What a pass through a module changes beside its result, to be put back before and after a query."""

import random
from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from flops_lightning.callbacks.held import Copied, PutBack, constant_listing, contents, listing, rule_for, tensor_copy
from flops_lightning.errors import SettingError

FEW = 1_000_000
"""Numbers that are copied wherever they lie."""


class PassState:
    """Random numbers, buffers, metrics and Python attributes of a module at one moment.

    Dropout, mixup, running statistics, counters, lists that a ``training_step`` appends to: a query starts where the
    pass that it repeats started, and leaves no trace. What a module holds is followed through containers, arrays,
    generators of random numbers, iterators and objects of the user's own classes.

    Frozen parameters (of a teacher that follows a student, say) and tensors in lists are copied where they are at most
    twice as many numbers as the parameters that queries move. Otherwise :meth:`check` refuses a step that writes to
    them.

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

    def __init__(self, module: nn.Module, moved: Collection[Tensor] | None = None) -> None:
        """Copy what a pass may change.

        Args:
            module: The module.
            moved: The parameters that queries move, which are left as they are; None: all.
        """
        parameters = list(module.parameters())
        moved = parameters if moved is None else moved
        device = parameters[0].device if parameters else torch.device("cpu")
        self._put_back = list(_random_states(device))
        self._empty: list[Any] = []  # most containers of a module: dictionaries of hooks
        self._seen = {id(p): p for p in moved}  # with the objects, so that no other gets their ids
        loose: list[Tensor] = []
        todo: list[Any] = [module]
        while todo:
            value = todo.pop()
            kind: Any = type(value)
            hold = rule_for(kind)
            if hold is None or id(value) in self._seen:
                continue
            if hold in (contents, listing) and not value:
                self._empty.append(value)
                continue
            self._seen[id(value)] = value
            if hold is tensor_copy and isinstance(value, nn.Parameter):
                loose += [] if value.is_inference() else [value]
                continue
            put_back, entries = hold(value)
            self._put_back += put_back
            todo += entries
            if hold in (listing, constant_listing):
                tensors = {id(each): each for each in entries if isinstance(each, Tensor)}
                new = [each for name, each in tensors.items() if name not in self._seen and not each.is_inference()]
                loose += new
                self._seen.update((id(each), each) for each in new)
        fits = sum(each.numel() for each in loose) <= max(FEW, 2 * sum(p.numel() for p in moved))
        self._put_back += [Copied(each) for each in loose if fits]
        self._checked = [(each, _written(each)) for each in loose if not fits]

    def check(self, module: nn.Module) -> None:
        """Raise a :class:`SettingError` if a pass wrote to a tensor that is not copied."""
        for tensor, before in self._checked:
            if _written(tensor) != before:
                name = next((name for name, p in module.named_parameters() if p is tensor), "a tensor in a list")
                raise SettingError(
                    "training_step", name, "is written to by the step, and every query would write to it again: it is "
                    "too large to be held still.", "Write to it in on_train_batch_end.",
                )  # fmt: skip

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back in place: the same objects with the same contents."""
        for put_back in self._put_back:
            put_back()
        for container in self._empty:
            if container:
                container.clear()


def _written(tensor: Tensor) -> tuple[int, int]:
    """Differs after a write, unless it went through ``tensor.data`` in place."""
    return tensor._version, tensor.data_ptr()


def _random_states(device: torch.device) -> Iterator[PutBack]:
    """What sets the generators back that draw by default."""
    yield partial(random.setstate, random.getstate())
    yield partial(np.random.set_state, np.random.get_state())  # noqa: NPY002  (the global one, which modules use)
    yield partial(torch.set_rng_state, torch.get_rng_state())
    if device.type != "cpu":
        accelerator = torch.get_device_module(device)
        yield partial(accelerator.set_rng_state, accelerator.get_rng_state())


def copied(batch: Any) -> Any:
    """Containers and tensors of a batch that a ``training_step`` may change without a trace in the original."""
    return apply_to_collection(batch, Tensor, Tensor.clone, allow_frozen=True)
