"""What the user gave on the command line, and messages about faults in that: commands, flags, files."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from flops_lightning.cli.places import Place, places, settings_of

_LONGEST_LIST = 12


@dataclass(frozen=True)
class Context:
    """What the user gave, to look a refused setting up in.

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

    def names_in(self, group: str) -> list[str]:
        """Names accepted inside ``group``, a dotted key without ``init_args``."""
        wanted = tuple(name for name in group.split(".") if name and name != "init_args")
        if not wanted:
            return list(self.top)
        for place in self.places():
            if place.keys == wanted and place.accepted is not None and "class_path" not in place.accepted:
                return list(place.accepted)
        owner = self.top.get(group)
        return list(settings_of(owner) or ()) if inspect.isclass(owner) else []

    def see_help(self, key: str) -> str:
        """The command that lists the settings around ``key``."""
        group = key.partition(".")[0]
        flag = f"--{group}.help CLASS" if group in ("model", "data") else "--help"
        return f"See: python main.py {self.subcommand} {flag}"


def did_you_mean(name: str, choices: Sequence[str]) -> str:
    """The closest choice, or all of them if there are few, as a sentence."""
    close = get_close_matches(name, choices, n=1)
    if close:
        return f"Did you mean `{close[0]}`?"
    if 0 < len(choices) <= _LONGEST_LIST:
        return f"Choose one of: {', '.join(sorted(choices))}."
    return ""


def explain_usage(report: str, context: Context) -> str:
    """The message for a fault of the command line or of a whole file; empty if the fault lies in a setting."""
    entry = _list_entry(report, context)
    if entry:
        return entry
    unknown = re.search(r"unrecognized arguments: (\S+)", report)
    if unknown:
        return _stray_argument(unknown[1], context)
    no_value = re.search(r"argument (?:-\w/)?(\S+): expected one argument", report)
    if no_value:
        return f"{no_value[1]} has no value. Write it after a space: {no_value[1]} VALUE"
    if "File does not exist" in report or "Problems parsing config" in report or "Unexpected config" in report:
        problems = ((file, _problem_of(Path(file))) for file in context.files())
        return next((f"--config {file}: {problem}" for file, problem in problems if problem), "")
    return _about_command(report, context)


def _about_command(report: str, context: Context) -> str:
    if 'expected "subcommand"' in report:
        return (
            "no command was given. Write one of fit, plan, validate, test, predict first, "
            "for example: fit --config configs/vit_tiny_digits.yaml"
        )
    choice = re.search(r"argument subcommand: invalid choice: '(.+?)' \(choose from (.+)\)", report)
    if choice and context.subcommand:
        return f"{context.arguments[0]} stands before the command. Write `{context.subcommand}` first."
    if choice:
        return f"{choice[1]} is not a command. {did_you_mean(choice[1], re.findall(r'[a-z]+', choice[2]))}"
    return ""


def _list_entry(report: str, context: Context) -> str:
    """The message for an override of one entry of a list; empty if the fault is another."""
    # The parser names such a setting without what stands before the number, or takes the number for a setting.
    refused = re.findall(r"(?:unrecognized arguments: --|NestedArg\(key=')([^\s'=]+)", report)
    for argument in context.arguments:
        flag = argument.partition("=")[0]
        entry = re.match(r"--(.+?)(?:\[\d+\]|\.\d+(?=\.|$))", flag)
        if entry and flag.endswith(tuple(refused)):
            name = entry[1].rpartition(".")[2]
            return (
                f"{flag} is an entry of a list, and lists are replaced whole. Copy the list `{name}`, with the keys "
                "above it, into a file overlay.yaml, change it there, and add --config overlay.yaml."
            )
    return ""


def _stray_argument(given: str, context: Context) -> str:
    if not given.startswith("-"):
        return f"{given} is not expected here. Settings look like --trainer.max_epochs 3, files like --config {given}"
    stray = given.partition("=")[0].lstrip("-")
    flags = [argument.partition("=")[0] for argument in context.arguments]
    # The parser drops the names before one that it cannot place.
    name = next((flag for flag in flags if flag.endswith((f"-{stray}", f".{stray}"))), f"--{stray}")
    group, _, last = name.lstrip("-").rpartition(".")
    return f"{name} is not a setting. {did_you_mean(last, context.names_in(group)) or context.see_help(group)}"


def _problem_of(file: Path) -> str:
    """Why no settings can be read from ``file``; empty if they can."""
    if not file.is_file():
        folder = file.parent if file.parent.is_dir() else Path("configs")
        names = [str(path) for path in folder.glob("*.yaml")]
        remedy = did_you_mean(str(file), names) or "Give the path of a YAML file."
        return f"there is no such file under {Path.cwd()}. {remedy}"
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        return f"{where}{error.problem}. Check the indentation (spaces, no tabs), brackets and quotes there."
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        return f"not a YAML file: {' '.join(str(error).split())}. Save it as plain UTF-8 text."
    if not isinstance(node, yaml.MappingNode):
        return "holds no settings. Write them as `name: value` under trainer, model and data."
    return ""
