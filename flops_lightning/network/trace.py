"""Which modules of a network run, in what order, and what each of them reads of the others, found by running it.

A *unit* is a module that runs once in a forward pass, as a whole. Between units there is glue: the code of the modules
around them. :func:`trace` runs the network on a few rows and follows every tensor from the units (and inputs) that it
comes from, through the glue, to the units that read it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from flops_lightning.network.rows import Key, Rows, map_tree, take_apart

ALWAYS = 10**9
Sources = frozenset[Key]
NONE: Sources = frozenset()


@dataclass(eq=False)
class Trace:
    """What one forward pass showed.

    Units are numbered in the order in which they finish; glue that runs before the end of unit ``u`` counts as part of
    ``u``, and what runs after the last one as one more.

    Attributes:
        outputs: Every tensor that units (and inputs) gave, by its key ``(unit, number)``.
        last_read: The last unit that reads it.
        reads: What each unit reads, in it or in the glue before it.
        written: Keys that glue writes to in place.
        overwrites: Whether the network writes to its inputs, in units or in glue.
        hidden: Pairs ``(u, v)``: ``v`` reads a tensor that ``u`` made but did not return.
        parameters: The units that read each parameter, by name.
        result: What the network returned.
    """

    outputs: dict[Key, Tensor] = field(default_factory=dict)
    last_read: dict[Key, int] = field(default_factory=dict)
    reads: dict[int, set[Key]] = field(default_factory=dict)
    written: set[Key] = field(default_factory=set)
    overwrites: bool = False
    hidden: set[tuple[int, int]] = field(default_factory=set)
    parameters: dict[str, set[int]] = field(default_factory=dict)
    result: Any = None
    inputs: Any = None  # how they are built


def call(network: nn.Module, inputs: Any) -> Any:
    """Call a network with a tensor, a tuple of arguments or a mapping of named ones."""
    if isinstance(inputs, Mapping):
        return network(**inputs)
    return network(*inputs) if isinstance(inputs, (tuple, list)) else network(inputs)


def find_units(
    network: nn.Module, inputs: Rows, taken_apart: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Module
) -> tuple[list[str], list[str]]:
    """Names of the units in the order in which they start; modules of the class ``taken_apart`` may be taken apart.

    Called once each, and as large as possible, but containers of repeated blocks (``layers``, ``stages``) are taken
    apart into their blocks, and the head into its layers. Also the names of the modules that run more than once.
    """
    names = {module: name for name, module in network.named_modules()}
    counts: Counter[str] = Counter()
    children: dict[str, list[str]] = {}
    open_calls: list[str] = []

    def before(module: nn.Module, _: Any) -> None:
        name = names[module]
        if open_calls:
            children.setdefault(open_calls[-1], []).append(name)
        counts[name] += 1
        open_calls.append(name)

    def after(_: nn.Module, __: Any, ___: Any) -> None:
        open_calls.pop()

    handles = [m.register_forward_pre_hook(before) for m in names] + [m.register_forward_hook(after) for m in names]
    try:
        call(network, inputs.tree())
    finally:
        for handle in handles:
            handle.remove()

    def units(name: str) -> Iterator[str]:
        for child in children.get(name, []):
            if counts[child] > 1:
                continue
            module = network.get_submodule(child)
            if child in children and isinstance(module, taken_apart) and _holds_blocks(module):
                yield from units(child)
            else:
                yield child

    found = list(units(""))
    while (
        found
        and (parts := children.get(found[-1]))
        and _is_head(network, found[-1])
        and max(counts[p] for p in parts) == 1
    ):
        found[-1:] = parts
    return found, [name for name, number in counts.items() if number > 1]


def _is_head(network: nn.Module, name: str) -> bool:
    parent = network.get_submodule(name.rpartition(".")[0])
    return not isinstance(parent, (nn.ModuleList, nn.Sequential))


def _holds_blocks(module: nn.Module) -> bool:
    containers = (m for m in module.modules() if isinstance(m, (nn.ModuleList, nn.Sequential)))
    return any(_is_block(item) for container in containers for item in container)


def _is_block(module: nn.Module) -> bool:
    leaves = [m for m in module.modules() if next(m.parameters(recurse=False), None) is not None]
    return len(leaves) > 1 and not isinstance(module, (nn.ModuleList, nn.Sequential))


@torch.no_grad()
def trace(network: nn.Module, units: Sequence[str], inputs: Rows, result_of: Callable[[Any], Tensor]) -> Trace:
    """Run the network once; ``result_of`` picks the tensor that counts of what it returns."""
    flow = _Flow(network)
    tree = inputs.tree()
    flow.trace.inputs, given = take_apart(tree, "inputs")
    for key, tensor in given.items():
        flow.gave(key, tensor)
    flow.inputs = {_place(tensor) for tensor in given.values()}
    with flow.watching(network, units), flow:
        returned = call(network, tree)
    flow.trace.result = result_of(returned)
    flow.read(flow.sources.get(flow.trace.result, NONE), len(units))
    flow.uses(flow.names(flow.trace.result), len(units))
    flow.trace.hidden |= {(u, len(units)) for u in [flow.made_in.get(flow.trace.result)] if u is not None}
    return flow.trace


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Flow(TorchDispatchMode):
    """Follows tensors from operation to operation."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.inputs: set[int] = set()  # where their memory is
        self.sources: Any = WeakIdKeyDictionary()  # of tensors that units gave or glue made of these
        self.made_in: Any = WeakIdKeyDictionary()  # the unit inside which a tensor was made, unless it returned it
        self._parameters: Any = WeakIdKeyDictionary()
        for name, parameter in network.named_parameters():
            self._parameters[parameter] = name
        self._carried: Any = WeakIdKeyDictionary()  # names of the parameters in tensors that glue made of these
        self._unit = 0
        self._inside = False

    def gave(self, key: Key, tensor: Tensor) -> None:
        """Note a tensor as one that others may read."""
        self.trace.outputs[key] = tensor
        self.sources[tensor] = frozenset([key])

    def names(self, tensor: Tensor) -> frozenset[str]:
        """Names of the parameters that glue made this tensor of."""
        own = self._parameters.get(tensor)
        return self._carried.get(tensor, frozenset()) if own is None else frozenset([own])

    def uses(self, names: frozenset[str], unit: int) -> None:
        """Note that ``unit`` reads these parameters."""
        for name in names:
            self.trace.parameters.setdefault(name, set()).add(unit)

    def read(self, sources: Sources, unit: int) -> None:
        """Note that ``unit`` reads these."""
        self.trace.reads.setdefault(unit, set()).update(sources)
        for key in sources:
            self.trace.last_read[key] = max(unit, self.trace.last_read.get(key, -1))

    @contextmanager
    def watching(self, network: nn.Module, units: Sequence[str]) -> Iterator[None]:
        """Note where units begin and end, and give their outputs names."""

        def before(_: nn.Module, __: Any) -> None:
            self._inside = True

        def after_of(unit: int) -> Callable[[nn.Module, Any, Any], Any]:
            def after(_: nn.Module, __: Any, output: Any) -> Any:
                self._inside = False
                if self._unit != unit:
                    raise RuntimeError("the modules of the network run in another order than before.")
                # A module such as Identity returns the tensor that it was given: it reads it, and has one of its own.
                for tensor in take_apart(output, unit)[1].values():
                    self.read(self.sources.get(tensor, NONE), unit)
                output = map_tree(output, Tensor, Tensor.detach)
                self._unit += 1
                for key, tensor in take_apart(output, unit)[1].items():
                    self.made_in.pop(tensor, None)
                    self.gave(key, tensor)
                return output

            return after

        handles = []
        for i, name in enumerate(units):
            module = network.get_submodule(name)
            # Before other hooks: these are glue, which runs again in a query.
            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after_of(i), prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        made = [each for each in tree_leaves(result) if isinstance(each, Tensor) and each not in self._parameters]
        written = list(self._written(func, args, kwargs))
        self.trace.overwrites |= any(_place(tensor) in self.inputs for tensor in written)
        for tensor in given:
            maker = self.made_in.get(tensor)
            if maker is not None and not (self._inside and maker == self._unit):
                self.trace.hidden.add((maker, self._unit))
        sources = NONE.union(*(self.sources.get(tensor, NONE) for tensor in given))
        names = frozenset[str]().union(*(self.names(tensor) for tensor in given))
        if self._inside or sources:
            self.uses(names, self._unit)
        if self._inside:
            self.read(sources, self._unit)
            for tensor in (*written, *(each for each in made if each not in self.sources)):
                self.made_in[tensor] = self._unit  # others see it though the unit does not return it
            return result
        if not made:  # a number, on which code may depend
            self.read(sources, ALWAYS)
        for tensor in written:
            self.trace.written |= self.sources.get(tensor, NONE)
        for tensor in (*made, *(alias for each in written for alias in self._aliases(each))):
            if sources:
                self.sources[tensor] = self.sources.get(tensor, NONE) | sources
            if names:
                self._carried[tensor] = self._carried.get(tensor, frozenset()) | names
        return result

    def _aliases(self, tensor: Tensor) -> list[Tensor]:
        """Known tensors in the same memory, itself included."""
        return [tensor, *(t for t in list(self.sources) if _place(t) == _place(tensor))]

    @staticmethod
    def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from (each for each in tree_leaves(value) if isinstance(each, Tensor))
