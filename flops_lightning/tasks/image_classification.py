"""Image classification with a timm backbone that learns from forward passes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import BatchNormSetting
from flops_lightning.objectives import Objective, dotted_path, find_objective, most_probable, naming_the_loss
from flops_lightning.queries import row_losses
from flops_lightning.settings import read_settings
from flops_lightning.strategies.base import Estimate
from flops_lightning.tasks.backbone import (
    check_images,
    create_backbone,
    example_images,
    input_channels,
    load_weights,
    save_weights,
)
from flops_lightning.tasks.backbone import freeze as freeze_parameters
from flops_lightning.tasks.evaluation import first_seen, metrics_of_test, metrics_of_validation
from flops_lightning.tasks.forward_module import Batch, ForwardModule
from flops_lightning.tasks.labels import check_known_labels, checked_labels
from flops_lightning.tasks.monitors import check_monitors
from flops_lightning.tasks.parameter_efficient import TargetSettings, apply_target, check_target_learns


class ForwardImageClassifier(ForwardModule):
    """A timm classifier trained by a :class:`~flops_lightning.strategies.ForwardGradientStrategy`.

    Example:
        >>> import torch
        >>> from flops_lightning.strategies import LikelihoodRatio
        >>> from flops_lightning.tasks import ForwardImageClassifier
        >>> small = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 2, "num_heads": 2}
        >>> task = ForwardImageClassifier(
        ...     model_name="vit_tiny_patch16_224", model_kwargs=small, num_classes=10, strategy=LikelihoodRatio(seed=0)
        ... )
        >>> task(torch.zeros(3, 1, 8, 8)).shape
        torch.Size([3, 10])
    """

    def __init__(
        self, *, model_name: str, num_classes: int, model_kwargs: Mapping[str, Any] | None = None,
        pretrained: bool = False, checkpoint: str = "", target: TargetSettings | None = None,
        freeze: Sequence[str] = (), loss: str | Objective | None = None, label_smoothing: float = 0.0,
        batch_norm: BatchNormSetting = "refuse", **settings: Any,
    ) -> None:  # fmt: skip
        """Build the backbone, stage it, and bind the strategy to it.

        Args:
            model_name: A timm model; see :func:`~flops_lightning.network.stage_network`.
            num_classes: Number of classes (the CLI takes it from the data).
            model_kwargs: Further arguments of ``timm.create_model`` (``img_size``, ``in_chans``, ``depth``, ...).
            pretrained: Start from timm's weights.
            checkpoint: Start from a local file instead (safetensors, or a plain ``torch.save``).
            target: Which parameters learn: all, or the few of a parameter-efficient target.
            freeze: Shell patterns of parameters that are not trained, for example ``["pos_embed", "blocks.0.*"]``.
            loss: What is minimised: a function ``(logits (r, c), target (r,)) -> (r,)`` or its dotted path, for example
                ``flops_lightning.objectives.zero_one_error``; None: cross-entropy. It needs no derivative.
            label_smoothing: Label smoothing of that cross-entropy, 0 to below 1.
            batch_norm: ``frozen`` trains networks with batch normalisation: their running statistics are constants.
            **settings: Those of :class:`ForwardModule`: ``strategy``, ``optimizer``, ``clip``, ``max_skipped_steps``,
                ``spend``.
        """
        super().__init__(**settings)
        if not 0 <= label_smoothing < 1:
            raise SettingError("label_smoothing", label_smoothing, "must be in [0, 1).", "Write, for example, 0.1.")
        if label_smoothing and loss is not None:
            problem = "has no effect on a `loss` of your own."
            raise SettingError("label_smoothing", label_smoothing, problem, "Remove one of the two.")
        if pretrained and checkpoint:
            raise SettingError("pretrained", True, "`checkpoint` is given as well.", "Choose one of the two.")
        self.target_settings = read_settings(TargetSettings, target, "target")
        self.objective = find_objective(loss) if isinstance(loss, str) else loss
        self.loss_path = "" if self.objective is None else dotted_path(self.objective)
        self.label_smoothing = label_smoothing
        patterns = [freeze] if isinstance(freeze, str) else list(freeze)
        self.save_hyperparameters(
            {
                "model_name": model_name, "num_classes": num_classes, "model_kwargs": dict(model_kwargs or {}),
                "target": asdict(self.target_settings), "freeze": patterns, "loss": self.loss_path or None,
                "label_smoothing": label_smoothing,
                "batch_norm": batch_norm,
            }
        )  # fmt: skip
        folder = str(Path(checkpoint).parent) if checkpoint else ""  # a resumed run may find the file elsewhere
        name = Path(checkpoint).name
        self.start_weights = {"pretrained": pretrained, "checkpoint": name, "checkpoint.folder": folder}
        self.backbone = create_backbone(model_name, model_kwargs or {}, num_classes=num_classes, pretrained=pretrained)
        if checkpoint:
            load_weights(self.backbone, checkpoint)
        apply_target(self.backbone, self.target_settings)
        freeze_parameters(self.backbone, patterns)
        check_target_learns(self.backbone, self.target_settings.kind, patterns)
        self._looked = False  # whether labels were looked at
        self.in_chans = input_channels(self.backbone, model_kwargs or {})
        self.stage(self.backbone, example_images(self.backbone, self.in_chans, num_classes), batch_norm=batch_norm)
        self.train_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.val_metrics = metrics_of_validation(num_classes)
        self.test_metrics = metrics_of_test(num_classes)

    def split(self, batch: Any) -> tuple[Any, Tensor]:
        """Images and labels of a batch; see :func:`~flops_lightning.tasks.labels.checked_labels`."""
        images, labels = super().split(batch)
        self.check_inputs(images)
        checked = checked_labels(labels, len(images), self.hparams["num_classes"], look=not self._looked)
        self._looked = True
        return images, checked

    def on_fit_start(self) -> None:
        """Refuse metrics to monitor that this task does not log."""
        super().on_fit_start()
        if type(self) is ForwardImageClassifier:
            check_monitors(self.trainer)

    def on_train_start(self) -> None:
        """Check all labels that the data sets tell, and that there is one set to validate with."""
        _refuse_several(self.trainer.num_val_batches, "val_dataloader")
        for loader in tree_leaves((self.trainer.train_dataloader, self.trainer.val_dataloaders)):
            check_known_labels(loader, self.hparams["num_classes"])
        super().on_train_start()

    def on_validation_start(self) -> None:
        """Refuse several sets."""
        _refuse_several(self.trainer.num_val_batches, "val_dataloader")

    def on_test_start(self) -> None:
        """Refuse several sets."""
        _refuse_several(self.trainer.num_test_batches, "test_dataloader")

    def check_inputs(self, inputs: Tensor) -> None:
        """Compare images with the size and channels that the backbone was built for."""
        check_images(self.backbone, inputs, self.in_chans)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``(r,)`` losses of ``(r, c)`` logits: those of the setting ``loss``, or cross-entropies."""
        if self.objective is not None:
            return self.objective(outputs, targets)
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=self.label_smoothing)

    def export_weights(self, path: str) -> None:
        """Write the backbone's weights under timm's names, LoRA merged and prompts as register tokens."""
        save_weights(self.backbone, path)

    def log_batch(self, estimate: Estimate, targets: Tensor) -> None:
        """Log ``train/loss``, ``train/lr`` and ``train/accuracy``."""
        super().log_batch(estimate, targets)
        self.train_accuracy(estimate.output, most_probable(targets))
        self.log("train/accuracy", self.train_accuracy, prog_bar=True)

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
        problem = "a classifier counts the images of one."
        raise SettingError(name, f"{len(batches)} loaders", problem, "Return one, or test each in a run of its own.")
