"""What the user gave on the command line and in files, and where in them a setting stands."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import yaml


class Entry(NamedTuple):
    """A value in a file, with its full key and its place, as in ``given.yaml, line 3``."""

    key: str
    place: str
    node: yaml.Node


@dataclass(frozen=True)
class Given:
    """What the user gave."""

    arguments: Sequence[str]
    command: str  # ``fit`` or another; empty if none was given
    top: Mapping[str, type | None]
    """The settings at the top of a file, each with the class that takes those below it, or None."""

    @property
    def files(self) -> list[str]:
        """Files given with ``--config`` or ``-c``, in order."""
        after = [value for flag, value in pairwise(self.arguments) if flag in ("--config", "-c")]
        return after + [arg.partition("=")[2] for arg in self.arguments if arg.startswith("--config=")]

    def find(self, keys: Sequence[str], fits: Callable[[yaml.Node], bool] = bool) -> Entry | None:
        """The entry below ``keys`` that fits; the files given last are searched first, because they win."""
        for file in reversed(self.files):
            try:
                root = yaml.compose(Path(file).read_text(encoding="utf-8"))
            except (OSError, UnicodeDecodeError, yaml.YAMLError):
                continue
            for key, line, node in _entries(root, keys, "", 1):
                if fits(node):
                    return Entry(key, f"{file}, line {line}", node)
        return None

    def name(self, keys: Sequence[str], fits: Callable[[yaml.Node], bool] = bool) -> str:
        """A setting as the user wrote it, with its place if it stands in a file."""
        entry = self.find(keys, fits)
        return f"{entry.key} ({entry.place})" if entry else ".".join(keys)

    def hint(self, name: str, choices: Sequence[str], group: str = "") -> str:
        """The closest choice, all of them if there are few, or else the command that lists the settings of a group."""
        if close := get_close_matches(name, choices, n=1):
            return f"Did you mean `{close[0]}`?"
        if 0 < len(choices) <= 12:
            return f"Choose one of: {', '.join(sorted(choices))}."
        top = group.partition(".")[0]
        return f"See: python main.py {self.command} --{f'{top}.help CLASS' if top in ('model', 'data') else 'help'}"


def _entries(node: yaml.Node | None, keys: Sequence[str], path: str, line: int) -> Iterator[tuple[str, int, yaml.Node]]:
    """Full key, line and node of everything that ``keys`` lead to, through lists and ``init_args``."""
    if node is not None and not keys:
        yield path, line, node
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _entries(item, keys, f"{path}[{index}]", item.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = f"{path}.{key.value}" if path else str(key.value)
            if keys and key.value == keys[0]:
                yield from _entries(value, keys[1:], inner, key.start_mark.line + 1)
            elif key.value == "init_args":
                yield from _entries(value, keys, inner, value.start_mark.line + 1)


def names_in(node: yaml.Node | None) -> list[str]:
    """The names of a mapping; none of anything else."""
    return [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
