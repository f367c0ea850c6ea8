"""Make ``data/assets/clip_tiny_digits``: a tiny CLIP that reads upright handwritten digits.

    python -m experiments.digits_clip data/assets/clip_tiny_digits

It is trained by ordinary backprop, images against the texts "zero" to "nine" in several templates, and keeps the few
tokens that these texts have. The folder is in open_clip's own form (``local-dir:``).
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy, normalize

from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.tasks.clip_model import CONFIG, FewTokens

TEMPLATES = (
    DigitsDataModule.template, "a photo of a {}.", "a photo of the {}.", "a {}.", "the number {}.", "the digit {}.",
    'a "{}".', "a handwritten {}.", "a small photo of the number {}.", "a dark photo of the digit {}.",
)  # fmt: skip
VISION = {"image_size": 8, "patch_size": 2, "width": 48, "head_width": 12, "layers": 4, "mlp_ratio": 2.0}
CONTEXT = 32
TEXT = {"context_length": CONTEXT, "width": 48, "heads": 4, "layers": 2, "mlp_ratio": 2.0}
EMBED = 32
STEPS, BATCH, RATE = 1500, 128, 1e-3


def main(args: Sequence[str] | None = None) -> None:
    """Train, say how many test digits it reads with the data's template, and write the folder."""
    import open_clip

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(args)
    torch.manual_seed(options.seed)
    data: Any = DigitsDataModule()
    data.setup("fit")
    names, whole = data.display_names, open_clip.SimpleTokenizer()
    texts = [template.replace("{}", name) for template in TEMPLATES for name in names]
    kept = whole(texts, context_length=CONTEXT).unique()
    tokenizer = FewTokens(whole, kept)
    config = {"embed_dim": EMBED, "vision_cfg": VISION, "text_cfg": {**TEXT, "vocab_size": len(kept)}}
    clip = open_clip.CLIP(**config)
    ids = torch.stack([tokenizer([t.replace("{}", n) for n in names], context_length=CONTEXT) for t in TEMPLATES])
    images, labels = data.train_set.tensors
    optimizer = torch.optim.AdamW(clip.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=options.steps)
    for _ in range(options.steps):
        some = torch.randint(len(images), (BATCH,))
        template = ids[int(torch.randint(len(ids), ()))]
        features = clip.encode_image(images[some].expand(-1, 3, -1, -1), normalize=True)
        logits = clip.logit_scale.exp() * features @ clip.encode_text(template, normalize=True).T
        optimizer.zero_grad()
        cross_entropy(logits, labels[some]).backward()
        optimizer.step()
        schedule.step()
        clip.logit_scale.data.clamp_(max=4.6052)  # 100, as CLIP's
    clip.eval()
    with torch.no_grad():
        tested, right = data.test_set.tensors
        scores = normalize(clip.encode_image(tested.expand(-1, 3, -1, -1)), dim=1) @ clip.encode_text(ids[0]).T
        print(f"test digits: {float((scores.argmax(1) == right).float().mean()):.1%}")
    options.folder.mkdir(parents=True, exist_ok=True)
    statistics = {part: [getattr(data, part)[0]] * 3 for part in ("mean", "std")}
    about = {"model_cfg": config, "preprocess_cfg": statistics, "tokens": kept.tolist()}
    (options.folder / CONFIG).write_text(json.dumps(about, indent=1) + "\n")
    save_file({n: t.contiguous() for n, t in clip.state_dict().items()}, options.folder / "open_clip_model.safetensors")


if __name__ == "__main__":
    main()
