"""Tensors of the same rows that are gathered, split and copied as one: nested inputs, and what a query starts from."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning_utilities.core.apply_func import apply_to_collection, is_dataclass_instance
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from flops_lightning.errors import SettingError
from flops_lightning.suffix_loss import PaddedTargets

Key = tuple[Any, int]
"""Name of a nested structure and the number of a tensor in it."""


class _OfFrozen(type):
    def __instancecheck__(cls, value: Any) -> bool:
        return is_dataclass_instance(value) and value.__dataclass_params__.frozen


class _Frozen(metaclass=_OfFrozen):
    """Frozen dataclasses, which ``apply_to_collection`` refuses."""


def map_tree(tree: Any, kind: Any, function: Callable[[Any], Any]) -> Any:
    """Nested sequences, mappings and dataclasses with a function applied to the values of a class (or several)."""

    def apply(value: Any) -> Any:
        if isinstance(value, kind):
            return function(value)
        mapped = copy(value)
        for each in fields(value):
            object.__setattr__(mapped, each.name, map_tree(getattr(value, each.name), kind, function))
        return mapped

    kinds = kind if isinstance(kind, tuple) else (kind,)
    return apply_to_collection(tree, (*kinds, _Frozen), apply)


class Leaf(NamedTuple):
    """The place of a tensor in a nested structure, and enough to make one like it."""

    key: Key
    shape: tuple[int, ...]
    axis: int | None  # along which rows lie; None: all rows share it
    dtype: torch.dtype
    device: torch.device
    each: int = 1  # entries along that axis for a row
    writable: bool = False  # whether the network writes to it

    def stand_in(self, rows: int) -> Tensor:
        """Zeros in the shape of the tensor for this number of rows; in the memory of one number, unless writable."""
        shape = list(self.shape)
        if self.axis is not None:
            shape[self.axis] = self.each * rows
        zero = torch.zeros((), dtype=self.dtype, device=self.device).expand(shape)
        return zero.clone() if self.writable else zero


@dataclass(eq=False)
class Rows:
    """Several tensors with rows in common, in the place of one ``(r, ...)`` tensor.

    It has those methods of a tensor that work on rows. Everything else (shape, dtype, noise) is that of its ``main``
    tensor.

    Attributes:
        tensors: ``(r, ...)`` tensors by key.
        shared: Tensors that do not depend on the row, by key.
        skeletons: Nested structures whose tensors are :class:`Leaf` objects, by name.
        main: Key of the tensor that stands for all; None: the first one.

    Example:
        >>> batch = Rows.of({"ids": torch.arange(6).reshape(3, 2), "mask": torch.ones(3, 2)})
        >>> len(batch), batch[1:].tree()["ids"].tolist()
        (3, [[2, 3], [4, 5]])
    """

    tensors: dict[Key, Tensor]
    shared: dict[Key, Tensor] = field(default_factory=dict)
    skeletons: dict[Any, Any] = field(default_factory=dict)
    main: Key | None = None

    @classmethod
    def of(cls, tree: Any, setting: str = "data") -> "Rows":
        """Take apart nested mappings, sequences and dataclasses of tensors whose first dimension is the row."""
        if isinstance(tree, Mapping):
            tree = {key: tree[key] for key in sorted(tree)}  # tensors are told apart by their numbers
        skeleton, tensors = take_apart(tree, "inputs")
        rows = {key: value for key, value in tensors.items() if value.dim()}
        lengths = {len(value) for value in rows.values()}
        if not lengths:
            raise SettingError(
                setting,
                type(tree).__name__,
                "has no tensor with samples.",
                "Give tensors whose first axis is the sample.",
            )
        if len(lengths) != 1:
            raise SettingError(
                setting, sorted(lengths), "the tensors of a batch must have one length, its number of samples.",
                "Give tensors whose first axis is the sample.",
            )  # fmt: skip
        return cls(rows, {key: value for key, value in tensors.items() if not value.dim()}, {"inputs": skeleton})

    def tree(self, name: Any = "inputs", *, copied: bool = False) -> Any:
        """The structure of this name with its tensors; those that are not here are stand-ins of zeros.

        With ``copied``, those that the network is known to write to are copies.
        """

        def put(leaf: Leaf) -> Tensor:
            if leaf.key in self.tensors:
                value = self.tensors[leaf.key]
                value = value.clone() if copied and leaf.writable else value
                return value if not leaf.axis else value.movedim(0, leaf.axis)
            # A copy: the network may write to it.
            return self.shared[leaf.key].clone() if leaf.key in self.shared else leaf.stand_in(len(self))

        return map_tree(self.skeletons[name], Leaf, put)

    def handed_over(self) -> "Rows":
        """The same rows, for an owner who lets tensors go one by one; nothing is left here."""
        tensors, self.tensors = self.tensors, {}
        return replace(self, tensors=tensors)

    def inputs_copied(self) -> "Rows":
        """The same rows, with copies of the inputs that are among them."""
        return replace(self, tensors={k: t.clone() if k[0] == "inputs" else t for k, t in self.tensors.items()})

    def forget(self, name: Any) -> None:
        """Let go of the tensors of this name; their number of rows stays known."""
        for key, tensor in self.tensors.items():
            if key[0] == name:
                self.tensors[key] = tensor.new_zeros(()).expand(len(tensor))

    @property
    def entries(self) -> Any:
        """How inputs are built: whether each entry is a tensor, by name; entries that are None do not count."""
        skeleton = self.skeletons["inputs"]
        if isinstance(skeleton, Mapping):
            return {name: isinstance(value, Leaf) for name, value in skeleton.items() if value is not None}
        given = skeleton if isinstance(skeleton, (tuple, list)) else (skeleton,)
        return [isinstance(value, Leaf) for value in given]

    @property
    def value(self) -> Tensor:
        """``(r, ...)`` the main tensor."""
        return next(iter(self.tensors.values())) if self.main is None else self.tensors[self.main]

    def with_value(self, value: Tensor) -> "Rows":
        """The same with another main tensor."""
        if self.main is None:
            raise TypeError("inputs have no main tensor.")
        return replace(self, tensors={**self.tensors, self.main: value})

    def map(self, function: Callable[[Tensor], Tensor]) -> "Rows":
        """The same with a function applied to each tensor that has rows."""
        return replace(self, tensors={key: function(value) for key, value in self.tensors.items()})

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Any) -> "Rows":
        return self.map(lambda tensor: tensor[rows])

    def index_select(self, dim: int, index: Tensor) -> "Rows":
        """Gather rows."""
        return self.map(lambda tensor: tensor.index_select(dim, index))

    def repeat_interleave(self, repeats: int, dim: int) -> "Rows":
        """Repeat rows."""
        return self.map(lambda tensor: tensor.repeat_interleave(repeats, dim=dim))

    def split(self, size: int) -> "list[Rows]":
        """Cut into parts of ``size`` rows."""
        return [self[i : i + size] for i in range(0, len(self), size)]

    def clone(self) -> "Rows":
        """Copy the tensors that have rows."""
        return self.map(Tensor.clone)

    def detach(self) -> "Rows":
        """The same without a graph."""
        return self.map(Tensor.detach)

    @property
    def device(self) -> torch.device:
        """Device of the main tensor."""
        return self.value.device


def _flatten(rows: Rows) -> tuple[list[Tensor], Any]:
    return list(rows.tensors.values()), (list(rows.tensors), rows)


def _unflatten(tensors: Iterable[Tensor], context: Any) -> "Rows":
    keys, rows = context
    return replace(rows, tensors=dict(zip(keys, tensors, strict=True)))


register_pytree_node(Rows, _flatten, _unflatten)  # for torch.func.vmap


def take_apart(tree: Any, name: Any) -> tuple[Any, dict[Key, Tensor]]:
    """A nested structure with :class:`Leaf` objects for its tensors, and these by their keys ``(name, number)``."""
    tensors: dict[Key, Tensor] = {}

    def take(tensor: Tensor) -> Leaf:
        if tensor.is_nested:
            raise SettingError(
                "network",
                name,
                "hands over a nested tensor.",
                "Write enable_nested_tensor=False, or pad to one length.",
            )
        key = (name, len(tensors))
        tensors[key] = tensor
        return Leaf(key, tuple(tensor.shape), 0 if tensor.dim() else None, tensor.dtype, tensor.device)

    return map_tree(tree, Tensor, take), tensors


def has_derivative(tensor: Tensor) -> bool:
    """Whether its numbers are floats or complex."""
    return tensor.is_floating_point() or tensor.is_complex()


def value_of(h: Tensor | Rows) -> Tensor:
    """The tensor itself, or the main one of several."""
    return h if isinstance(h, Tensor) else h.value


def with_value(h: Tensor | Rows, value: Tensor) -> Tensor | Rows:
    """``value`` in the place of the tensor, or of the main one of several."""
    return value if isinstance(h, Tensor) else h.with_value(value)


def as_rows(inputs: Any) -> Tensor | Rows:
    """A tensor as it is, everything else as :class:`Rows`."""
    return inputs if isinstance(inputs, (Tensor, Rows)) else Rows.of(inputs)


def empty_like(h: Tensor | Rows, rows: int) -> Tensor | Rows:
    """Room for ``rows`` rows like those of ``h``, in the same memory layout: kernels may round otherwise in another."""

    def empty(tensor: Tensor) -> Tensor:
        layout = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
        shape = (rows, *tensor.shape[1:])
        return torch.empty_permuted(shape, layout, dtype=tensor.dtype, device=tensor.device)

    return empty(h) if isinstance(h, Tensor) else h.map(empty)


def write_rows(into: Any, first: int, h: Tensor | Rows) -> None:
    """Write the rows of ``h`` from the row ``first`` on."""
    if isinstance(h, Tensor):
        into[first : first + len(h)] = h
    else:
        for key, tensor in h.tensors.items():
            if tensor.shape[1:] != into.tensors[key].shape[1:]:
                raise SettingError(
                    "network", tuple(tensor.shape), f"is the shape of an activation that was {tuple(h.value.shape)} "
                    "for other rows of the batch.", "Pad all samples to one length outside of the network.",
                )  # fmt: skip
            into.tensors[key][first : first + len(h)] = tensor


def gather(tree: Any, index: Tensor, samples: NDArray[np.int64] | None = None) -> Any:
    """The rows ``index`` of a tensor, of nested tensors or of :class:`PaddedTargets`.

    ``samples`` is the index on the host, for those that have lengths there; None: it is asked of the device.
    """

    def take(value: Any) -> Any:
        return value.take(index, samples) if isinstance(value, PaddedTargets) else value.index_select(0, index)

    return map_tree(tree, (Tensor, Rows, PaddedTargets), take)


def joined(parts: Sequence[Tensor | Rows]) -> Tensor | Rows:
    """Parts of rows one after the other."""
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(list(parts))  # type: ignore[arg-type]
    rows: list[Mapping[Key, Tensor]] = [part.tensors for part in parts]  # type: ignore[union-attr]
    return replace(first, tensors={key: torch.cat([each[key] for each in rows]) for key in first.tensors})
