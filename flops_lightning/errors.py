"""Errors that a user can act on: each names the setting, its value, what is wrong, and what to write instead."""

from __future__ import annotations


class SettingError(ValueError):
    """A setting that cannot work, found before anything is computed with it."""

    def __init__(self, setting: str, value: object, problem: str, remedy: str) -> None:
        """Compose the message.

        Args:
            setting: Name of the setting as the user writes it, for example ``strategy.sites[0].sigma``.
            value: What was given.
            problem: What is wrong with it.
            remedy: What to write instead, as an imperative sentence.
        """
        self.setting, self.value, self.problem, self.remedy = setting, value, problem, remedy
        super().__init__(f"{setting} = {value!r}: {problem} {remedy}")

    def __reduce__(self) -> tuple[type[SettingError], tuple[str, object, str, str]]:
        """Rebuild from the four parts, so that the error crosses process boundaries."""
        return type(self), (self.setting, self.value, self.problem, self.remedy)


class LostQueriesError(RuntimeError):
    """Too many steps in a row lost every query to non-finite losses."""
