"""A tiny CLIP of open_clip with random weights, and its text tower on one padded sequence a class."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from flops_lightning.network.staging import StagedNetwork
from flops_lightning.prompts import ClassTexts, PromptSpec, image_start, stage_clip, text_start

open_clip = pytest.importorskip("open_clip", reason="prompts are for its models")

VISION = {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 2}
TEXT = {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
NAMES = ("dog", "hot air balloon", "black-and-white colobus monkey", "cat")


def tiny_clip(kind: Any = open_clip.CLIP, text: dict[str, Any] | None = None, **vision: Any) -> nn.Module:
    """Random weights, always the same, large enough that tokens matter to each other."""
    torch.manual_seed(3)
    clip = kind(embed_dim=8, vision_cfg=VISION | vision, text_cfg=TEXT | (text or {}))
    for parameter in clip.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)
    return clip.eval()


def prompted(
    *, text: bool = True, image: bool = True, dim: int = 5, clip: nn.Module | None = None
) -> tuple[StagedNetwork, Tensor, Tensor]:
    """A staged tiny CLIP in float64 with prompts that have left their start, three images and their classes."""
    clip = clip or tiny_clip()
    texts, images = ClassTexts(clip, NAMES), torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = {
        "text_prompt": text_start(texts, PromptSpec(tokens=4, dim=dim)) if text else None,
        "image_prompt": image_start(clip, images, PromptSpec(tokens=2, dim=dim, seed=1)) if image else None,
    }
    network = stage_clip(clip, texts, **prompts)
    network.module.double()
    for prompt in prompts.values():
        if prompt is not None:
            nn.init.normal_(prompt.z, generator=torch.Generator().manual_seed(2))
    return network, images.double(), torch.tensor([0, 1, 3])


def padded_features(clip: Any, texts: list[str], prompt: Tensor, words: int) -> Tensor:
    """``(c, e)``: the model's own pass over texts, ``prompt`` ``(n, w)`` in the place of ``words`` after the start."""
    tower = getattr(clip, "text", clip)
    rows = []
    for ids in open_clip.tokenize(texts, context_length=tower.context_length):
        end = int(ids.argmax())
        embedded = tower.token_embedding(ids)
        x = torch.cat([embedded[:1], prompt, embedded[1 + words :]])
        padding = embedded[-1:].expand(max(0, tower.context_length - len(x)), -1)
        x = torch.cat([x, padding])[: tower.context_length] + tower.positional_embedding
        x = tower.ln_final(tower.transformer(x[None], attn_mask=tower.attn_mask))[0, end - words + len(prompt)]
        projection = tower.text_projection
        rows.append(projection(x) if isinstance(projection, nn.Linear) else x @ projection)
    return normalize(torch.stack(rows), dim=-1)
