"""Turn what the argument parser reports into one short message: the setting, where it stands, and what to write.

The parser's own report is a tree of every alternative it tried, often hundreds of characters a line. Only its leaves
are read here; a leaf of an unknown form is passed on as it is, so a new wording in the parser costs polish and no
information.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module

import yaml

import flops_lightning
from flops_lightning.cli.places import CLASS_NAMES
from flops_lightning.cli.usage import Context, did_you_mean, explain_usage

_NOISE = (
    *("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a path but"),
    *("Subclass types expect", "a class path (", "a dict with"),
)
_UNKNOWN = re.compile(r"(?:[Oo]ption '(?P<a>[^']+)' is not accepted|does not accept option '(?P<b>[^']+)')")
_REQUIRED = re.compile(r"the following arguments are required: (?P<names>.+)")
_CLASS = re.compile(r"(?:given class_path '|Import path |dot import path string: )(?P<path>[\w.]+)")
_EXPECTED = re.compile(r"Expected (?:an? )?(?P<type>.+?)(?:\. Got value: (?P<value>.*))?$")

EXAMPLE = "Write the class with its module, as in flops_lightning.tasks.ForwardImageClassifier."
_KINDS = {
    "Iterable": "a list",
    "Mapping": "a mapping",
    "NoneType": "null",
    "Sequence": "a list",
    "bool": "true or false",
    "dict": "a mapping",
    "float": "a number",
    "int": "a whole number",
    "list": "a list",
    "str": "a text",
}


@dataclass(frozen=True)
class Leaf:
    """One line of the report with the keys it stands under."""

    keys: tuple[str, ...]
    text: str


def explain(report: str, context: Context) -> str:
    """Return the message for the report of a parser that refused the command line or a file."""
    about_usage = explain_usage(report, context)
    if about_usage:
        return about_usage
    leaves = _leaves(report, context.subcommand)
    depth = max((len(leaf.keys) for leaf in leaves), default=0)
    deepest = [leaf for leaf in leaves if len(leaf.keys) == depth]
    for describe in (_unknown, _required, _class_path):
        for leaf in deepest:
            message = describe(leaf, context)
            if message:
                return message
    return _wrong_value(deepest, report, context)


def _leaves(report: str, subcommand: str) -> list[Leaf]:
    """The lines of the report that say something, each with the keys that it is indented below."""
    leaves: list[Leaf] = []
    open_keys: list[tuple[int, str]] = []
    for line in report.splitlines():
        indent = len(line) - len(line.lstrip())
        text = line.strip().removeprefix("- ")
        if text:
            open_keys = [(i, name) for i, name in open_keys if i < indent]
        key = re.match(r'Parser key "([^"]+)":\s*(.*)', text)
        if key:
            open_keys.append((indent, key[1].removeprefix(f"{subcommand}.")))
            text = key[2]
        if text and not text.startswith(_NOISE):
            names = ".".join(name for _, name in open_keys).split(".")
            leaves.append(Leaf(tuple(name for name in names if name and name != "init_args"), text))
    return leaves


def _unknown(leaf: Leaf, context: Context) -> str:
    """An unknown name, with the closest known one."""
    match = _UNKNOWN.search(leaf.text)
    if not match:
        return ""
    no_class = _not_a_class(leaf, context)  # without its class, none of a mapping's settings is known
    if no_class:
        return no_class
    group = re.search(r"Group '([^']+)'", leaf.text)
    *outer, _ = names = [n for n in (match["a"] or match["b"]).split(".") if n != "init_args"]
    above = (*leaf.keys, *(group[1].split(".") if group else ()))
    for place in context.places():
        for depth, name in enumerate(names):
            known = place.accepted
            stray = name in place.entries and known is not None and name not in known
            if stray and known is not None and place.is_below((*above, *names[:depth])):
                hint = did_you_mean(name, list(known)) or context.see_help(place.path)
                return f"{place.child(name)} ({place.at(name)}) is not a setting. {hint}"
    whole = ".".join((*above, *names))
    siblings = context.names_in(".".join((*above, *outer)))
    return f"{whole} is not a setting. {did_you_mean(names[-1], siblings) or context.see_help(whole)}"


def _required(leaf: Leaf, context: Context) -> str:
    """Settings without which nothing can be built."""
    match = _REQUIRED.search(leaf.text)
    if not match:
        return ""
    names = [name.removeprefix(f"{context.subcommand}.") for name in match["names"].split(", ")]
    if not leaf.keys:
        sections = " and ".join(f"`{name}:`" for name in names)
        return f"{' and '.join(names)} not given. Add --config FILE, a YAML file with {sections}."
    for place in context.places():
        lacks = place.accepted is not None and names[0] in place.accepted and names[0] not in place.entries
        if lacks and place.is_below(leaf.keys):
            return f"{place.child(names[0])} is not given. Add `{names[0]}:` below {place.path} ({place.at('')})."
    whole = ".".join((*leaf.keys, names[0]))
    return f"{whole} is not given. Add --{whole} VALUE, or `{names[0]}:` in the file."


def _class_path(leaf: Leaf, context: Context) -> str:
    """A class that cannot be found, or does not fit, or is not named."""
    if leaf.text.startswith("Not a valid subclass"):
        return _not_a_class(leaf, context)
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
    return f"{where} = {path}: {_why_no_class(path)}"


def _not_a_class(leaf: Leaf, context: Context) -> str:
    """A mapping that should name a class and its settings, and does something else."""
    for place in context.places():
        if place.is_below(leaf.keys) and ("init_args" in place.entries or "class_path" in place.entries):
            for name in place.entries:
                if name not in CLASS_NAMES:
                    return f"{place.child(name)} ({place.at(name)}) is not a setting. {did_you_mean(name, CLASS_NAMES)}"
            if "class_path" not in place.entries:
                return f"{place.child('class_path')} is not given. Add it above `init_args:` ({place.at('init_args')})."
    return ""


def _why_no_class(path: str) -> str:
    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name or flops_lightning.__name__)
    except Exception as error:  # a module may fail in any way while it is imported
        return f"{error}. Correct the module or its name, or install what it needs."
    problem = f"{module_name} has no class of this name." if module_name else "the module is missing."
    names = [n for n in getattr(module, "__all__", dir(module)) if n[0].isupper()]
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    return f"{problem} Did you mean `{module.__name__}.{close[0]}`?" if close else f"{problem} {EXAMPLE}"


def _wrong_value(leaves: Sequence[Leaf], report: str, context: Context) -> str:
    """A value of the wrong type, or a report in words that are not known here."""
    keys = leaves[0].keys if leaves else ()
    matches = [match for leaf in leaves if (match := _EXPECTED.match(leaf.text))]
    others = [leaf.text for leaf in leaves if not leaf.text.startswith(("Expected", "Not a valid subclass"))]
    if others or not (matches and keys):
        return ": ".join([*([".".join(keys)] if keys else []), *others[:1]]) or report
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
            kind = re.sub(r"[\w.]+\.(\w+)", r"\1", kind)
            kind = _KINDS.get(kind, kind)
            kinds += [kind] if kind not in kinds else []
    if "a number" in kinds and "a whole number" in kinds:
        kinds.remove("a whole number")
    return choices, sorted(kinds, key="null".__eq__)
