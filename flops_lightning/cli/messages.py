"""One line for what the argument parser refused: the setting and where it stands, its value, and what to write.

The parser reports a tree of all the alternatives it tried. Only its deepest lines are read here, and a report in
unknown words is passed on as it is: a new wording in the parser costs polish and no information.
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from linecache import getline
from pathlib import Path
from traceback import walk_tb
from typing import Any, NamedTuple

import yaml
from jsonargparse import ArgumentParser

from flops_lightning.cli.given import Given, names_in

CLASS_KEYS = ("class_path", "init_args", "dict_kwargs")  # what a mapping that stands for an object consists of
_NOISE = (
    *("Does not validate", "Subtypes:", "Errors:", "Given value", "Expected a path but"),
    *("Subclass types expect", "a class path (", "a dict with"),
)
_UNKNOWN = re.compile(r"(?:Group '(.+)' )?does not accept option '(.+)'|Option '(.+)' is not accepted")
_EXPECTED = re.compile(r"Expected (?:an? )?(?P<type>.+?)(?:\. Got value: (?P<value>.*))?$")
_KINDS = {
    **dict.fromkeys(("Iterable", "Sequence", "list"), "a list"),
    **dict.fromkeys(("Mapping", "dict"), "a mapping"),
    **{"NoneType": "null", "bool": "true or false", "float": "a number", "int": "a whole number", "str": "a text"},
}
PUBLIC = ("strategies", "allocators", "callbacks", "datamodules", "tasks", "network")
"""Subpackages whose classes are named without the module that defines them, so that they are found wherever it is."""
MOVED = {
    "benchmarks": "benchmarks",
    "checkpoint_io": "flops_lightning.resume.checkpoint_files",
    "planning": "flops_lightning.plan",
    "studies": "experiments",
    "tasks.optimisation": "flops_lightning.optim.optimizers",
}
"""New modules of the other names, by the old ones without ``flops_lightning.``"""


class Leaf(NamedTuple):
    """A line of the report, the keys that it stands under, and the class whose settings were read there."""

    keys: tuple[str, ...]
    owner: str
    text: str


def explain(report: str, given: Given) -> str:
    """Return the message for the report of a parser that refused the command line or a file."""
    if message := _about_command(report, given) or _about_flags(report, given) or _about_files(report, given):
        return message
    leaves = _leaves(report, given.command)
    depth = max((len(leaf.keys) for leaf in leaves), default=0)
    deepest = [leaf for leaf in leaves if len(leaf.keys) == depth]
    messages = (rule(leaf, given) for rule in (_wrong_class, _unknown, _missing) for leaf in deepest)
    return next(filter(None, messages), "") or _wrong_value(deepest, report, given)


def _about_command(report: str, given: Given) -> str:
    if 'expected "subcommand"' in report:
        example = "fit --config configs/quickstart.yaml"
        return f"no command was given. Write one of fit, plan, validate, test, predict first, for example: {example}"
    choice = re.search(r"argument subcommand: invalid choice: '(.+?)' \(choose from (.+)\)", report)
    if choice and given.command:
        return f"{given.arguments[0]} stands before the command. Write `{given.command}` first."
    if choice:
        return f"{choice[1]} is not a command. {given.hint(choice[1], re.findall('[a-z]+', choice[2]))}"
    flag = re.search(r"argument (?:-\w/)?(\S+): expected one argument", report)
    return f"{flag[1]} has no value. Write it after a space: {flag[1]} VALUE" if flag else ""


def _about_flags(report: str, given: Given) -> str:
    # The parser drops the names before one that it does not know, and takes the number of an entry for a name.
    unknown = re.findall(r"unrecognized arguments: (\S+)", report)
    refused = [name.lstrip("-").partition("=")[0] for name in unknown + re.findall(r"NestedArg\(key='([^']+)", report)]
    flags = [argument.partition("=")[0] for argument in given.arguments]
    for flag in flags:
        entry = re.match(r"--(?:\w+\.)*?(\w+)(?:\[\d+\]|\.\d+(?=\.|$))", flag)
        if entry and flag.endswith(tuple(refused)):
            return (
                f"{flag} is an entry of a list, and lists are replaced whole. Copy the list `{entry[1]}`, with the "
                "keys above it, into a file overlay.yaml, change it there, and add --config overlay.yaml."
            )
    if not unknown:
        return ""
    if not unknown[0].startswith("-"):
        example = f"Settings look like --trainer.max_epochs 3, files like --config {unknown[0]}"
        return f"{unknown[0]} is not expected here. {example}"
    name = next((flag for flag in flags if flag.endswith((f"-{refused[0]}", f".{refused[0]}"))), f"--{refused[0]}")
    group, _, last = name.lstrip("-").rpartition(".")
    known = _settings_of(given.top.get(group)) if group else list(given.top)
    return f"{name} is not a setting. {given.hint(last, known, group)}"


def _about_files(report: str, given: Given) -> str:
    unreadable = re.search("File does not exist|Problems parsing config|Unexpected config", report)
    problems = ((file, _problem_of(Path(file))) for file in given.files) if unreadable else ()
    return next((f"--config {file}: {problem}" for file, problem in problems if problem), "")


def _problem_of(file: Path) -> str:
    try:
        names = names_in(yaml.compose(file.read_text(encoding="utf-8")))
    except OSError:
        folder = file.parent if file.parent.is_dir() else Path("configs")
        near = get_close_matches(str(file), [str(each) for each in folder.glob("*.yaml")], n=1)
        remedy = f"Did you mean `{near[0]}`?" if near else "Give the path of a YAML file."
        return f"there is no such file under {Path.cwd()}. {remedy}"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        return f"{where}{error.problem}. Check the indentation (spaces, no tabs), brackets and quotes there."
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return f"not a YAML file: {' '.join(str(error).split())}. Save it as plain UTF-8 text."
    return "" if names else "holds no settings. Write them as `name: value` under trainer, model and data."


def _leaves(report: str, command: str) -> list[Leaf]:
    leaves: list[Leaf] = []
    above: list[tuple[int, str, str]] = []  # indentation, key, class
    for line in report.splitlines():
        text, indent = line.strip().removeprefix("- "), len(line) - len(line.lstrip())
        above = [each for each in above if each[0] < indent or not text]
        if key := re.match(r'Parser key "([^"]+)":\s*(.*)', text):
            above.append((indent, key[1].removeprefix(f"{command}."), ""))
            text = key[2]
        if owner := re.match(r"Problem with given class_path '(.+)':", text):
            above.append((indent, "", owner[1]))
        elif text and not text.startswith(_NOISE):
            keys = [name for _, key, _ in above for name in key.split(".") if name not in ("", "init_args")]
            leaves.append(Leaf(tuple(keys), next((each[2] for each in reversed(above) if each[2]), ""), text))
    return leaves


def _wrong_class(leaf: Leaf, given: Given) -> str:
    not_a_subclass = leaf.text.startswith("Not a valid subclass")
    if not_a_subclass and (mixed := given.find(leaf.keys, lambda node: 0 < len(_stray(node)) < len(names_in(node)))):
        stray = _stray(mixed.node)[0]
        return f"{given.name((*leaf.keys, stray))} is not a setting. {given.hint(stray, CLASS_KEYS)}"
    if not_a_subclass or _UNKNOWN.search(leaf.text):
        settings = given.find((*leaf.keys, "init_args"))
        flags = [re.sub(r"^--|\.init_args|\.class_path$|=.*", "", argument) for argument in given.arguments]
        if settings and not given.find((*leaf.keys, "class_path")) and ".".join(leaf.keys) not in flags:
            key = f"{settings.key.removesuffix('init_args')}class_path"
            return f"{key} is not given. Add it above `init_args:` ({settings.place})."
    match = re.search(r"(?:Import path |dot import path string: )([\w.]+)(?:.* subclass of (.+))?", leaf.text)
    path = match[1] if match else leaf.owner
    problem = f" is not a {match[2]}. Name a class that is one." if match and match[2] else _why_no_class(path)
    entry = given.find((*leaf.keys, "class_path"), lambda node: node.value == path)
    where = f"{entry.key} ({entry.place})" if entry else ".".join(leaf.keys)
    return f"{where} = {path}{problem}" if problem else ""


def _why_no_class(path: str) -> str:
    if not path or _import(path):
        return ""
    if new := new_name(path):
        return f": it has moved. Write {new}."
    module_name, _, name = path.rpartition(".")
    try:
        module = import_module(module_name or "flops_lightning")
    except Exception as error:  # a module may fail in any way while it is imported
        return f": {error}. Correct the module or its name, or install what it needs."
    names = [n for n in getattr(module, "__all__", dir(module)) if n[0].isupper()]
    near = get_close_matches(name, names, n=1, cutoff=0.5) or ["tasks.ForwardImageClassifier"]
    problem = f"{module_name} has no class of this name." if module_name else "the module is missing."
    return f": {problem} Did you mean `{module.__name__}.{near[0]}`?"


def _unknown(leaf: Leaf, given: Given) -> str:
    match = _UNKNOWN.search(leaf.text)
    if not match:
        return ""
    names = [n for n in ".".join(filter(None, match.groups())).split(".") if n != "init_args"]
    known, outer = _settings_of(_import(leaf.owner)) if leaf.owner else list(given.top), leaf.keys
    if not leaf.owner and names[0] in known and len(names) > 1:
        known, outer, names = _settings_of(given.top[names[0]]), (*outer, names[0]), names[1:]
    return f"{given.name((*outer, names[0]))} is not a setting. {given.hint(names[0], known, '.'.join(outer))}"


def _missing(leaf: Leaf, given: Given) -> str:
    match = re.search("the following arguments are required: (.+)", leaf.text)
    if not match:
        return ""
    names = [name.removeprefix(f"{given.command}.") for name in match[1].split(", ")]
    if not leaf.keys:
        sections = " and ".join(f"`{name}:`" for name in names)
        return f"{' and '.join(names)} not given. Add --config FILE, a YAML file with {sections}."
    if entry := given.find(leaf.keys, lambda node: bool(_stray(node)) and names[0] not in names_in(node)):
        return f"{entry.key}.{names[0]} is not given. Add `{names[0]}:` below {entry.key} ({entry.place})."
    whole = ".".join((*leaf.keys, names[0]))
    return f"{whole} is not given. Add --{whole} VALUE, or `{names[0]}:` in the file."


def _wrong_value(leaves: Sequence[Leaf], report: str, given: Given) -> str:
    keys = leaves[0].keys if leaves else ()
    matches = [match for leaf in leaves if (match := _EXPECTED.match(leaf.text))]
    others = [leaf.text for leaf in leaves if not leaf.text.startswith(("Expected", "Not a valid subclass"))]
    if others or not (matches and keys):
        return ": ".join(filter(None, [".".join(keys), *others[:1]])) or report
    values = [match["value"] for match in matches if match["value"] is not None]
    values += re.findall(r"Given value: (?:NestedArg\(key='[^']*', val='(?=.*'\)))?(.*?)(?:'\))?$", report, re.M)
    value = values[0] if values else ""
    where = given.name(keys, lambda node: not isinstance(node, yaml.ScalarNode) or node.value == value)
    shown = f" = {value}" if len(value) <= 60 else ""
    literals = [literal for match in matches for literal in re.findall(r"Literal\[(.+)\]", match["type"])]
    choices = list(dict.fromkeys(re.findall(r"[^,\s'\"]+", " ".join(literals))))
    types = [re.sub(r"<class '(.+)'>", r"\1", m["type"]).rstrip(".:").rpartition(".")[2] for m in matches]
    kinds = {_KINDS.get(kind, kind): None for kind in types if "Literal[" not in kind and "]" not in kind}
    if "a number" in kinds:
        kinds.pop("a whole number", None)
    wanted = [*([f"one of {', '.join(choices)}"] if choices else []), *sorted(kinds, key="null".__eq__)]
    near = get_close_matches(value, choices, n=1)
    return f"{where}{shown}: write {' or '.join(wanted)}.{f' Did you mean `{near[0]}`?' if near else ''}"


def _stray(node: yaml.Node) -> list[str]:
    """Names in a mapping that do not belong to one that stands for an object."""
    return [name for name in names_in(node) if name not in CLASS_KEYS]


def _settings_of(owner: Any) -> list[str]:
    """Names of what a class takes, those that it passes on to its bases included."""
    try:
        return [] if owner is None else ArgumentParser().add_class_arguments(owner, fail_untyped=False)
    except Exception:  # a class of the user's may be anything; then nothing is suggested
        return []


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name)
    except Exception:  # a module may fail in any way while it is imported
        return None


def new_name(path: str) -> str:
    """The dotted name that a class of this package now has; empty if it has not moved or was never there."""
    package, _, inner = path.partition(".")
    module, _, name = inner.rpartition(".")
    if package != "flops_lightning" or module in PUBLIC:
        return ""
    for public in PUBLIC:
        if name in import_module(f"flops_lightning.{public}").__all__:
            return f"flops_lightning.{public}.{name}"
    old = next((old for old in MOVED if f"{module}.".startswith(f"{old}.")), "")
    return f"{MOVED[old]}{module.removeprefix(old)}.{name}" if old else ""


def refused_by_lightning(error: BaseException) -> bool:
    """Whether a line ``raise`` of Lightning raised the error: its Trainer and callbacks refuse settings like that."""
    if type(error) not in (ValueError, RuntimeError) or error.__traceback__ is None:
        return False
    frame, line = list(walk_tb(error.__traceback__))[-1]
    name = str(frame.f_globals.get("__name__"))
    return name.startswith("lightning.") and getline(frame.f_code.co_filename, line).lstrip().startswith("raise ")
