"""Data modules: one small file a data set, over a common base."""

from flops_lightning.datamodules.base import ImageDataModule
from flops_lightning.datamodules.caltech101 import Caltech101DataModule
from flops_lightning.datamodules.captions import CaptionDataModule
from flops_lightning.datamodules.cifar import CIFAR10DataModule, CIFAR100DataModule
from flops_lightning.datamodules.digits import DigitsDataModule
from flops_lightning.datamodules.eurosat import EuroSATDataModule
from flops_lightning.datamodules.flowers102 import Flowers102DataModule
from flops_lightning.datamodules.food101 import Food101DataModule
from flops_lightning.datamodules.image_folder import ImageFolderDataModule
from flops_lightning.datamodules.imagenet import ImageNetDataModule
from flops_lightning.datamodules.jsonl_text import JsonlTextDataModule

__all__ = [
    "CIFAR10DataModule", "CIFAR100DataModule", "Caltech101DataModule", "CaptionDataModule", "DigitsDataModule",
    "EuroSATDataModule", "Flowers102DataModule", "Food101DataModule", "ImageDataModule", "ImageFolderDataModule",
    "ImageNetDataModule", "JsonlTextDataModule",
]  # fmt: skip
