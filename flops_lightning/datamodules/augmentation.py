"""From an image to the tensor that a network reads; RandAugment of images, MixUp and CutMix of batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flops_lightning.errors import SettingError, check_whole

Statistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of red, green and blue, scaled to 0..1."""

# What timm's weights were trained with; their `default_cfg` says which. The first is the mean and standard deviation of
# ImageNet's training images, as torchvision and timm round them; the second maps 0..1 to -1..1.
IMAGENET: Statistics = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
INCEPTION: Statistics = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# Of CLIP's training images, by OpenAI; most models of open_clip keep to it.
CLIP: Statistics = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
NORMALIZATIONS = {"imagenet": IMAGENET, "inception": INCEPTION, "clip": CLIP}
BACKBONE = "backbone"
"""The normalization that the network was trained with."""

MAGNITUDES = 31  # bins of torchvision's RandAugment


def backbone_statistics(module: object) -> Statistics:
    """Mean and standard deviation that a task's timm backbone was trained with."""
    config = getattr(getattr(module, "backbone", None), "pretrained_cfg", None) or {}
    if "mean" not in config or "std" not in config:
        remedy = "Write imagenet, inception (0.5 each, most of timm's ViTs) or clip, as the weights were trained."
        raise SettingError("data.normalization", BACKBONE, "there is no timm model to ask for its own.", remedy)
    return tuple(config["mean"]), tuple(config["std"])


def backbone_size(module: object) -> int | None:
    """Height and width of the images that a task's timm backbone was built for; None where there is none to ask."""
    backbone = getattr(module, "backbone", None)
    config = getattr(backbone, "pretrained_cfg", None) or {}
    built = getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    size = built[0] if built else config.get("input_size", (0, 0, 0))[1]
    return int(size) or None


@dataclass(frozen=True)
class RandAugmentSettings:
    """RandAugment: operations drawn from fourteen (rotation, shear, contrast, ...), all of one strength.

    Source: E. D. Cubuk et al., RandAugment: Practical automated data augmentation with a reduced search space, 2020.

    Attributes:
        num_ops: Operations on each image, at least 1.
        magnitude: Their strength, from 0 to 30.
    """

    num_ops: int = 2
    magnitude: int = 9

    def check(self) -> None:
        """Raise a :class:`SettingError` for a number outside its range."""
        check_whole("data.rand_augment.num_ops", self.num_ops, 1, "Use for example 2.")
        check_whole("data.rand_augment.magnitude", self.magnitude, 0, "Use for example 9.")
        if self.magnitude >= MAGNITUDES:
            problem = f"is not in 0 to {MAGNITUDES - 1}."
            raise SettingError("data.rand_augment.magnitude", self.magnitude, problem, "Use for example 9.")

    def transform(self) -> Any:
        """The transform, of torchvision, of an 8-bit image."""
        from torchvision.transforms import v2

        return v2.RandAugment(self.num_ops, self.magnitude, MAGNITUDES)


def mixing(mixup_alpha: float, cutmix_alpha: float, num_classes: int) -> Any:
    """The mixing, of torchvision, of a batch with itself shifted by one; with both kinds on, each batch draws one.

    The targets become probabilities ``(b, num_classes)``: each image's share in the mixed image, drawn from
    ``Beta(alpha, alpha)`` once for the whole batch.

    Sources: H. Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018; S. Yun et al., CutMix, 2019.

    Returns:
        ``(images (b, ...), labels (b,)) -> (images, targets (b, num_classes))``, or None if both are off.
    """
    if not mixup_alpha and not cutmix_alpha:
        return None
    from torchvision.transforms import v2

    kinds = ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha))
    active = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    return active[0] if len(active) == 1 else v2.RandomChoice(active)


def resize(image_size: int) -> Any:
    """Resize an image to a square like PIL does: bicubically, with antialiasing, to 8-bit values."""
    from torchvision.transforms import v2

    return v2.Resize((image_size, image_size), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)


def image_transform(
    transforms: Sequence[Callable[[Any], Any]], mean: Sequence[float], std: Sequence[float]
) -> Callable[[Any], Tensor]:
    """A function from an RGB image to a float32 tensor ``(3, h, w)``: ``transforms``, scaling to 0..1, normalization.

    ``transforms`` are torchvision's, of an 8-bit image; ``mean`` and ``std`` have one number a channel.
    """
    from torchvision.transforms import v2

    to_float = v2.ToDtype(torch.float32, scale=True)
    return v2.Compose([v2.ToImage(), *transforms, to_float, v2.Normalize(list(mean), list(std)), v2.ToPureTensor()])
