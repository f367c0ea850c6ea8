"""Image classification with a timm backbone that learns from forward passes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import BatchNormSetting
from flops_lightning.objectives import Objective
from flops_lightning.settings import read_settings
from flops_lightning.tasks.backbone import (
    check_images,
    create_backbone,
    example_images,
    input_channels,
    load_weights,
    save_weights,
)
from flops_lightning.tasks.backbone import freeze as freeze_parameters
from flops_lightning.tasks.classifier import ClassifierModule
from flops_lightning.tasks.parameter_efficient import TargetSettings, apply_target, check_target_learns


class ForwardImageClassifier(ClassifierModule):
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
            target: Which parameters are trained: all, or those of a parameter-efficient target.
            freeze: Shell patterns of parameters that are not trained, for example ``["pos_embed", "blocks.0.*"]``.
            loss: What is minimised: a function ``(logits (r, c), target (r,)) -> (r,)`` or its dotted path, for example
                ``flops_lightning.objectives.zero_one_error``; None: cross-entropy. It need not be differentiable.
            label_smoothing: Label smoothing of that cross-entropy, from 0 to below 1.
            batch_norm: ``frozen``: train networks with batch normalisation, with constant running statistics.
            **settings: Those of :class:`ForwardModule`: ``strategy``, ``optimizer``, ``clip``, ``max_skipped_steps``,
                ``spend``.
        """
        super().__init__(loss=loss, label_smoothing=label_smoothing, **settings)
        if pretrained and checkpoint:
            raise SettingError("pretrained", True, "`checkpoint` is given as well.", "Choose one of the two.")
        self.target_settings = read_settings(TargetSettings, target, "target")
        patterns = [freeze] if isinstance(freeze, str) else list(freeze)
        self.save_hyperparameters(
            {
                "model_name": model_name, "num_classes": num_classes, "model_kwargs": dict(model_kwargs or {}),
                "target": asdict(self.target_settings), "freeze": patterns, "batch_norm": batch_norm,
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
        self.in_chans = input_channels(self.backbone, model_kwargs or {})
        self.stage(self.backbone, example_images(self.backbone, self.in_chans, num_classes), batch_norm=batch_norm)
        self.count_classes(num_classes)

    def check_inputs(self, inputs: Tensor) -> None:
        """Compare images with the size and channels that the backbone was built for."""
        check_images(self.backbone, inputs, self.in_chans)

    @rank_zero_only
    def export_weights(self, path: str) -> None:
        """Write the backbone's weights under timm's names, LoRA merged and prompts as register tokens."""
        save_weights(self.backbone, path)
