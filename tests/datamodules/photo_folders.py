"""Tiny data sets in the layouts of the real ones; an image's colour shows its class and its number in the class."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from scipy.io import savemat
from torch import Tensor

from flops_lightning.cli.command import main
from flops_lightning.datamodules import (
    Caltech101DataModule,
    EuroSATDataModule,
    Flowers102DataModule,
    Food101DataModule,
    ImageNetDataModule,
)  # fmt: skip
from flops_lightning.datamodules.photos import PhotoDataModule

WNIDS = ("n01440764", "n01443537", "n01484850", "n01491361")
DISHES = ("apple_pie", "baklava", "waffles")
STEP = 24  # between two colours: JPEG moves one by 2 or 3


def photo(label: int, number: int, size: tuple[int, int] = (12, 10)) -> Image.Image:
    return Image.new("RGB", size, (8 + STEP * (label % 10), 8 + STEP * (label // 10), 8 + STEP * number))


def write(file: Path, image: Image.Image) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file, "JPEG", quality=100, subsampling=0)


def told(data: PhotoDataModule, images: Tensor) -> list[tuple[int, int]]:
    """Class and number of each image of a normalised batch."""
    levels = (images * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)) * 255
    digits = ((levels.mean((-2, -1)) - 8) / STEP).round().int().tolist()
    return [(ones + 10 * tens, number) for ones, tens, number in digits]


def contents(data: PhotoDataModule, part: str) -> list[tuple[int, int]]:
    """Class and number of each image of a part; that the class is its label is asserted."""
    images = getattr(data, f"{part}_set")
    if not len(images):
        return []
    found = told(data, torch.stack([images[i][0] for i in range(len(images))]))
    assert [label for label, _ in found] == [int(images[i][1]) for i in range(len(images))] == images.labels.tolist()
    return found


def write_class_folders(folder: Path, names: Iterable[str], numbers: Iterable[int]) -> None:
    for label, name in enumerate(names):
        for number in numbers:
            write(folder / name / f"image_{number + 1:04}.jpg", photo(label, number))


def write_imagenet(root: Path) -> Path:
    write_class_folders(root / "train", WNIDS, range(6))
    write_class_folders(root / "val", WNIDS, range(6, 8))
    return root


def write_caltech101(root: Path) -> Path:
    folder = Caltech101DataModule.source.folder(root)
    write_class_folders(folder, Caltech101DataModule.class_names, range(4))
    write(folder / "BACKGROUND_Google" / "image_0001.jpg", photo(0, 9))
    return root


def write_eurosat(root: Path) -> Path:
    write_class_folders(EuroSATDataModule.source.folder(root), EuroSATDataModule.class_names, range(10))
    return root


def write_food101(root: Path) -> Path:
    folder = root / "food-101"
    write_class_folders(folder / "images", DISHES, range(8))
    (folder / "meta").mkdir()
    for part, numbers in (("train", range(6)), ("test", range(6, 8))):
        lists = {name: [f"{name}/image_{number + 1:04}" for number in numbers] for name in DISHES}
        (folder / "meta" / f"{part}.json").write_text(json.dumps(lists))
    return root


def write_flowers102(root: Path) -> Path:
    """Image ``n`` is of class ``n % 102``; of each class number 0 trains, 1 validates and 2 and 3 test."""
    folder = root / "flowers-102"
    for n in range(4 * 102):
        write(folder / "jpg" / f"image_{n + 1:05}.jpg", photo(n % 102, n // 102))
    numbers = torch.arange(1, 4 * 102 + 1).numpy()[None]
    savemat(folder / "imagelabels.mat", {"labels": (numbers - 1) % 102 + 1})
    sets = {"trnid": numbers[:, :102], "valid": numbers[:, 102:204], "tstid": numbers[:, 204:]}
    savemat(folder / "setid.mat", sets)
    return root


@dataclass(frozen=True)
class Kind:
    """One data set: its module, how it is written, and what each part should have."""

    module: Callable[..., PhotoDataModule]
    write: Callable[[Path], Path]
    classes: int
    of_each: tuple[int, int, int]  # images of each class in train, val and test
    settings: dict[str, Any] = field(default_factory=dict)

    def prepared(self, root: str | Path, stage: str = "fit", **settings: Any) -> Any:
        defaults = {"normalization": "inception", "image_size": 8, **self.settings}
        data = self.module(root=str(root), **{**defaults, **settings})
        data.prepare_data()
        data.setup(stage)
        return data

    @property
    def all_images(self) -> list[tuple[int, int]]:
        return [(label, number) for label in range(self.classes) for number in range(sum(self.of_each))]


QUARTERS = {"val_share": 0.25, "test_share": 0.25}
KINDS = {
    "imagenet": Kind(ImageNetDataModule, write_imagenet, 4, (4, 2, 2), {"val_images": 8}),
    "caltech101": Kind(Caltech101DataModule, write_caltech101, 101, (2, 1, 1), QUARTERS),
    "eurosat": Kind(EuroSATDataModule, write_eurosat, 10, (5, 2, 3)),
    "food101": Kind(Food101DataModule, write_food101, 3, (4, 2, 2), {"val_images": 6}),
    "flowers102": Kind(Flowers102DataModule, write_flowers102, 102, (1, 1, 2)),
}


def command(name: str, folder: Path, data: str, *args: str, **init_args: Any) -> None:
    """Run a command of the command line, in ``folder``, on a tiny network and a data module, for two steps."""
    network = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    site = {"stages": ["pool", "head"], "queries_per_sample": 2}
    strategy = {"class_path": "flops_lightning.strategies.LikelihoodRatio", "init_args": {"sites": [site]}}
    model = {"model_name": "vit_tiny_patch16_224", "model_kwargs": network, "strategy": strategy}
    settings = {
        "trainer": {
            "max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False,
            "callbacks": [{"class_path": "flops_lightning.callbacks.RunSummary"}], "default_root_dir": str(folder),
        },
        "model": {
            "class_path": "flops_lightning.tasks.ForwardImageClassifier",
            "init_args": {**model, "freeze": ["cls_token", "pos_embed", "patch_embed.*", "blocks.*"],
                          "optimizer": {"lr": 0.001}},
        },
        "data": {
            "class_path": f"flops_lightning.datamodules.{data}DataModule",
            "init_args": {"image_size": 16, **init_args},
        },
    }  # fmt: skip
    (folder / "given.yaml").write_text(yaml.safe_dump(settings))
    main([name, "-c", str(folder / "given.yaml"), *args])
