"""Objects that remember the settings they were made with, so that a checkpoint can say what it was trained with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

K = TypeVar("K", bound="KeepsSettings")


class KeepsSettings:
    """Keeps the arguments of its constructor as plain values; subclasses need not do anything.

    Attributes:
        settings: Values by name, defaults included (:func:`plain`).
    """

    settings: dict[str, Any]

    def __new__(cls: type[K], *args: Any, **given: Any) -> K:
        """Note the arguments before the constructor reads them."""
        made = super().__new__(cls)
        made.settings = constructor_settings(cls, args, given)
        return made

    def __init__(self) -> None:
        """Refuse arguments where no subclass takes any: beside a ``__new__``, that of ``object`` would swallow them."""


def constructor_settings(cls: type, args: tuple[Any, ...], given: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values of a constructor's arguments by name, without what it does not take and what it takes by ``*``.

    Arguments that are wrong are the constructor's to refuse.
    """
    parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]  # type: ignore[misc]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    values = {p.name: p.default for p in named if p.default is not p.empty}
    values |= dict(zip((p.name for p in named), args, strict=False))
    values |= {name: value for name, value in given.items() if any(p.name == name for p in named)}
    return {name: plain(value) for name, value in values.items()}


def plain(value: Any) -> Any:
    """Numbers, strings, lists and mappings as they are, dataclasses as mappings, all else by its name."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, KeepsSettings):
        return {"class": type(value).__name__, **value.settings}
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(each) for each in (value if isinstance(value, (list, tuple)) else sorted(value, key=str))]
    return str(value) if isinstance(value, Path) else getattr(value, "__qualname__", type(value).__qualname__)
