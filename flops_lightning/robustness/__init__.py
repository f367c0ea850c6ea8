"""Classifiers under noise and under attack: evaluation only, whatever the network was trained by."""

from flops_lightning.robustness.attacks import AttackSettings, iterated_fgsm
from flops_lightning.robustness.corruptions import Corruption, GaussianNoise, PoissonNoise, UniformNoise
from flops_lightning.robustness.pixels import PixelModel

__all__ = [
    "AttackSettings", "Corruption", "GaussianNoise", "PixelModel", "PoissonNoise", "UniformNoise", "iterated_fgsm",
]  # fmt: skip
