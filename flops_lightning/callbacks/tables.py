"""Tables that callbacks write into the folder of a run."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from flops_lightning.errors import SettingError
from flops_lightning.resume.rules import class_names_of


def class_names(trainer: Trainer, classes: int) -> Sequence[str]:
    """Names of the classes in the order of the labels: the data module's ``class_names``, or else the labels.

    ``classes`` is their number in the model; 0 where no batch has shown it. Those beyond the names have their labels.
    """
    names = class_names_of(trainer)
    if names is None:
        return [str(label) for label in range(classes)]
    if classes and len(names) > classes:
        problem = f"the model has {classes} classes."
        remedy = "Use the data that the model was trained for."
        raise SettingError("data.class_names", f"{len(names)} names", problem, remedy)
    return [*names, *(str(label) for label in range(len(names), classes))]


def run_folder(trainer: Trainer) -> Path:
    """The folder of the run; every process must ask, since the first one tells the others."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def write_table(
    trainer: Trainer, name: str, columns: Sequence[str], rows: Iterable[Sequence[object]], *, content: str
) -> None:
    """Write a CSV file into the run's folder and log where it is; a trial run (``fast_dev_run``) writes none.

    Every process must call this; the first one reads ``rows`` and writes. ``content`` is what the log calls the table.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    file = run_folder(trainer) / name
    if trainer.is_global_zero:
        file.parent.mkdir(parents=True, exist_ok=True)
        # Paths may hold bytes that are not text; they are written as they are.
        with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
            table = csv.writer(stream)
            table.writerow(columns)
            table.writerows(rows)
    rank_zero_info(f"\n{content} written to {file}")  # the progress bar has not ended its line
