"""Where a setting stands in the given YAML files, and which settings are accepted there.

Used after the parser has refused something, to name the file, the line, the whole key and its neighbours. It never
decides what is valid.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

CLASS_NAMES = ("class_path", "init_args", "dict_kwargs")  # what a mapping that stands for an object consists of
_PLAIN = ("builtins", "typing")  # where dict, list and Any live, whose keys are free


@dataclasses.dataclass(frozen=True)
class Place:
    """One mapping of a YAML file.

    Attributes:
        file: The file as the user named it.
        line: First line, counted from 1.
        path: The whole key, as ``model.init_args.strategy.init_args.sites[0]``; empty at the top.
        keys: The same as a tuple of names, without ``init_args`` and list indices.
        entries: Nodes of key and value by name.
        accepted: Type hints by accepted name; None where any name goes, or where it is not known.
    """

    file: str
    line: int
    path: str
    keys: tuple[str, ...]
    entries: dict[str, tuple[yaml.Node, yaml.Node]]
    accepted: dict[str, Any] | None

    def child(self, name: str) -> str:
        """The whole key of ``name`` inside this mapping."""
        return f"{self.path}.{name}" if self.path else name

    def at(self, name: str) -> str:
        """File and line of ``name``, or of the mapping when it has no such entry."""
        line = self.entries[name][0].start_mark.line + 1 if name in self.entries else self.line
        return f"{self.file}, line {line}"

    def is_below(self, keys: Iterable[str]) -> bool:
        """Whether ``keys`` occur in this order on the way here."""
        way = iter(self.keys)
        return all(key in way for key in keys)


def places(files: Iterable[str], top: Mapping[str, Any]) -> list[Place]:
    """Every mapping of every readable file, the last file first because its settings win; outer before inner.

    Args:
        files: Paths of YAML files.
        top: Type hints by name of the settings at the top of a file.
    """
    found: list[Place] = []
    for file in reversed(list(files)):
        try:
            root = yaml.compose(Path(file).read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            continue
        found.extend(_walk(root, top, file, "", ()))
    return found


def settings_of(owner: Any) -> dict[str, Any] | None:
    """Type hints by name of what a class takes, those it hands on to its bases included; None if it names none."""
    found: dict[str, Any] = {}
    for layer in inspect.getmro(owner):
        init = vars(layer).get("__init__")
        if init is None or layer is object:
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        try:
            hints = get_type_hints(init)
        except NameError:  # a name imported for the type checker only
            hints = {}
        named = [p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)]
        found = {name: hints.get(name, Any) for name in named} | found
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return {name: hint for name, hint in found.items() if name not in getattr(owner, "fixed", ())} or None


def _walk(node: yaml.Node | None, hint: Any, file: str, path: str, keys: tuple[str, ...]) -> Iterator[Place]:
    if isinstance(node, yaml.SequenceNode):
        element = next((get_args(h)[0] for h in _alternatives(hint) if _is_list(h)), Any)
        for index, item in enumerate(node.value):
            yield from _walk(item, element, file, f"{path}[{index}]", keys)
    if not isinstance(node, yaml.MappingNode):
        return
    entries = {key.value: (key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode)}
    accepted: dict[str, Any] | None
    if "class_path" in entries:
        # What `init_args` takes is the class's business; the mapping around it has these names only.
        accepted = dict.fromkeys(CLASS_NAMES, Any) | {"init_args": _import(entries["class_path"][1].value)}
    elif isinstance(hint, Mapping):
        accepted = dict(hint)
    else:
        owner = next((h for h in _alternatives(hint) if inspect.isclass(h) and h.__module__ not in _PLAIN), None)
        accepted = settings_of(owner) if owner else None
    place = Place(file, node.start_mark.line + 1, path, keys, entries, accepted)
    yield place
    for name, (_, value) in entries.items():
        inner = keys if name == "init_args" else (*keys, name)
        yield from _walk(value, (accepted or {}).get(name, Any), file, place.child(name), inner)


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union, or the hint itself."""
    if get_origin(hint) in (Union, types.UnionType):
        return [inner for member in get_args(hint) for inner in _alternatives(member)]
    return [hint]


def _is_list(hint: Any) -> bool:
    origin = get_origin(hint)
    return inspect.isclass(origin) and issubclass(origin, Iterable) and not issubclass(origin, Mapping)


def _import(class_path: str) -> Any:
    """The class, or Any if there is none."""
    module, _, name = class_path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except Exception:  # a module may fail in any way while it is imported; the parser has reported it
        return Any
