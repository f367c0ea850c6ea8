"""Class folders with images of noise, and weights of the small ViT, for tests that run CIFAR-10's configuration."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import yaml
from PIL import Image
from safetensors.torch import save_file

from flops_lightning.datamodules import CIFAR10DataModule

CONFIG = Path(__file__).parents[1] / "configs/vit_micro_cifar10.yaml"


def noise_images(
    root: Path, *, train: int, test: int, class_names: Sequence[str] = CIFAR10DataModule.class_names
) -> None:
    """Write this many images a class of each part below ``root``."""
    pixels = np.random.default_rng(0)
    for part, number in (("train", train), ("test", test)):
        for name in class_names:
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                image = Image.fromarray(pixels.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                image.save(root / part / name / f"{i}.png")


def weights_argument(root: Path) -> str:
    """Write weights of a network with another head, in half precision; the argument that loads them."""
    model = yaml.safe_load(CONFIG.read_text())["model"]["init_args"]
    network = timm.create_model(model["model_name"], num_classes=200, **model["model_kwargs"])
    save_file({name: value.half() for name, value in network.state_dict().items()}, root / "model.safetensors")
    return f"--model.init_args.checkpoint={root / 'model.safetensors'}"
