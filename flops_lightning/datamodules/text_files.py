"""JSON lines with texts: prompts and completions, conversations, or texts with labels."""

import json
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flops_lightning.errors import SettingError, check_path

FORMS = (
    'Write {"prompt": "...", "completion": "..."}, or {"messages": [{"role": "user", "content": "..."}, ...]}, or give '
    "data.template and data.choices for texts with labels."
)


HALF = "has half a character: an emoji was cut in two, as \\ud83d alone"


def is_whole(text: str) -> bool:
    """Whether a text has whole characters alone, as tokenizers want; JSON may hold halves of those beyond 16 bits."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class TextEntry:
    """A line of a file.

    Attributes:
        place: By what messages call it, as ``line 17``.
        prompt: What comes first: a text, or the messages before the last.
        candidates: Its completions.
        label: The right one.
    """

    place: str
    prompt: str | list[dict[str, str]]
    candidates: tuple[str, ...]
    label: int = 0


@dataclass(frozen=True)
class LabelledForm:
    """How a text with a label becomes a prompt with candidates.

    Attributes:
        template: The prompt, with the names of an entry's fields in braces, as in ``{text} It was``.
        choices: The candidates, in the order of the labels.
    """

    template: str
    choices: tuple[str, ...]

    def __post_init__(self) -> None:
        try:
            fields = self.fields
        except ValueError as error:
            remedy = "Write, for example, {text} It was"
            raise SettingError("data.template", self.template, f"is not a valid template ({error}).", remedy) from error
        if not fields or not all(name.isidentifier() for name in fields):
            problem, remedy = "names no field of the entries in braces.", 'Write, for example, "{text} It was".'
            raise SettingError("data.template", self.template, problem, remedy)
        if len(self.choices) < 2 or len({word.strip() for word in self.choices} - {""}) < len(self.choices):
            problem, remedy = (
                "must be two texts or more, all different.",
                'Write, for example, [" terrible", " great"].',
            )
            raise SettingError("data.choices", list(self.choices), problem, remedy)

    @property
    def fields(self) -> list[str]:
        """Names of the fields in the template."""
        return [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]

    def entry(self, place: str, line: Mapping[str, Any]) -> TextEntry:
        """The entry of a line; a label is a number from 0, or one of the choices."""
        missing = [name for name in (*self.fields, "label") if name not in line]
        if missing:
            raise ValueError(f"has no {missing[0]!r}, only {sorted(line)}")
        words, label = [word.strip() for word in self.choices], line["label"]
        number = words.index(label.strip()) if isinstance(label, str) and label.strip() in words else label
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(words):
            raise ValueError(f"has the label {label!r}, which is neither 0 to {len(words) - 1} nor one of {words}")
        for name in self.fields:
            if not isinstance(line[name], (str, int, float)):
                raise ValueError(f"has {line[name]!r} for {name!r}, which is no text or number")
            if not str(line[name]).strip():
                raise ValueError("is empty")
        return TextEntry(place, self.template.format_map(line), self.choices, number)


def read_texts(setting: str, file: str, form: LabelledForm | None) -> list[TextEntry]:
    """The entries of a file, one a line; empty lines do not count.

    Raises:
        SettingError: the file cannot be read, or a line is of no form, or empty; it is named.
    """
    check_path(setting, file, "Give a file of JSON lines.")
    try:
        # Not splitlines(), which would also end a line at U+2028 and its like; -sig: Windows puts a mark in front.
        lines = Path(file).expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(setting, file, f"cannot be read ({error}).", "Give a file of JSON lines.") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            read = json.loads(line)
            if "\\u" in line and not is_whole(json.dumps(read, ensure_ascii=False)):
                raise ValueError(HALF)
            found.append(_entry(f"line {number}", read, form))
        except json.JSONDecodeError as error:
            problem = f"line {number} is not JSON ({error})."
            raise SettingError(setting, file, problem, "Write one JSON object a line.") from error
        except ValueError as error:
            remedy = FORMS if form is None else f"Write the fields {[*form.fields, 'label']} in every line."
            raise SettingError(setting, file, f"line {number} {error}.", remedy) from error
    if not found:
        raise SettingError(setting, file, "has no entries.", "Write one JSON object a line.")
    return found


def _entry(place: str, line: Any, form: LabelledForm | None) -> TextEntry:
    if not isinstance(line, Mapping):
        raise ValueError(f"is a {type(line).__name__}")
    if form is not None:
        return form.entry(place, line)
    if "messages" in line:
        return _conversation(place, line["messages"])
    missing = [name for name in ("prompt", "completion") if not isinstance(line.get(name), str)]
    if missing:
        raise ValueError(f"has no text {missing[0]!r}, only {sorted(line)}")
    if not line["completion"].strip():
        raise ValueError("has an empty completion")
    return TextEntry(place, line["prompt"], (line["completion"],))


def _conversation(place: str, messages: Sequence[Any]) -> TextEntry:
    known = isinstance(messages, list) and all(isinstance(message, Mapping) for message in messages)
    known = known and all(isinstance(m.get(name), str) for m in messages for name in ("role", "content"))
    if not known:
        raise ValueError("has messages that are no list of a role and a content each")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError("has messages whose last is no answer of the role 'assistant'")
    if not messages[-1]["content"].strip():
        raise ValueError("has an empty answer")
    return TextEntry(place, [dict(m) for m in messages[:-1]], (messages[-1]["content"],))
