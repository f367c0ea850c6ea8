"""Data modules: one small file a data set, over a common base."""

from __future__ import annotations

from flops_lightning.datamodules.base import ImageDataModule
from flops_lightning.datamodules.cifar10 import CIFAR10DataModule
from flops_lightning.datamodules.digits import DigitsDataModule

__all__ = ["CIFAR10DataModule", "DigitsDataModule", "ImageDataModule"]
