"""Any network as stages, without a line about it: modules that come before a query's noise return what they returned.

A query starts in the middle of a network, but code starts at the beginning. So the network's own ``forward`` runs on
the query's rows, and the modules that had finished before the noise enters are *replayed*: instead of computing they
return what they returned in the clean pass for these samples. Only the glue between them runs again. What nothing reads
any more is not kept; zeros of the same shape stand in for it.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.network.rows import Key, Leaf, Rows, take_apart, value_of
from flops_lightning.network.staging import Stage, StagedNetwork
from flops_lightning.network.trace import Trace, call, find_units, trace


class _Stop(BaseException):
    """The stages that were asked for have run; not an Exception, which a network might catch."""


class RowAxis(NamedTuple):
    """The axis of a tensor along which rows lie, with ``each`` entries for a row; 0: it is not known how."""

    axis: int
    each: int


WHOLE = RowAxis(0, 1)


@dataclass(frozen=True, eq=False)
class _Unit:
    name: str
    written: frozenset[Key]  # outputs that glue writes to


@dataclass(frozen=True, eq=False)
class _Boundary:
    """Where a query may start: before the unit ``first``; the noise enters the output ``main`` of the one before."""

    first: int
    needed: frozenset[Key]
    main: Key


@dataclass(frozen=True, eq=False)
class _RunStage:
    network: "ReplayedNetwork"
    index: int

    def __call__(self, x: Any) -> Any:
        return self.network.run(x, self.index, self.index + 1)


class ReplayedNetwork(StagedNetwork):
    """A network whose stages are cut by replay; activations between them are :class:`Rows`, or tensors in a chain."""

    def __init__(
        self,
        module: nn.Module,
        units: Sequence[_Unit],
        boundaries: Sequence[_Boundary],
        axes: dict[Key, RowAxis | None],
        users: dict[str, set[int]],
    ) -> None:
        """``boundaries[i]`` is before stage ``i + 1``; ``users`` are the units that use each parameter."""
        self._units, self._boundaries, self._axes, self._users = tuple(units), tuple(boundaries), axes, users
        cuts = [0, *(boundary.first for boundary in boundaries), len(units)]
        prefixes = tuple(f"{unit.name}." for unit in units)
        stages = []
        for i, (first, end) in enumerate(pairwise(cuts)):
            inside = range(first, end if i < len(boundaries) else end + 1)
            names = [unit.name for unit in units[first:end]]
            loose = [name for name, used in users.items() if min(used) in inside and not name.startswith(prefixes)]
            owning = [n for n in names if next(module.get_submodule(n).parameters(), None) is not None]
            stages.append(Stage(["network", *names, *owning][-1], _RunStage(self, i), (*owning, *loose)))
        super().__init__(module, tuple(stages))

    def without(self, boundaries: Collection[int]) -> "ReplayedNetwork":
        """The same network with the stages before and after these boundaries in one."""
        left = [each for i, each in enumerate(self._boundaries, 1) if i not in boundaries]
        return ReplayedNetwork(self.module, self._units, left, self._axes, self._users) if boundaries else self

    @property
    def head(self) -> int:
        """Index of the first of the trailing stages that are the head: the last one and the norms below it."""
        first = len(self) - 1
        named = list(self.module.named_parameters())
        while first > 1 and all(p.dim() < 2 for name, p in named if self.stages[first - 1].owns(name)):
            first -= 1
        return first

    def with_all_tokens(self) -> StagedNetwork:
        """The same: replay runs all tokens."""
        return self

    def run(self, x: Any, start: int = 0, stop: int | None = None) -> Any:
        """Run stages ``start`` to ``stop`` (exclusive; to the end by default)."""
        stop = len(self) if stop is None else min(stop, len(self))
        if start >= stop:
            return x
        kept: list[Rows] = []
        output = self._replay(x, start, {stop}, lambda _, h: kept.append(h), last=stop)
        return kept[0] if kept else output

    def visit(self, x: Any, start: int, keep: Collection[int], visit: Callable[[int, Any], None]) -> Tensor:
        """Run to the end in one forward pass and show the activations in ``keep`` on the way."""
        if start in keep:
            visit(start, x)
        if start == len(self):
            return value_of(x)
        return self._replay(x, start, set(keep), visit, last=len(self))

    def _replay(
        self, x: Any, start: int, keep: Collection[int], visit: Callable[[int, Rows], None], *, last: int
    ) -> Tensor:
        known = x if isinstance(x, Rows) else Rows.of(x)
        session = _Session(self, known, start, keep, visit, last)
        with session.patched():
            try:
                output = call(self.module, known.tree())
            except _Stop:
                return value_of(known)
        return result_of(output)


@dataclass(eq=False)
class _Session:
    """One run of a network's forward pass in which the first units are replayed."""

    network: ReplayedNetwork
    known: Rows
    start: int
    keep: Collection[int]
    visit: Callable[[int, Rows], None]
    last: int
    new: dict[Key, Tensor] = field(default_factory=dict)
    skeletons: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        boundaries = self.network._boundaries
        self._first = boundaries[self.start - 1].first if self.start else 0
        # By the unit after whose end it lies.
        self._ends = {boundaries[i - 1].first - 1: i for i in self.keep if self.start < i <= len(boundaries)}
        self._wanted = frozenset[Key]().union(*(boundaries[i - 1].needed for i in self._ends.values()))

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Put replays and recorders in the place of the units' ``forward``, and take them away again."""
        last_end = max(self._ends, default=-1)
        forwards = []
        for i, unit in enumerate(self.network._units):
            if i > max(last_end, self._first - 1):
                break
            module = self.network.module.get_submodule(unit.name)
            forwards.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = self._replayed(i) if i < self._first else self._recorded(i, module.forward)
        try:
            yield
        finally:
            for module, forward in forwards:
                if forward is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = forward

    def _replayed(self, unit: int) -> Callable[..., Any]:
        return lambda *_, **__: self.known.tree(unit)

    def _recorded(self, unit: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self._record(unit, output)
            if (boundary := self._ends.get(unit)) is not None:
                self.visit(boundary, self._rows(boundary))
                if boundary == self.last:
                    raise _Stop
            return output

        return run

    def _record(self, unit: int, output: Any) -> None:
        skeleton, tensors = take_apart(output, unit)
        self.skeletons[unit] = self._described(skeleton, self.network._units[unit].written)
        for key, tensor in tensors.items():
            if key in self._wanted:
                self.new[key] = tensor.clone() if key in self.network._units[unit].written else tensor

    def _described(self, skeleton: Any, written: Collection[Key]) -> Any:
        def describe(leaf: Leaf) -> Leaf:
            rows = self.network._axes.get(leaf.key)
            axis, each = (None, 1) if rows is None else rows
            return leaf._replace(axis=axis, each=each, writable=leaf.key in written)

        return describe(skeleton) if isinstance(skeleton, Leaf) else apply_to_collection(skeleton, Leaf, describe)

    def _rows(self, boundary: int) -> Rows:
        """All that a query needs that starts at this boundary."""
        place = self.network._boundaries[boundary - 1]
        axes = self.network._axes
        tensors = {key: value for key, value in self.known.tensors.items() if key in place.needed}
        shared = {key: value for key, value in self.known.shared.items() if key in place.needed}
        for key, value in self.new.items():
            if key in place.needed:
                rows = axes[key]
                (shared if rows is None else tensors)[key] = value if rows is None else value.movedim(rows.axis, 0)
        skeletons = {**self.known.skeletons, **self.skeletons}
        if self.start == 0 and "inputs" in skeletons:
            skeletons["inputs"] = self._described(skeletons["inputs"], ())
        return Rows(tensors, shared, skeletons, place.main)


def result_of(output: Any) -> Tensor:
    """The tensor that a network returns: itself, or the ``logits`` of a Hugging Face model."""
    output = getattr(output, "logits", output)
    if not isinstance(output, Tensor):
        raise SettingError(
            "network", type(output).__name__, "is what the network returns; expected one tensor, or an object with "
            "`logits`.", "Wrap the network in a module whose forward returns the tensor that the loss takes.",
        )  # fmt: skip
    return output


def stage_whole(module: nn.Module) -> ReplayedNetwork:
    """Any network as a single stage."""
    return ReplayedNetwork(module, (), (), {}, {name: {0} for name, _ in module.named_parameters()})


def stage_by_replay(module: nn.Module, example: Any) -> ReplayedNetwork:
    """Cut any network into stages by running it on two and three rows of ``example``.

    Its stages are the modules that run once each, as large as possible, but containers of repeated blocks are taken
    apart into blocks, and the head into its layers. Parameters that code outside of these modules uses belong to the
    stage in which they are used. Places at which no query could start (a module is called again later, hands over
    tensors in another way than by returning them, or mixes the rows of a batch) lie within a stage.
    """
    rows = Rows.of(example)
    few = [rows.index_select(0, torch.tensor(i, device=rows.device) % len(rows)) for i in ([0, 1], [0, 1, 0])]
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            units = find_units(module, few[0])
            two, three = (trace(module, units, each, result_of) for each in few)
            _check_rows(module, two.result, three.result)
            return _faithful(_network(module, units, two, three), few[1])
    finally:
        for each, training in modes:
            each.training = training


def _check_rows(module: nn.Module, two: Tensor, three: Tensor) -> None:
    if two.dim() and len(two) == 2 and len(three) == 3 and torch.allclose(two, three[:2], rtol=1e-3, atol=1e-4):
        return
    raise SettingError(
        "network", type(module).__name__, f"returned the shapes {tuple(two.shape)} and {tuple(three.shape)} for two "
        "rows and the same two with one of them repeated, or other values for the same rows.",
        "Make the output of a row independent of the other rows, with the row as its first dimension.",
    )  # fmt: skip


def _network(module: nn.Module, units: Sequence[str], two: Trace, three: Trace) -> ReplayedNetwork:
    axes = {key: _axis(two.outputs[key], three.outputs[key]) for key in three.outputs}
    users = _users(module, units, three)
    trained = [each for name, each in users.items() if module.get_parameter(name).requires_grad]
    learns = _trained(three, trained)
    boundaries: list[_Boundary] = []
    for first in range(1, len(units)):
        needed = frozenset(k for k, last in three.last_read.items() if unit_of(k) < first <= last)
        below = [k for k in needed if unit_of(k) == first - 1]
        main = min((k for k in below if _carries_noise(three.outputs[k], axes[k])), default=None)
        crossed = any(u < first <= v for u, v in three.hidden) or any(min(u) < first <= max(u) for u in trained)
        # Noise enters the main tensor alone: no gradient may pass beside it.
        beside = any(unit_of(k) in learns and three.outputs[k].is_floating_point() for k in needed if k != main)
        owns = next(module.get_submodule(units[first - 1]).parameters(), None) is not None
        left = any(max(u) >= first for u in users.values())
        mixed = any((axes[k] or WHOLE).each != 1 for k in needed)
        if main is not None and owns and left and not (crossed or beside or mixed):
            boundaries.append(_Boundary(first, needed, main))
    written = [frozenset(k for k in three.written if unit_of(k) == i) for i in range(len(units))]
    return ReplayedNetwork(module, [_Unit(*each) for each in zip(units, written, strict=True)], boundaries, axes, users)


def _trained(seen: Trace, trained: Sequence[set[int]]) -> set[int]:
    """The units whose outputs depend on trainable parameters."""
    found: set[int] = set()
    for unit in sorted({*seen.reads, *(u for users in trained for u in users)}):
        if any(unit in users for users in trained) or any(unit_of(k) in found for k in seen.reads.get(unit, ())):
            found.add(unit)
    return found


def unit_of(key: Key) -> int:
    """The unit that gave a tensor; -1 for inputs."""
    return -1 if key[0] == "inputs" else key[0]


def _axis(two: Tensor, three: Tensor) -> RowAxis | None:
    """Along which axis the rows of a tensor lie that was seen with two and with three; None: all rows share it."""
    if two.dim() != three.dim():
        return RowAxis(0, 0)
    grown = [i for i, (a, b) in enumerate(zip(two.shape, three.shape, strict=True)) if a != b]
    if not grown:
        return None if torch.equal(two, three) else RowAxis(0, 0)
    (axis, *more), shape = grown, two.shape
    fits = not more and shape[axis] % 2 == 0 and 3 * shape[axis] == 2 * three.shape[axis]
    return RowAxis(axis, shape[axis] // 2 if fits else 0)


def _carries_noise(tensor: Tensor, axis: RowAxis | None) -> bool:
    return tensor.is_floating_point() and axis is not None and axis.each == 1


def _users(module: nn.Module, units: Sequence[str], seen: Trace) -> dict[str, set[int]]:
    """The units that read or own each parameter, by name; one that nobody reads belongs to the last."""
    known = {id(p): name for name, p in module.named_parameters()}
    users = {name: set(seen.parameters.get(name, ())) for name in known.values()}
    for alias, parameter in module.named_parameters(remove_duplicate=False):
        users[known[id(parameter)]] |= {i for i, unit in enumerate(units) if alias.startswith(f"{unit}.")}
    return {name: each or {len(units)} for name, each in users.items()}


def _faithful(network: ReplayedNetwork, rows: Rows) -> ReplayedNetwork:
    """The network without those boundaries from which a stage does not compute what it computes in the clean pass."""
    clean: dict[int, Any] = {}

    def keep(i: int, h: Rows) -> None:
        clean[i] = h.clone()

    while True:
        clean[len(network)] = network.visit(rows.clone(), 0, range(1, len(network)), keep)
        wrong = [i for i in range(1, len(network)) if not _agrees(network, i, clean)]
        if not wrong:
            return network
        network = network.without(wrong)


def _agrees(network: ReplayedNetwork, stage: int, clean: Mapping[int, Any]) -> bool:
    try:
        output = network.run(clean[stage].clone(), stage, stage + 1)
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError):
        return False
    found, expected = ([h] if isinstance(h, Tensor) else h.tensors.values() for h in (output, clean[stage + 1]))
    return all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max())) for a, b in zip(found, expected, strict=True)
    )
