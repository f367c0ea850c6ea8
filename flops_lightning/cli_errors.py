"""Turn what the argument parser reports into one short message: the setting, where it stands, and what to write.

The parser's own report is a tree of every alternative it tried, often hundreds of characters a line. Only its leaves
are read here; a leaf of an unknown form is passed on as it is, so a new wording in the parser costs polish and no
information.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

import flops_lightning
from flops_lightning.cli_places import Place, places, settings_of

_NOISE = ("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a path but", "Subclass types expect")
_UNKNOWN = re.compile(r"(?:[Oo]ption '(?P<a>[^']+)' is not accepted|does not accept option '(?P<b>[^']+)')")
_REQUIRED = re.compile(r"the following arguments are required: (?P<names>.+)")
_CLASS = re.compile(r"(?:given class_path '|Import path |dot import path string: )(?P<path>[\w.]+)")
_EXPECTED = re.compile(r"Expected (?:an? )?(?P<type>.+?)(?:\. Got value: (?P<value>.*))?$")
_LONGEST_LIST = 12


@dataclass(frozen=True)
class Leaf:
    """One line of the report with the keys it stands under."""

    keys: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Context:
    """What the user gave, to look the refused setting up in.

    Attributes:
        arguments: The command line.
        subcommand: ``fit`` or another; empty if none was given.
        top: Type hints by name of the settings at the top of a file.
    """

    arguments: Sequence[str]
    subcommand: str
    top: Mapping[str, Any]

    def files(self) -> list[str]:
        """Files given with ``--config`` or ``-c``, in order."""
        pairs = zip(self.arguments, [*self.arguments[1:], ""], strict=True)
        following = [value for flag, value in pairs if flag in ("--config", "-c")]
        return following + [arg.partition("=")[2] for arg in self.arguments if arg.startswith("--config=")]

    def places(self) -> list[Place]:
        """Every mapping of those files."""
        return places(self.files(), self.top)


def explain(report: str, context: Context) -> str:
    """Return the message for the report of a parser that refused the command line or a file."""
    whole = _about_command_line(report, context) or _about_files(report, context)
    if whole:
        return whole
    leaves = _leaves(report, context.subcommand)
    depth = max((len(leaf.keys) for leaf in leaves), default=0)
    deepest = [leaf for leaf in leaves if len(leaf.keys) == depth]
    for describe in (_unknown, _required, _class_path):
        for leaf in deepest:
            message = describe(leaf, context)
            if message:
                return message
    return _wrong_value(deepest, report, context)


def did_you_mean(name: str, choices: Sequence[str]) -> str:
    """The closest choice, or all of them if there are few, as a sentence."""
    close = get_close_matches(name, choices, n=1)
    if close:
        return f"Did you mean `{close[0]}`?"
    if 0 < len(choices) <= _LONGEST_LIST:
        return f"Choose one of: {', '.join(sorted(choices))}."
    return ""


def _leaves(report: str, subcommand: str) -> list[Leaf]:
    leaves: list[Leaf] = []
    open_keys: list[tuple[int, str]] = []
    for line in report.splitlines():
        text = line.strip().removeprefix("- ")
        indent = len(line) - len(line.lstrip())
        key = re.match(r'Parser key "([^"]+)":\s*(.*)', text)
        if key:
            open_keys = [(i, name) for i, name in open_keys if i < indent]
            open_keys.append((indent, key[1].removeprefix(f"{subcommand}.")))
            text = key[2]
        if text and not text.startswith(_NOISE):
            names = ".".join(name for i, name in open_keys if i <= indent).split(".")
            leaves.append(Leaf(tuple(name for name in names if name and name != "init_args"), text))
    return leaves


def _about_command_line(report: str, context: Context) -> str:
    """Faults of the command line itself."""
    if 'expected "subcommand"' in report:
        return (
            "no command was given. Write one of fit, validate, test, predict first, "
            "for example: fit --config configs/vit_tiny_digits.yaml"
        )
    choice = re.search(r"argument subcommand: invalid choice: '(.+?)' \(choose from (.+)\)", report)
    if choice:
        return f"{choice[1]} is not a command. {did_you_mean(choice[1], re.findall(r'[a-z]+', choice[2]))}"
    unknown = re.search(r"unrecognized arguments: (.+)", report)
    if not unknown:
        return ""
    given = unknown[1].split()[0]
    if not given.startswith("-"):
        return f"{given} is not expected here. Settings look like --trainer.max_epochs 3, files like --config {given}"
    name = given.partition("=")[0]
    group, _, last = name.lstrip("-").rpartition(".")
    siblings = _accepted_on_command_line(group, context)
    return f"{name} is not a setting. {did_you_mean(last, siblings) or _see_help(group, context)}"


def _about_files(report: str, context: Context) -> str:
    """Files that are missing or are not YAML mappings."""
    if "File does not exist" in report or "Problems parsing config" in report or "Unexpected config" in report:
        for file in context.files():
            problem = _problem_of_file(Path(file))
            if problem:
                return f"--config {file}: {problem}"
    return ""


def _problem_of_file(file: Path) -> str:
    if not file.is_file():
        folder = file.parent if file.parent.is_dir() else Path("configs")
        names = [str(path) for path in folder.glob("*.yaml")]
        return f"there is no such file under {Path.cwd()}. {did_you_mean(str(file), names)}".rstrip()
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        return f"{where}{error.problem}. Check the indentation (spaces, no tabs), brackets and quotes there."
    except yaml.YAMLError as error:
        return f"not a YAML file: {' '.join(str(error).split())} Save it as plain UTF-8 text."
    if not isinstance(node, yaml.MappingNode):
        return "holds no settings. Write them as `name: value` under trainer, model and data."
    return ""


def _unknown(leaf: Leaf, context: Context) -> str:
    """An unknown name, with the closest known one."""
    match = _UNKNOWN.search(leaf.text)
    if not match:
        return ""
    group = re.search(r"Group '([^']+)'", leaf.text)
    *outer, _ = names = [n for n in (match["a"] or match["b"]).split(".") if n != "init_args"]
    above = (*leaf.keys, *(group[1].split(".") if group else ()))
    for place in context.places():
        for depth, name in enumerate(names):
            known = place.accepted
            stray = name in place.entries and known is not None and name not in known
            if stray and known is not None and place.is_below((*above, *names[:depth])):
                hint = did_you_mean(name, list(known)) or _see_help(place.path, context)
                return f"{place.child(name)} ({place.at(name)}) is not a setting. {hint}"
    whole = ".".join((*above, *names))
    siblings = _accepted_on_command_line(".".join((*above, *outer)), context)
    return f"{whole} is not a setting. {did_you_mean(names[-1], siblings) or _see_help(whole, context)}"


def _required(leaf: Leaf, context: Context) -> str:
    """Settings without which nothing can be built."""
    match = _REQUIRED.search(leaf.text)
    if not match:
        return ""
    names = [name.removeprefix(f"{context.subcommand}.") for name in match["names"].split(", ")]
    if not leaf.keys:
        return (
            f"{' and '.join(names)} not given. Add --config FILE with a `{names[0]}:` section, or --{names[0]} CLASS."
        )
    for place in context.places():
        lacks = place.accepted is not None and names[0] in place.accepted and names[0] not in place.entries
        if lacks and place.is_below(leaf.keys):
            return f"{place.child(names[0])} is not given. Add `{names[0]}:` below {place.path} ({place.at('')})."
    whole = ".".join((*leaf.keys, names[0]))
    return f"{whole} is not given. Add --{whole} VALUE, or `{names[0]}:` in the file."


def _class_path(leaf: Leaf, context: Context) -> str:
    """A class that cannot be found, or does not fit."""
    match = _CLASS.search(leaf.text)
    if not match:
        return ""
    path = match["path"].rstrip(".")
    place = next(
        (p for p in context.places() if "class_path" in p.entries and p.entries["class_path"][1].value == path), None
    )
    where = f"{place.child('class_path')} ({place.at('class_path')})" if place else ".".join(leaf.keys)
    fitting = re.search(r"subclass of (.+)", leaf.text)
    if fitting:
        return f"{where} = {path} is not a {fitting[1]}. Name a class that is one."
    return f"{where} = {path}: there is no such class. {_closest_class(path)}"


def _closest_class(path: str) -> str:
    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name) if module_name else flops_lightning
    except ImportError:
        module = flops_lightning
    names = [n for n in getattr(module, "__all__", dir(module)) if not n.startswith("_")]
    close = get_close_matches(name, names, n=1)
    if close:
        return f"Did you mean `{module.__name__}.{close[0]}`?"
    return "Write the class with its module, as in flops_lightning.tasks.ForwardImageClassifier."


def _wrong_value(leaves: Sequence[Leaf], report: str, context: Context) -> str:
    """A value of the wrong type, or a report in words that are not known here."""
    keys = leaves[0].keys if leaves else ()
    matches = [match for leaf in leaves if (match := _EXPECTED.match(leaf.text))]
    if not keys or not matches:
        return " ".join(leaf.text for leaf in leaves) or report
    values = [m["value"] for m in matches if m["value"] is not None]
    values += re.findall(
        r"Given value: (?:NestedArg\(key='[^']*', val='(?=.*'\)))?(.*?)(?:'\))?$", report, re.MULTILINE
    )
    value = values[0] if values else ""
    choices, kinds = _readable([m["type"] for m in matches])
    where = ".".join(keys)
    for place in context.places():
        if keys[-1] in place.entries and place.is_below(keys[:-1]):
            node = place.entries[keys[-1]][1]
            if not isinstance(node, yaml.ScalarNode) or node.value == value:
                where = f"{place.child(keys[-1])} ({place.at(keys[-1])})"
                break
    shown = f" = {value}" if len(value) <= 60 else ""
    wanted = " or ".join([*(["one of " + ", ".join(choices)] if choices else []), *kinds])
    close = get_close_matches(value, choices, n=1)
    return f"{where}{shown}: write {wanted}.{f' Did you mean `{close[0]}`?' if close else ''}"


def _readable(types: Sequence[str]) -> tuple[list[str], list[str]]:
    """Choices and kinds of value out of the parser's type names."""
    choices: list[str] = []
    kinds: list[str] = []
    for text in types:
        literal = re.search(r"Literal\[(.+)\]", text)
        if literal:
            choices += [c for c in re.findall(r"[^,\s'\"]+", literal[1]) if c not in choices]
        else:
            kind = re.sub(r"<class '([^']+)'>", r"\1", text).rstrip(".:")
            kind = re.sub(r"[\w.]+\.(\w+)", r"\1", kind).replace("NoneType", "null")
            kinds += [kind] if kind not in kinds else []
    return choices, sorted(kinds, key="null".__eq__)


def _accepted_on_command_line(group: str, context: Context) -> list[str]:
    """Names accepted inside ``group``, given without ``init_args``."""
    wanted = tuple(name for name in group.split(".") if name and name != "init_args")
    if not wanted:
        return list(context.top)
    for place in context.places():
        if place.keys == wanted and place.accepted is not None and "class_path" not in place.accepted:
            return list(place.accepted)
    return list(settings_of(context.top[group]) or ()) if inspect.isclass(context.top.get(group)) else []


def _see_help(path: str, context: Context) -> str:
    group = path.partition(".")[0]
    command = (
        f"{context.subcommand} --{group}.help CLASS" if group in ("model", "data") else f"{context.subcommand} --help"
    )
    return f"See: python main.py {command}"
