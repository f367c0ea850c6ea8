"""Tables that callbacks write into the folder of a run."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning.pytorch import Trainer

from flops_lightning.errors import SettingError
from flops_lightning.resume.rules import class_names_of


def class_names(trainer: Trainer, classes: int) -> Sequence[str]:
    """Names of the classes in the order of the labels: the data module's ``class_names``, or else the labels.

    Args:
        trainer: The Trainer, which knows the data module.
        classes: How many classes the model tells apart; 0 where nothing was seen that would say.

    Raises:
        SettingError: The data module names another number of classes.
    """
    names = class_names_of(trainer)
    if names is None:
        return [str(label) for label in range(classes)]
    if classes and len(names) != classes:
        raise SettingError(
            "data.class_names",
            f"{len(names)} names",
            f"the model tells {classes} classes apart.",
            "Use the data that the model was trained for.",
        )
    return names


def write_table(trainer: Trainer, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """Write a CSV file into the run's folder; every process must come here, and the first one writes.

    Args:
        trainer: The Trainer, which knows the folder.
        name: Of the file.
        columns: Their names, the first line.
        rows: The other lines; read by the first process only.

    Returns:
        The path of the file.
    """
    folder = Path(trainer.log_dir or trainer.default_root_dir)  # asks the other processes, so outside the branch
    if trainer.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        # A path may hold bytes that are no text; they are written as they are.
        with (folder / name).open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
            table = csv.writer(stream)
            table.writerow(columns)
            table.writerows(rows)
    return folder / name
