"""What classifiers share: labels, losses of logits, metrics, evaluation and predictions."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from flops_lightning.errors import SettingError
from flops_lightning.objectives import Objective, dotted_path, find_objective, most_probable, naming_the_loss
from flops_lightning.queries import row_losses
from flops_lightning.strategies.base import Estimate
from flops_lightning.tasks.evaluation import first_seen, metrics_of_test, metrics_of_validation
from flops_lightning.tasks.forward_module import Batch, ForwardModule
from flops_lightning.tasks.labels import check_known_labels, checked_labels
from flops_lightning.tasks.monitors import check_monitors
from flops_lightning.tasks.step import shows_bar


class ClassifierModule(ForwardModule):
    """A task whose network returns logits ``(b, c)`` of images, for labels ``(b,)`` or probabilities ``(b, c)``.

    A subclass calls :meth:`count_classes`.

    Attributes:
        num_classes: Number of classes ``c``.
    """

    num_classes: int

    def __init__(self, *, loss: str | Objective | None = None, label_smoothing: float = 0.0, **settings: Any) -> None:
        """Check the settings; see :class:`ForwardImageClassifier`."""
        super().__init__(**settings)
        if not 0 <= label_smoothing < 1:
            raise SettingError("label_smoothing", label_smoothing, "must be in [0, 1).", "Write, for example, 0.1.")
        if label_smoothing and loss is not None:
            problem = "has no effect on a `loss` of your own."
            raise SettingError("label_smoothing", label_smoothing, problem, "Remove one of the two.")
        self.objective = find_objective(loss) if isinstance(loss, str) else loss
        self.loss_path = "" if self.objective is None else dotted_path(self.objective)
        self.label_smoothing = label_smoothing
        self.save_hyperparameters({"loss": self.loss_path or None, "label_smoothing": label_smoothing})
        self._looked = False  # whether labels were looked at

    def count_classes(self, num_classes: int) -> None:
        """Make the metrics of so many classes."""
        self.num_classes = num_classes
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_metrics = metrics_of_validation(num_classes)
        self.test_metrics = metrics_of_test(num_classes)

    @property
    def tells_right(self) -> bool:
        """See :attr:`ForwardModule.tells_right`."""
        return True

    def right(self, batch: Batch) -> Tensor:
        """``(b,)`` of which images the likeliest class is their own."""
        images, labels = self.split(batch)
        return self(images).argmax(dim=1) == most_probable(labels)

    def split(self, batch: Any) -> tuple[Any, Tensor]:
        """Images and labels of a batch; see :func:`~flops_lightning.tasks.labels.checked_labels`."""
        images, labels = super().split(batch)
        self.check_inputs(images)
        checked = checked_labels(labels, len(images), self.num_classes, look=not self._looked)
        self._looked = True
        return images, checked

    def on_fit_start(self) -> None:
        """Refuse metrics to monitor that this task does not log."""
        super().on_fit_start()
        if type(self).__module__.startswith("flops_lightning."):  # a subclass may log more
            check_monitors(self.trainer)

    def on_train_start(self) -> None:
        """Check all labels that the data sets tell, and that there is one set to validate with."""
        _refuse_several(self.trainer.num_val_batches, "val_dataloader")
        for loader in tree_leaves((self.trainer.train_dataloader, self.trainer.val_dataloaders)):
            check_known_labels(loader, self.num_classes)
        super().on_train_start()

    def on_validation_start(self) -> None:
        """Refuse several sets."""
        _refuse_several(self.trainer.num_val_batches, "val_dataloader")

    def on_test_start(self) -> None:
        """Refuse several sets."""
        _refuse_several(self.trainer.num_test_batches, "test_dataloader")

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``(r,)`` losses of ``(r, c)`` logits: those of the setting ``loss``, or cross-entropies."""
        if self.objective is not None:
            return self.objective(outputs, targets)
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=self.label_smoothing)

    def log_batch(self, estimate: Estimate, targets: Tensor) -> None:
        """Log ``train/loss``, ``train/lr`` and ``train/accuracy``."""
        super().log_batch(estimate, targets)
        self.train_accuracy(estimate.output, most_probable(targets))
        self.log("train/accuracy", self.train_accuracy, prog_bar=shows_bar(self))

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log ``val/loss`` and ``val/accuracy``."""
        self._evaluate(batch, self.val_metrics)

    def on_test_epoch_start(self) -> None:
        """Forget what an interrupted test has counted."""
        self.test_metrics.reset()

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the :func:`metrics_of_test`, every image once whatever the number of processes."""
        images, _ = self.split(batch)
        self._evaluate(batch, self.test_metrics, first_seen(self.trainer.test_dataloaders, batch_idx, len(images)))

    def _evaluate(self, batch: Batch, metrics: MetricCollection, own: int | None = None) -> None:
        images, labels = self.split(batch)
        logits = self(images)
        with naming_the_loss(self.loss_path):
            losses = row_losses(self.loss, logits, labels)
        if own != 0:
            metrics.update(preds=logits[:own], target=most_probable(labels)[:own], value=losses[:own])
        for name, metric in metrics.items(keep_base=False):
            self.log(name, metric, prog_bar=name.endswith("/accuracy"), batch_size=len(labels))

    def predict_step(self, batch: Batch | Tensor, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        """``label`` ``(b,)`` and ``probability`` ``(b, c)`` of a batch of images, with or without labels."""
        images = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        probability = self(images).softmax(dim=1)
        return {"label": probability.argmax(dim=1), "probability": probability}


def _refuse_several(batches: Sequence[Any], name: str) -> None:
    if len(batches) > 1:
        problem = "a classifier counts the images of a single loader."
        raise SettingError(name, f"{len(batches)} loaders", problem, "Return one, or test each in a run of its own.")
