"""Frozen image encoders of timm and open_clip, by name: which of their outputs is the feature of an image."""

import difflib
import hashlib
import json
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError, check_choice, import_extra
from flops_lightning.tasks.backbone import create_backbone, load_weights
from flops_lightning.tasks.clip_model import (
    FOLDER,
    image_size,
    load_clip,
    statistics_of,
    weights_hash,
)

Feature = Literal["cls_pre_norm", "pooled", "patches"]
PRETRAINED = "pretrained"
"""The checkpoint of a timm model that stands for timm's own weights."""


class VisionEncoder:
    """A frozen vision transformer; not a module, so that no task saves, moves or trains it.

    Attributes:
        width: Width ``f`` of a feature.
        places: Number of patches; 1 if the feature is one vector.
        name: Name and hash of the weights and arguments.
        backbone: Size, mean and standard deviation of its images, in the form that data modules read.
    """

    def __init__(self, name: str, checkpoint: str, kwargs: Mapping[str, Any], feature: Feature) -> None:
        """Load it.

        Args:
            name: A timm model; or the image tower of an open_clip model or of ``local-dir:FOLDER``.
            checkpoint: A file; a tag of open_clip weights; ``pretrained``: timm's. Empty: random ones, to plan a run.
            kwargs: Further arguments of ``timm.create_model``.
            feature: ``cls_pre_norm``: the class token before the last norm, as in LLaVA and the paper; ``pooled``:
                the input of the head in a timm model, the normalised class token in a CLIP; ``patches``: the patches'
                tokens before the last norm.

        Raises:
            SettingError: an unknown name, weights that cannot be loaded, or a model without such a feature.
        """
        check_choice("feature", feature, get_args(Feature))
        self.feature: Feature = feature
        self._module, self._norm, size, statistics = _loaded(name, checkpoint, kwargs)
        self._module.eval().requires_grad_(False)
        config = {"mean": statistics[0], "std": statistics[1], "input_size": (3, size, size)}
        self.backbone = SimpleNamespace(pretrained_cfg=config)
        known = weights_hash(self._module)
        if kwargs:  # global_pool or act_layer, say, make other features of the same weights
            known = hashlib.sha256(json.dumps([known, dict(kwargs)], sort_keys=True, default=str).encode()).hexdigest()
        self.name = f"{name} {known[:16]}"
        self._size = size if getattr(getattr(self._module, "patch_embed", None), "strict_img_size", True) else 0
        example = self(torch.zeros(1, 3, size, size))
        self.width, self.places = int(example.shape[-1]), int(example[0].numel() // example.shape[-1])

    def __deepcopy__(self, memo: Any) -> "VisionEncoder":
        """Itself: copies of a task, as of those that average weights, share what is frozen."""
        return self

    def to(self, device: torch.device) -> None:
        """Move it."""
        self._module.to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """``(b, f)`` features of ``(b, 3, h, w)`` images, or ``(b, p, f)`` of their patches, in float32.

        Raises:
            SettingError: images of another size than the encoder's.
        """
        if self._size and images.shape[-2:] != (self._size, self._size):
            problem = f"the encoder takes images of {self._size} x {self._size} pixels."
            remedy = "Leave image_size out, or build a ViT of timm for it: encoder_kwargs: {img_size: ...}."
            raise SettingError("data.image_size", tuple(images.shape[-2:]), problem, remedy)
        seen: dict[str, Tensor] = {}

        def keep(_: nn.Module, given: tuple[Tensor, ...], normed: Tensor) -> None:
            seen.update(before=given[0], after=normed)

        hook = self._norm.register_forward_hook(keep)
        try:
            device = next(self._module.parameters()).device
            result: Tensor = self._module(images.to(device))
        finally:
            hook.remove()
        tokens = seen["before"]
        if tokens.dim() != 3 and self.feature != "pooled":
            problem = "the model pools its tokens before the last norm."
            raise SettingError("feature", self.feature, problem, "Write pooled.")
        before = int(getattr(self._module, "num_prefix_tokens", 1))  # of timm's models; CLIP's has the class token
        if self.feature == "cls_pre_norm" and not before:
            raise SettingError("feature", self.feature, "the model has no class token.", "Write pooled or patches.")
        if self.feature == "pooled":
            found = result if hasattr(self._module, "num_prefix_tokens") else seen["after"]
            found = found[:, 0] if found.dim() == 3 else found
        else:
            found = tokens[:, 0] if self.feature == "cls_pre_norm" else tokens[:, before:]
        return found.float()


def _loaded(
    name: str, checkpoint: str, kwargs: Mapping[str, Any]
) -> tuple[Any, nn.Module, int, tuple[tuple[float, ...], tuple[float, ...]]]:
    """The image tower, its last norm, the size of its images, and their mean and standard deviation."""
    import timm

    if timm.is_model(name):
        module: Any = create_backbone(name, kwargs, num_classes=1, pretrained=checkpoint == PRETRAINED)
        if checkpoint not in ("", PRETRAINED):
            _load_weights(module, checkpoint)
        module.reset_classifier(0)
        config = module.pretrained_cfg
        built = getattr(getattr(module, "patch_embed", None), "img_size", None)
        size = built[0] if built else config["input_size"][1]
        statistics = (tuple(config["mean"]), tuple(config["std"]))
        norm = getattr(module, "norm", None)
    else:
        if kwargs:
            raise SettingError("encoder_kwargs", dict(kwargs), "are arguments of timm's models.", "Leave them out.")
        if not name.startswith(FOLDER):
            _check_known(name)
        clip, _ = load_clip(name, checkpoint)
        module, size, statistics = clip.visual, image_size(clip)[0], statistics_of(clip)
        norm = getattr(module, "ln_post", None)
    if not isinstance(norm, nn.Module):
        problem = f"{type(module).__name__} is not a vision transformer with a last norm."
        raise SettingError("encoder", name, problem, "Give a ViT of timm or open_clip.")
    return module, norm, int(size), statistics


def _load_weights(module: nn.Module, checkpoint: str) -> None:
    try:
        load_weights(module, checkpoint)
    except SettingError as error:  # in the words of this task's settings
        remedy = error.remedy.replace("model_name", "encoder").replace("model_kwargs", "encoder_kwargs")
        raise SettingError("encoder_kwargs.checkpoint", checkpoint, error.problem, remedy) from error


def _check_known(name: str) -> None:
    import timm

    known = import_extra("open_clip", extra="clip", setting="encoder", value=name).list_models()
    if name not in known:
        close = difflib.get_close_matches(name, [*known, *timm.list_models()], n=3)
        remedy = f"Did you mean {close}?" if close else "See timm.list_models() and open_clip.list_models()."
        raise SettingError("encoder", name, "is not a model of timm or open_clip.", remedy)
