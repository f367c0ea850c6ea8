"""``python -m experiments.mini_clip --root CIFAR10 --output DIR``: a small CLIP, trained on captions of CIFAR-10.

For studies of prompts without a download: 0.35 million numbers beside the embedding of words, images of 32 pixels. An
image's caption is one of :data:`TEMPLATES` with one of its class's :data:`NAMES`. As a batch holds many images of a
class, the loss is CLIP's for images alone: the cross-entropy over one caption of each class, drawn anew at every step.
Fifteen epochs take about ten minutes of one core. ``DIR`` is then a folder for open_clip: ``local-dir:DIR``. It knows
ten names, and with ``--cifar100 CIFAR100`` the hundred of that data set too.
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.command_line import StudyParser
from flops_lightning.datamodules import CIFAR10DataModule, CIFAR100DataModule
from flops_lightning.datamodules.files import Listing
from flops_lightning.prompts import class_features

CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 96, "head_width": 32, "layers": 2},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
TEMPLATES = (
    "a photo of a {}.", "a blurry photo of a {}.", "a photo of the {}.", "a picture of a {}.", "a small {} in a photo.",
    "a close-up photo of a {}.", "an image of one {}.", "the {}.", "a {}.", "there is a {} in the picture.",
)  # fmt: skip
NAMES = {
    "airplane": ("plane", "aircraft"), "automobile": ("car",), "cat": ("kitten",), "dog": ("puppy",),
    "ship": ("boat",), "truck": ("lorry",),
}  # fmt: skip
"""Other words for a class."""
PADDING = 4  # pixels by which an image is shifted at most
WEIGHTS, SETTINGS = "open_clip_model.safetensors", "open_clip_config.json"


def pixels(listing: Listing) -> tuple[Tensor, Tensor]:
    """``(n, 3, 32, 32)`` pixels from 0 to 255, and the classes."""
    from PIL import Image

    size = CONFIG["vision_cfg"]["image_size"]
    images = np.empty((len(listing.files), size, size, 3), dtype=np.uint8)
    for i, file in enumerate(listing.files):
        image = Image.fromarray(file) if isinstance(file, np.ndarray) else Image.open(file)
        images[i] = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(listing.labels)


def normalized(images: Tensor) -> Tensor:
    """Float images of CLIP's own mean and standard deviation, of pixels from 0 to 255."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    return (images.float() / 255 - mean) / std


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to :data:`PADDING` pixels, half of them mirrored."""
    size = images.shape[-1]
    padded = nn.functional.pad(images, (PADDING,) * 4)
    shift = torch.randint(2 * PADDING + 1, (2, len(images), 1), generator=generator) + torch.arange(size)
    mirrored = torch.rand(len(images), 1, generator=generator) < 0.5
    columns = torch.where(mirrored, shift[1].flip(1), shift[1])
    rows = torch.arange(len(images))[:, None, None]
    return padded.permute(0, 2, 3, 1)[rows, shift[0][:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def captions(names: Sequence[str], generator: torch.Generator) -> list[str]:
    """One caption for each class."""

    def one(choices: Sequence[str]) -> str:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    return [one(TEMPLATES).replace("{}", one((name, *NAMES.get(name, ())))) for name in names]


def train(images: Tensor, labels: Tensor, names: Sequence[str], *, epochs: int, batch: int, seed: int) -> nn.Module:
    """A CLIP, trained by AdamW with a cosine schedule."""
    import open_clip

    torch.manual_seed(seed)
    clip, generator = open_clip.CLIP(**CONFIG), torch.Generator().manual_seed(seed)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    matrices = [p for p in clip.parameters() if p.dim() > 1]
    others = [p for p in clip.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.5e-3, betas=(0.9, 0.98))
    total, step, start = epochs * (len(images) // batch), 0, time.monotonic()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=generator)[: len(images) // batch * batch]
        mean = 0.0
        for index in order.view(-1, batch):
            for group in optimizer.param_groups:
                group["lr"] = 1.5e-3 * min(1.0, step / 200) * 0.5 * (1 + math.cos(math.pi * step / total))
            seen = normalized(augmented(images[index], generator))
            scale = clip.logit_scale.exp().clamp(max=100)
            logits = (
                scale
                * clip.encode_image(seen, normalize=True)
                @ clip.encode_text(tokenizer(captions(names, generator)), normalize=True).T
            )
            loss = cross_entropy(logits, labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step, mean = step + 1, mean + float(loss.detach()) * batch / len(order)
        print(f"epoch {epoch + 1}: loss {mean:.3f}, {time.monotonic() - start:.0f} s", flush=True)
    return clip.eval()


@torch.no_grad()
def accuracy(clip: Any, images: Tensor, labels: Tensor, features: Tensor) -> float:
    """Share of images whose nearest text feature is their class's."""
    right = 0
    for some, truth in zip(images.split(500), labels.split(500), strict=True):
        right += int((clip.encode_image(normalized(some), normalize=True) @ features.T).argmax(1).eq(truth).sum())
    return right / len(labels)


def load(folder: Path | str) -> Any:
    """The CLIP that was saved."""
    import open_clip

    return open_clip.create_model(f"local-dir:{folder}").eval()


def main(args: Sequence[str] | None = None) -> None:
    parser = StudyParser(__doc__, runs=False, epochs=(15, "passes over the images"), batch=(250, "images of a step"))
    parser.add_argument("--root", required=True, help="folder of CIFAR-10: torchvision's archive, or class folders")
    parser.add_argument("--cifar100", help="folder of CIFAR-100, whose training images and names are learned as well")
    parser.add_argument("--images_per_class", type=int, default=0, help="of CIFAR-10, to train on (default all)")
    parser.add_argument("--val_images", type=int, default=5000, help="that are not trained on (default 5000)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and captions (default 0)")
    parser.run(study, args)


def study(options: Any) -> None:
    from safetensors.torch import save_file

    data = CIFAR10DataModule(
        root=options.root, images_per_class=options.images_per_class, val_images=options.val_images
    )
    parts = data.check()
    images, labels = pixels(parts["train"])
    names, more = data.display_names, None
    if options.cifar100:
        more = CIFAR100DataModule(root=options.cifar100, val_images=0)
        others, theirs = pixels(more.check()["train"])
        images, labels = torch.cat([images, others]), torch.cat([labels, theirs + len(names)])
        names = (*names, *more.display_names)
    clip = train(images, labels, names, epochs=options.epochs, batch=options.batch, seed=options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in clip.state_dict().items()}, options.output / WEIGHTS)
    test = pixels(parts["test"])
    beside = sum(p.numel() for name, p in clip.named_parameters() if name != "token_embedding.weight")
    found = {
        "numbers_beside_the_embedding": beside,
        "zero_shot": accuracy(clip, *test, class_features(clip, data.class_names)),
        "zero_shot_ensembled": accuracy(clip, *test, class_features(clip, data.class_names, TEMPLATES)),
    }
    if more is not None:
        features = class_features(clip, more.display_names, TEMPLATES)
        found["zero_shot_cifar100_ensembled"] = accuracy(clip, *pixels(more.check()["test"]), features)
    (options.output / SETTINGS).write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}, indent=2) + "\n")
    (options.output / "trained.json").write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
