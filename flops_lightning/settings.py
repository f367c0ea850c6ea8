"""Objects that remember the settings they were made with, so that a checkpoint can say what it was trained with."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from flops_lightning.errors import SettingError

T = TypeVar("T")
K = TypeVar("K", bound="KeepsSettings")


class KeepsSettings:
    """Keeps the arguments of its constructor as plain values; subclasses need not do anything.

    A subclass passes what it does not name itself to its base with ``super().__init__(**settings)``.

    Attributes:
        settings: Values by name, defaults included (:func:`plain`).
        fixed: Settings of a base class whose values the class chooses itself: they cannot be given.
    """

    settings: dict[str, Any]
    fixed: ClassVar[frozenset[str]] = frozenset()

    def __new__(cls: type[K], *args: Any, **given: Any) -> K:
        """Note the arguments before the constructor reads them."""
        made = super().__new__(cls)
        named = constructor_parameters(cls)
        values = {name: p.default for name, p in named.items() if p.default is not p.empty}
        values |= dict(zip(named, args, strict=False))
        values |= {name: value for name, value in given.items() if name in named}  # others: the constructor refuses
        made.settings = {name: plain(value) for name, value in values.items()}
        return made

    def __init__(self) -> None:
        """Refuse arguments where no subclass takes any: beside a ``__new__``, that of ``object`` would swallow them."""


def constructor_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Named parameters of a constructor, those that it passes to its base class by ``**`` included."""
    found: dict[str, inspect.Parameter] = {}
    for layer in (each for each in cls.__mro__ if "__init__" in vars(each)):
        parameters = list(inspect.signature(vars(layer)["__init__"]).parameters.values())[1:]
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        found |= {p.name: p for p in named if p.name not in found}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    return {name: p for name, p in found.items() if name not in getattr(cls, "fixed", ())}


def read_settings(kind: type[T], given: T | Mapping[str, Any] | None, setting: str) -> T:
    """Checked settings of the class ``kind``, from Python or, in a checkpoint, a plain mapping; None: the defaults.

    Raises:
        SettingError: ``given`` is neither, or holds an unknown name or a value out of range.
    """
    if isinstance(given, Mapping):
        known = list(constructor_parameters(kind))
        for name in given:
            if name not in known:
                raise SettingError(setting, given, f"has no setting {name!r}.", f"Choose from {', '.join(known)}.")
        try:
            given = kind(**given)
        except TypeError as error:  # a required name is missing
            raise SettingError(setting, given, f"{error}.", f"See {kind.__name__}.") from error
    read = kind() if given is None else given
    if not isinstance(read, kind):
        raise SettingError(setting, given, f"must be {kind.__name__}(...) or a mapping.", f"See {kind.__name__}.")
    if (check := getattr(read, "check", None)) is not None:
        check()
    return read


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
