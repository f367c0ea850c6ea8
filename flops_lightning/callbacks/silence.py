"""Nothing is logged or printed while queries run, whatever a step calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
from lightning.pytorch.loggers import Logger

SILENCED = ("log", "log_dict", "print")


class SilentLogger:
    """What a step sees of a logger or its experiment: the same class, names and folders; calls do nothing.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger
        >>> logger = SilentLogger(CSVLogger("runs", name="first", version=3))
        >>> logger.log_metrics({"loss": 1.0}, step=0)
        >>> logger.log_dir, logger.name, logger.version
        ('runs/first/version_3', 'first', 3)
        >>> isinstance(logger, CSVLogger)
        True
    """

    def __init__(self, real: object) -> None:
        self._real = real

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class that a step may ask for."""
        return type(self._real)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._real, name)
        if callable(value) and not isinstance(value, type):
            return nothing
        return value if value is None or isinstance(value, (str, int, float, Path)) else SilentLogger(value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_real":
            object.__setattr__(self, name, value)

    def __getitem__(self, name: Any) -> "SilentLogger":
        return self

    def __setitem__(self, name: Any, value: Any) -> None:
        """Log nothing."""


def silence(module: pl.LightningModule) -> None:
    """Let ``log``, ``log_dict`` and ``print`` do nothing, until ``PassState.restore``."""
    for each in module.modules():
        if isinstance(each, pl.LightningModule):
            vars(each).update(dict.fromkeys(SILENCED, nothing))


@contextmanager
def silent_loggers(trainer: pl.Trainer) -> Iterator[None]:
    """The trainer's loggers take nothing: a step may write to ``self.logger`` itself."""
    loggers = trainer.loggers
    trainer.loggers = [cast("Logger", SilentLogger(each)) for each in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers


def nothing(*_: Any, **__: Any) -> None:
    """Do nothing."""
