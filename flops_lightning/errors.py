"""Errors that a user can act on: each names the setting, its value, what is wrong, and what to write instead."""

import math
import os
from collections.abc import Sequence
from importlib import import_module
from numbers import Integral
from pathlib import Path
from typing import Any


class SettingError(ValueError):
    """A setting that cannot work, found before anything is computed with it."""

    def __init__(self, setting: str, value: object, problem: str, remedy: str) -> None:
        """Compose the message.

        Args:
            setting: Name of the setting as the user writes it, for example ``model.strategy.sites[0].sigma``.
            value: What was given.
            problem: What is wrong with it.
            remedy: What to write instead, as an imperative sentence.
        """
        self.setting, self.value, self.problem, self.remedy = setting, value, problem, remedy
        super().__init__(f"{setting} = {value!r}: {problem} {remedy}")

    def __reduce__(self) -> tuple[type["SettingError"], tuple[str, object, str, str]]:
        """Rebuild from the four parts, so that the error crosses process boundaries."""
        return type(self), (self.setting, self.value, self.problem, self.remedy)


def check_choice(setting: str, value: str, choices: Sequence[str]) -> None:
    """Raise a :class:`SettingError` unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise SettingError(setting, value, "is not one of the choices.", f"Choose from {', '.join(choices)}.")


def check_at_least(setting: str, value: float, least: float, remedy: str = "") -> None:
    """Raise a :class:`SettingError` unless ``value`` is a finite number, ``least`` or more."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
        raise SettingError(setting, value, f"must be {least} or more.", remedy or f"Write {least} or more.")


def check_whole(setting: str, value: int, least: int, remedy: str) -> None:
    """Raise a :class:`SettingError` unless ``value`` is a whole number, ``least`` or more."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise SettingError(setting, value, f"must be a whole number, {least} or more.", remedy)


def check_flag(setting: str, value: bool) -> None:
    """Raise a :class:`SettingError` unless ``value`` is true or false: most other things would count as true."""
    if not isinstance(value, bool):
        raise SettingError(setting, value, "must be true or false.", "Write one of the two.")


def check_path(setting: str, value: str | os.PathLike[str], remedy: str) -> None:
    """Raise a :class:`SettingError` unless ``value`` is a path."""
    if not isinstance(value, (str, os.PathLike)):
        raise SettingError(setting, value, "must be a path.", remedy)


def check_positive(setting: str, value: float, remedy: str) -> None:
    """Raise a :class:`SettingError` unless ``value`` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise SettingError(setting, value, "must be a number above 0.", remedy)


def import_extra(module: str, *, extra: str, setting: str, value: object) -> Any:
    """A module of a package that only the optional ``extra`` installs; ``setting`` and ``value`` are what wants it.

    Raises:
        SettingError: the package, or one that it needs, is not installed.

    Example:
        >>> import_extra("no_such_package", extra="llm", setting="llm", value="stories")
        Traceback (most recent call last):
        flops_lightning.errors.SettingError: llm = 'stories': needs the package no_such_package (...). Run pip ...
    """
    try:
        return import_module(module)
    except ImportError as error:
        problem = f"needs the package {module.partition('.')[0]} ({error})."
        raise SettingError(setting, value, problem, f'Run pip install -e ".[{extra}]" in the checkout.') from error


class DamagedImageError(ValueError):
    """An image file of the data set cannot be read; the message names the file and what to do."""

    def __init__(self, message: str) -> None:
        """Keep the message; of a report by a process that loads data (a trace of its calls) the last line."""
        super().__init__(message.rstrip().rpartition(f"{type(self).__name__}: ")[2])


class LostQueriesError(RuntimeError):
    """Too many steps in a row lost every query to non-finite losses."""


class SpentQueriesError(RuntimeError):
    """The next question would ask a service for more rows than a run may (``max_queries``); it was not asked."""

    def __init__(self, spent: int, more: int, most: int, saved: Path | None = None) -> None:
        """Compose the message.

        Args:
            spent: Rows that were asked for.
            more: Rows that the next step needs.
            most: The limit.
            saved: The checkpoint from which the run can go on.
        """
        self.spent, self.more, self.most, self.saved = spent, more, most, saved
        go_on = f" Saved {saved}: go on with a larger max_queries and --ckpt_path {saved}." if saved else ""
        super().__init__(f"max_queries = {most}: {spent} are spent and the next step takes {more}.{go_on}")

    def __reduce__(self) -> tuple[type["SpentQueriesError"], tuple[int, int, int, Path | None]]:
        """Rebuild from the four parts, so that the error crosses process boundaries."""
        return type(self), (self.spent, self.more, self.most, self.saved)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the files that were there before are untouched."""

    def __init__(self, path: Path, cause: OSError, last_good: Path | None) -> None:
        """Compose the message.

        Args:
            path: The file that was to be written.
            cause: What the system said.
            last_good: The newest checkpoint in the folder, if there is one.
        """
        self.path, self.cause, self.last_good = path, cause, last_good
        kept = f"The last good checkpoint is {last_good}" if last_good else "There is no earlier checkpoint in it"
        go_on = f", then go on with --ckpt_path {last_good}" if last_good else ""
        super().__init__(
            f"{path.name} could not be written to {path.parent}: {cause.strerror or cause}. {kept}. Make room there or "
            f"choose another folder (trainer.default_root_dir){go_on}."
        )

    def __reduce__(self) -> tuple[type["CheckpointError"], tuple[Path, OSError, Path | None]]:
        """Rebuild from the three parts, so that the error crosses process boundaries."""
        return type(self), (self.path, self.cause, self.last_good)
