"""How well each class is told from the others, as a table that any program opens."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from flops_lightning.callbacks.tables import class_names, write_table
from flops_lightning.distributed import present_communicator
from flops_lightning.errors import SettingError
from flops_lightning.tasks.evaluation import ClassMeanAccuracy

FILE_NAME = "class_accuracy.csv"
COLUMNS = ("label", "class", "images", "accuracy")


class ClassReport(Callback):
    """Write ``class_accuracy.csv`` into the run's folder at the end of a test, one line per class by its label.

    Columns: ``label``; the ``class``, from the data module's ``class_names`` (without those, the label again); its
    ``images`` in the test; ``accuracy``, the share of them that is classified right, empty where there are none.
    Several processes write one file together. A trial run (``fast_dev_run``) writes none.

    It reads the counts of the :class:`ClassMeanAccuracy` that the module updates in its ``test_step``.
    """

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before the test that there will be something to write.

        Raises:
            SettingError: The module has no such metric, or tells another number of classes apart than the data names.
        """
        metric = class_counts(pl_module)
        if metric is None:
            raise SettingError(
                "trainer.callbacks", "ClassReport", f"{type(pl_module).__name__} counts no classes.",
                "Update a ClassMeanAccuracy in its test_step, or remove the callback.",
            )  # fmt: skip
        class_names(trainer, len(metric.images))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file and say where it is."""
        metric = class_counts(pl_module)
        if metric is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        right, images = present_communicator().sum(torch.stack([metric.right, metric.images])).tolist()
        names = class_names(trainer, len(images))
        rows = (
            (label, names[label], n, f"{hits / n:.9g}" if n else "")
            for label, (hits, n) in enumerate(zip(right, images, strict=True))
        )
        file = write_table(trainer, FILE_NAME, COLUMNS, rows)
        rank_zero_info(f"\naccuracy of each class written to {file}")


def class_counts(module: LightningModule) -> ClassMeanAccuracy | None:
    """The metric of a module that counts images by class, or None."""
    return next((part for part in module.modules() if isinstance(part, ClassMeanAccuracy)), None)
