"""A split of Caltech101's classes whose names a small CLIP has read in its captions."""

import json
from collections.abc import Collection
from pathlib import Path

import torch

from experiments.mini_clip import NAMES
from flops_lightning.datamodules import Caltech101DataModule
from flops_lightning.datamodules.caltech101 import CLASSES
from flops_lightning.datamodules.cifar import CIFAR10_CLASSES, CIFAR100_CLASSES
from flops_lightning.datamodules.class_names import in_words
from flops_lightning.errors import SettingError

READ = {*in_words((*CIFAR10_CLASSES, *CIFAR100_CLASSES)), *(word for words in NAMES.values() for word in words)}
"""Names in the captions of ``experiments.mini_clip --cifar100``."""
TRAIN, VAL, TEST = 4, 1, 3  # images of a class


def write_split(root: str, file: Path, *, seed: int, read: Collection[str] = READ) -> None:
    """Write a split in CoOp's form: of each class whose display name was ``read``, 8 images that the seed draws."""
    source = Caltech101DataModule.source
    shown = dict(zip(CLASSES, Caltech101DataModule(root=root).display_names, strict=True))
    listing = source.listings(root, CLASSES, all_classes=True)["train"]
    generator, split = torch.Generator().manual_seed(seed), dict[str, list[tuple[str, int, str]]]()
    for label, name in enumerate(name for name in CLASSES if shown[name] in read):
        own = [file for file, place in zip(listing.files, listing.labels, strict=True) if CLASSES[place] == name]
        files = [str(Path(file).relative_to(source.folder(root))) for file in own]
        if len(files) < TRAIN + VAL + TEST:
            problem = f"has {len(files)} images of {name}, and a class needs {TRAIN + VAL + TEST}."
            raise SettingError("--root", root, problem, "Put more there.")
        order = [files[i] for i in torch.randperm(len(files), generator=generator).tolist()]
        for part, start, count in (("train", 0, TRAIN), ("val", TRAIN, VAL), ("test", TRAIN + VAL, TEST)):
            split.setdefault(part, []).extend((each, label, name) for each in order[start : start + count])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(split) + "\n")
