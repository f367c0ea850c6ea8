"""The accuracy of each class, as a table."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from flops_lightning.callbacks.tables import class_names, write_table
from flops_lightning.distributed import present_communicator
from flops_lightning.errors import SettingError
from flops_lightning.tasks.evaluation import ClassMeanAccuracy

FILE_NAME = "class_accuracy.csv"
COLUMNS = ("label", "class", "images", "accuracy")


class ClassReport(Callback):
    """Write ``class_accuracy.csv`` into the run's folder at the end of a test, one line per class by its label.

    Columns: ``label``; ``class``, from the data module's ``class_names`` (without these, the label again); ``images``,
    its number of test images; ``accuracy``, the share of them classified correctly (empty if there are none). Several
    processes write one file together. A trial run (``fast_dev_run``) writes none.

    It reads the counts of the :class:`~flops_lightning.tasks.evaluation.ClassMeanAccuracy` that the module updates in
    its ``test_step``, as ``ForwardImageClassifier`` does.

    Example:
        >>> import tempfile
        >>> import lightning.pytorch as pl
        >>> from flops_lightning.callbacks import ClassReport
        >>> class Given(pl.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.counts = ClassMeanAccuracy(2)
        ...
        ...     def test_step(self, batch):
        ...         self.counts.update(preds=batch, target=torch.tensor([0, 0]))
        >>> quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
        >>> folder = tempfile.mkdtemp()
        >>> trainer = pl.Trainer(callbacks=[ClassReport()], default_root_dir=folder, **quiet)
        >>> _ = trainer.test(Given(), torch.utils.data.DataLoader(torch.eye(2), batch_size=2), verbose=False)
        >>> open(f"{folder}/class_accuracy.csv").read().split()
        ['label,class,images,accuracy', '0,0,2,0.5', '1,1,0,']
    """

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check before the test that there will be something to write."""
        metric = class_counts(pl_module)
        if metric is None:
            problem = f"{type(pl_module).__name__} counts no classes."
            remedy = "Update a ClassMeanAccuracy in its test_step, or remove the callback."
            raise SettingError("trainer.callbacks", "ClassReport", problem, remedy)
        class_names(trainer, len(metric.images))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file and say where it is."""
        metric = class_counts(pl_module)
        if metric is None:
            return
        right, images = present_communicator().sum(torch.stack([metric.right, metric.images])).tolist()
        names = class_names(trainer, len(images))
        rows = (
            (label, names[label], n, f"{hits / n:.9g}" if n else "")
            for label, (hits, n) in enumerate(zip(right, images, strict=True))
        )
        write_table(trainer, FILE_NAME, COLUMNS, rows, content="accuracy of each class")


def class_counts(module: LightningModule) -> ClassMeanAccuracy | None:
    """The metric of a module that counts images by class, or None."""
    return next((part for part in module.modules() if isinstance(part, ClassMeanAccuracy)), None)
