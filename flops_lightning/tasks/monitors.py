"""Metrics that callbacks may monitor."""

import lightning.pytorch as pl

from flops_lightning.errors import SettingError

LOGGED = ("train/loss", "train/accuracy", "train/lr", "val/loss", "val/accuracy")
"""What a classifier logs and a callback may monitor."""
FURTHER = ("grad_norm/", "queries/", "allocation", "service/")
"""How the names of further metrics begin."""


def check_monitors(trainer: pl.Trainer) -> None:
    """Raise a :class:`SettingError` for a metric to monitor that a classifier never logs.

    Lightning would notice after an epoch. Callbacks of the user's own may log anything; beside them nothing is said.
    """
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not all(type(each).__module__.startswith(("lightning.", "flops_lightning.")) for each in callbacks):
        return
    logged = [name for name in LOGGED if trainer.limit_val_batches or not name.startswith("val/")]
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if (
            isinstance(monitor, str)
            and monitor not in (*logged, "step", "epoch", "lr")
            and not monitor.startswith(FURTHER)
        ):
            where = f"{type(callback).__name__}.monitor"
            raise SettingError(where, monitor, "is never logged.", f"Choose from {', '.join(logged)}.")
