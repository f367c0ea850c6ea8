"""A CLIP of open_clip in this process as a scorer: what a server answers with, and the reference of one."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flops_lightning.errors import SettingError
from flops_lightning.network.operations import flops
from flops_lightning.prompts.class_texts import CLASSES_AT_ONCE, ClassTexts
from flops_lightning.prompts.stages import (
    embedded_patches,
    image_features,
    pooled,
    raw_patches,
    token_tower,
    with_prompt,
)
from flops_lightning.service.payload import ImageStore, hex_names
from flops_lightning.service.scorer import ANSWERS, TEXTLESS, Scorer, ServiceInfo


class LocalScorer(Scorer):
    """Scores with a CLIP in this process.

    Example:
        >>> import open_clip
        >>> tower = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        >>> vision = {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1}
        >>> clip = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=tower).eval()
        >>> scorer = LocalScorer(clip, ClassTexts(clip, ["dog", "cat"]))
        >>> names = scorer.keep(torch.randn(3, 3, 8, 8))
        >>> scorer.logits(names, scorer.words(4)[None], None).shape, scorer.usage.rows
        (torch.Size([3, 2]), 3)
    """

    def __init__(
        self, clip: nn.Module, texts: ClassTexts | None, *, answers: tuple[str, ...] = ANSWERS,
        images: ImageStore | None = None,
    ) -> None:  # fmt: skip
        """Keep the model.

        Args:
            clip: A CLIP of open_clip, on its device and in eval mode.
            texts: Its classes; None: images alone are encoded.
            answers: Which of :data:`ANSWERS` it gives.
            images: Where images are kept; None: a store of 1 GiB.
        """
        names = () if texts is None else texts.names
        super().__init__(clip_info(clip, answers), names, ImageStore(2**30) if images is None else images)
        self.clip: Any = clip
        self._texts, self._like = texts, next(clip.parameters()).detach()

    @property
    def texts(self) -> ClassTexts:
        """Its classes (TypeError without any)."""
        if self._texts is None:
            raise TypeError("there are no classes.")
        return self._texts

    def words(self, tokens: int) -> Tensor:
        """See :meth:`Scorer.words`."""
        return self.texts.words(tokens)

    @torch.no_grad()
    def _answers(self, kind: str, count: int, asked: Mapping[str, Tensor]) -> Tensor:
        text = asked.get("text")
        passes = 0 if kind in TEXTLESS else 1 if text is None else len(text)
        self.usage.add(calls=1, rows=count, text_passes=passes)
        device = self._like.device
        if kind == "patches":
            return self._patches(asked["names"]).cpu()
        if kind == "image":
            return self._image(asked["names"], asked.get("image")).cpu()
        words = self.texts.words(len(self.texts.prefix))[None] if text is None else text.to(device)
        of_texts = self.texts.encode(words)
        if kind == "text":
            return of_texts.cpu()
        features, of_texts = self._image(asked["names"], asked.get("image")), of_texts.expand(count, -1, -1)
        cosines = (of_texts @ features.unsqueeze(-1).to(of_texts)).squeeze(-1)
        logits = self.info.logit_scale * cosines + self.info.logit_bias
        if kind == "logits":
            return logits.cpu()
        return cross_entropy(logits, asked["labels"].to(device), reduction="none").cpu()

    def _pixels(self, names: Tensor) -> Tensor:
        return self.images.get(hex_names(names)).to(self._like)

    def _patches(self, names: Tensor) -> Tensor:
        patches = raw_patches(token_tower(self.clip), self._pixels(names))[:, 1:]
        return torch.cat([patches.mean(1), patches.square().mean((1, 2))[:, None]], 1)

    def _image(self, names: Tensor, prompts: Tensor | None) -> Tensor:
        """``(r, e)``; what belongs to an image alone is computed once for all its rows."""
        tower, like = self.clip.visual, self._like
        alone, place = names.unique(dim=0, return_inverse=True)
        images, place = self._pixels(alone), place.to(like.device)
        if prompts is None:
            return image_features(tower, images)[place]
        x = with_prompt(tower, embedded_patches(tower, images)[place], prompts.to(like))
        for block in tower.transformer.resblocks:
            x = block(x)
        return pooled(tower, x)


def clip_info(clip: Any, answers: tuple[str, ...] = ANSWERS, *, model: str = "", **limits: int) -> ServiceInfo:
    """What a service with this CLIP tells of it; ``limits``: ``max_rows``, ``max_bytes``."""
    tower, visual, bias = getattr(clip, "text", clip), clip.visual, clip.logit_bias
    size = visual.image_size
    image_size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    blank = torch.zeros(1, 3, *image_size).to(tower.positional_embedding)
    try:
        image_width = int(token_tower(clip).conv1.out_channels)
    except SettingError:  # it takes no image prompt
        image_width = 0
    pixels = getattr(visual, "preprocess_cfg", None) or {}
    mean, std = (tuple(pixels.get(part, ())) for part in ("mean", "std"))
    # A tree of usual names: a dozen tokens and 64 endings of five.
    length, width = 13 + 5 * CLASSES_AT_ONCE, int(tower.positional_embedding.shape[1])
    tree, mask = (blank.new_zeros(*shape) for shape in ((1, length, width), (length, length)))
    with torch.no_grad():
        work, features = flops(partial(image_features, visual), blank)
        of_classes, _ = flops(partial(tower.transformer, attn_mask=mask), tree)
    return ServiceInfo(
        answers=answers, model=model or type(clip).__name__, text_width=width, image_width=image_width,
        features=features.shape[1], context=int(tower.context_length), image_size=image_size,
        mean=mean, std=std,
        text_std=float(tower.token_embedding.weight.detach().std()),
        logit_scale=float(clip.logit_scale.detach().exp()), logit_bias=0.0 if bias is None else float(bias.detach()),
        image_flops=work, class_flops=of_classes / CLASSES_AT_ONCE, **limits,
    )  # fmt: skip
