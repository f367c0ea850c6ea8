"""Any network as stages, without a line about it: modules that come before a query's noise return what they returned.

A query starts in the middle of a network, but code starts at the beginning. So the network's own ``forward`` runs on
the query's rows, and the modules that had finished before the noise enters are *replayed*: instead of computing they
return what they returned in the clean pass for these samples. Only the glue between them runs again. What nothing reads
any more is not kept; zeros of the same shape stand in for it.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.network.calls import checkpointed, replaced, uncompiled
from flops_lightning.network.rows import Key, Leaf, Rows, map_tree, take_apart, value_of
from flops_lightning.network.staging import Stage, StagedNetwork
from flops_lightning.network.trace import call


class _Stop(BaseException):
    """The stages that were asked for have run; not an Exception, which a network might catch."""


class RowAxis(NamedTuple):
    """The axis of a tensor along which rows lie, with ``each`` entries for a row; 0: it is not known how."""

    axis: int
    each: int


@dataclass(frozen=True, eq=False)
class Facts:
    """What runs of the network showed.

    Attributes:
        users: The units that use each parameter, by name.
        axes: Along which axis the rows of each tensor lie; None: all share it.
        written: Tensors that glue writes to.
        overwrites: Whether the network writes to its inputs.
        entries: What inputs have, see :attr:`Rows.entries`; None: no example was given.
        unfit: See :class:`StagedNetwork`.
        obstacles: Why no query can start where a module ends, by the names of modules.
    """

    users: dict[str, set[int]]
    axes: dict[Key, RowAxis | None] = field(default_factory=dict)
    written: frozenset[Key] = frozenset()
    overwrites: bool = True
    entries: Any = None
    unfit: dict[str, str] | None = None
    obstacles: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Boundary:
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

    def __init__(self, module: nn.Module, units: Sequence[str], boundaries: Sequence[Boundary], facts: Facts) -> None:
        """``units`` are names of modules that run once, in their order; ``boundaries[i]`` is before stage ``i + 1``."""
        self._units, self._boundaries, self._facts = tuple(units), tuple(boundaries), facts
        self._cut_for = {name for name, p in module.named_parameters() if p.requires_grad}
        cuts = [0, *(boundary.first for boundary in boundaries), len(units)]
        prefixes = tuple(f"{unit}." for unit in units)
        known = {id(p): name for name, p in module.named_parameters()}
        users = {n: facts.users[known[id(p)]] for n, p in module.named_parameters(remove_duplicate=False)}
        stages = []
        for i, (first, end) in enumerate(pairwise(cuts)):
            inside = range(first, end if i < len(boundaries) else end + 1)
            names = units[first:end]
            loose = [n for n, used in users.items() if min(used) in inside and not n.startswith(prefixes)]
            owning = [n for n in names if next(module.get_submodule(n).parameters(), None) is not None]
            name = ["network", *names, *owning][-1] if boundaries else "network"
            stages.append(Stage(name.replace("._orig_mod", ""), _RunStage(self, i), (*owning, *loose)))
        super().__init__(module, tuple(stages))
        self.unfit = facts.unfit

    def without(self, boundaries: Collection[int]) -> "ReplayedNetwork":
        """The same network with the stages before and after these boundaries in one."""
        left = [each for i, each in enumerate(self._boundaries, 1) if i not in boundaries]
        why = "from its end the modules above do not compute what they compute in a whole pass"
        new = {self._units[self._boundaries[i - 1].first - 1]: why for i in boundaries}
        facts = replace(self._facts, obstacles=self._facts.obstacles | new)
        return ReplayedNetwork(self.module, self._units, left, facts)

    @property
    def uncut(self) -> str:
        """See :attr:`StagedNetwork.uncut`."""
        if len(self) > 1:
            return ""
        if self._facts.entries is None:
            return "Pass an example batch to stage_network (in a task: set example_input_array), so that it can be cut."
        return "No query could start within it (see the page on networks): put skip connections inside of blocks."

    def obstacle(self, name: str) -> str:
        """See :meth:`StagedNetwork.obstacle`."""
        return self._facts.obstacles.get(name, "")

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
        """Run to the end in one forward pass and show the activations in ``keep`` on the way; ``x`` stays as it is."""
        if start in keep:
            visit(start, x)
        if start == len(self):
            return value_of(x)
        return self._replay(x.clone() if start else x, start, set(keep), visit, last=len(self))

    def run_suffix(self, x: Any, start: int) -> Any:
        """Run the stages from ``start`` to the end; ``x`` is used up: each tensor is freed where its reader ends."""
        if start == len(self) or not isinstance(x, Rows):
            return self.run(x, start)
        return self._replay(x.handed_over(), start, (), lambda *_: None, last=len(self), spend=True)

    def trainable(self) -> dict[str, nn.Parameter]:
        """All parameters that require a gradient, by name; refused if some did not when the network was cut."""
        found = super().trainable()
        if len(self) > 1 and (new := sorted(found.keys() - self._cut_for)):
            problem = f"was frozen when the network was cut into stages ({len(new)} in all)."
            raise SettingError(
                "network", new[0], problem, "Cut the network again: stage_network, or self.stage in a task."
            )
        return found

    def _unlike_the_example(self, unit: int) -> SettingError:
        problem = "did not run exactly once and in the order in which it ran for the example."
        remedy = "Cut the network with an example that takes the same path through it, or use MeZO without an example."
        return SettingError("network", self._units[unit], problem, remedy)

    def _replay(
        self, x: Any, start: int, keep: Collection[int], visit: Callable[[int, Rows], None], *, last: int,
        spend: bool = False,
    ) -> Tensor:  # fmt: skip
        known = x if isinstance(x, Rows) else Rows.of(x)
        entries = self._facts.entries
        if not start and entries not in (None, known.entries):
            problem = f"has other entries than the example with which the network was cut: {entries}."
            raise SettingError("data", known.entries, problem, "Cut it with an example that has the same entries.")
        session = _Session(self, known, start, keep, visit, last, spend)
        given = known.inputs_copied() if self._facts.overwrites and not spend else known
        with replaced(session.forwards()), uncompiled(self.module):
            try:
                output = call(self.module, given.tree())
            except _Stop:
                return value_of(known)
        if session.turn < len(self._units):
            raise self._unlike_the_example(session.turn)
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
    spend: bool = False  # whether known tensors are let go once they are read
    new: dict[Key, Tensor] = field(default_factory=dict)
    skeletons: dict[Any, Any] = field(default_factory=dict)
    turn: int = 0  # the unit that runs next

    def __post_init__(self) -> None:
        boundaries = self.network._boundaries
        self._first = boundaries[self.start - 1].first if self.start else 0
        # By the unit after whose end it lies.
        self._ends = {boundaries[i - 1].first - 1: i for i in self.keep if self.start < i <= len(boundaries)}
        # A module that is checkpointed runs again in the derivative, when replays and recorders are gone.
        self._refuses_checkpoints = torch.is_grad_enabled() and (self._first > 0 or bool(self._ends))
        # With the last boundary that needs it.
        self._wanted = {key: i for i in sorted(self._ends.values()) for key in boundaries[i - 1].needed}

    def forwards(self) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
        """Replays and recorders in the place of the units' ``forward``."""
        last_end = max(self._ends, default=-1)
        for i, unit in enumerate(self.network._units):
            module = self.network.module.get_submodule(unit)
            yield module, self._replayed(i) if i < self._first else self._recorded(i, module.forward, last_end)

    def _replayed(self, unit: int) -> Callable[..., Any]:
        def run(*_: Any, **__: Any) -> Any:
            self._take_turn(unit)
            tree = self.known.tree(unit, copied=not self.spend)
            if self.spend:
                self.known.forget(unit)
            return tree

        return run

    def _take_turn(self, unit: int) -> None:
        if unit != self.turn:
            raise self.network._unlike_the_example(unit)
        if self._refuses_checkpoints and checkpointed():
            raise SettingError(
                "network", self.network._units[unit], "runs inside of torch.utils.checkpoint, which would run it again "
                "for the derivative of a stage.", "Turn gradient checkpointing off: graphs reach over one site.",
            )  # fmt: skip
        self.turn += 1

    def _recorded(self, unit: int, forward: Callable[..., Any], last: int) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            self._take_turn(unit)
            if unit > last:
                return output
            self._record(unit, output)
            if (boundary := self._ends.get(unit)) is not None:
                self.visit(boundary, self._rows(boundary))
                if boundary == self.last:
                    raise _Stop
                # Shown ones were copied, and the network holds its own as long as it needs them.
                self.new = {key: value for key, value in self.new.items() if self._wanted[key] > boundary}
            return output

        return run

    def _record(self, unit: int, output: Any) -> None:
        skeleton, tensors = take_apart(output, unit)
        self.skeletons[unit] = self._described(skeleton)
        for key, tensor in tensors.items():
            if key in self._wanted:
                self.new[key] = tensor.clone() if key in self.network._facts.written else tensor

    def _described(self, skeleton: Any) -> Any:
        facts = self.network._facts

        def describe(leaf: Leaf) -> Leaf:
            rows = facts.axes.get(leaf.key)
            axis, each = (None, 1) if rows is None else rows
            return leaf._replace(axis=axis, each=each, writable=leaf.key in facts.written)

        return map_tree(skeleton, Leaf, describe)

    def _rows(self, boundary: int) -> Rows:
        """All that a query needs that starts at this boundary."""
        place = self.network._boundaries[boundary - 1]
        tensors = {key: value for key, value in self.known.tensors.items() if key in place.needed}
        shared = {key: value for key, value in self.known.shared.items() if key in place.needed}
        for key, value in self.new.items():
            if key in place.needed:
                rows = self.network._facts.axes[key]
                (shared if rows is None else tensors)[key] = value if rows is None else value.movedim(rows.axis, 0)
        skeletons = {**self.known.skeletons, **self.skeletons}
        if self.start == 0:
            skeletons["inputs"] = self._described(skeletons["inputs"])
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
