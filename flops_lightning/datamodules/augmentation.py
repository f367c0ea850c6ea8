"""Augmentation beyond shifting and mirroring: RandAugment of single images, MixUp and CutMix of batches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from flops_lightning.errors import SettingError

MAGNITUDES = 31  # bins of torchvision's RandAugment


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
        """Look at the ranges.

        Raises:
            SettingError: a number is outside its range.
        """
        if self.num_ops < 1:
            raise SettingError("data.rand_augment.num_ops", self.num_ops, "is below 1.", "Use for example 2.")
        if not 0 <= self.magnitude < MAGNITUDES:
            raise SettingError(
                "data.rand_augment.magnitude", self.magnitude, f"is not in 0 to {MAGNITUDES - 1}.",
                "Use for example 9.",
            )  # fmt: skip

    def transform(self) -> Any:
        """The transform, of torchvision, of an 8-bit image."""
        from torchvision.transforms import v2

        return v2.RandAugment(self.num_ops, self.magnitude, MAGNITUDES)


def check_alpha(setting: str, alpha: float) -> None:
    """Refuse what is no parameter of a beta distribution.

    Raises:
        SettingError: ``alpha`` is negative or not finite.
    """
    if not math.isfinite(alpha) or alpha < 0:
        raise SettingError(setting, alpha, "is no positive number.", "Use for example 0.2 or 1.0, or 0 for none.")


def mixing(mixup_alpha: float, cutmix_alpha: float, num_classes: int) -> Any:
    """The mixing, of torchvision, of a batch with itself shifted by one; one of the two at random where both are on.

    The targets become probabilities ``(b, num_classes)``: of each image the share that the mixed image has of it, a
    draw from ``Beta(alpha, alpha)`` that is the same for the whole batch.

    Sources: H. Zhang et al., mixup: Beyond Empirical Risk Minimization, 2018; S. Yun et al., CutMix, 2019.

    Args:
        mixup_alpha: Parameter of MixUp's distribution; 0 leaves it out.
        cutmix_alpha: Parameter of CutMix's distribution; 0 leaves it out.
        num_classes: Number of classes.

    Returns:
        ``(images (b, ...), labels (b,)) -> (images, targets (b, num_classes))``, or None if both are off.
    """
    if not mixup_alpha and not cutmix_alpha:
        return None
    from torchvision.transforms import v2

    kinds = ((v2.MixUp, mixup_alpha), (v2.CutMix, cutmix_alpha))
    chosen = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]
    return chosen[0] if len(chosen) == 1 else v2.RandomChoice(chosen)
