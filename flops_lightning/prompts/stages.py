"""A frozen CLIP with prompts as a chain of stages on images, whose last one holds the text side.

``patches`` -> ``image_prompt`` -> ``blocks.*`` -> ``pool`` -> ``scores``, or, without an image prompt, ``features`` ->
``scores``. Image features of a query at the text prompt are those of the clean pass, and the other way round.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import Stage, StageContext, StagedNetwork
from flops_lightning.prompts.class_texts import ClassTexts
from flops_lightning.prompts.intrinsic import IntrinsicPrompt, PromptSpec
from flops_lightning.queries import at_least_float32, full_precision

IMAGE_SEED = 2**31  # generators of the CPU read 32 bits, and seeds have 31
"""Added to the seed of an image prompt: the text prompt of the same seed draws other numbers."""


class PromptedCLIP(nn.Module):
    """A CLIP with a text prompt, an image prompt or both; made by :func:`stage_clip`.

    Attributes:
        visual: The image tower.
        texts: The class texts, with the text tower; None without a text prompt.
        text_features: ``(c, e)`` unit features of the classes without a text prompt; None with one.
        text_prompt: The prompt before the class names, or None.
        image_prompt: The prompt after the image's patches, or None.

    Example:
        >>> import open_clip
        >>> tower = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        >>> vision = {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1}
        >>> clip = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=tower).eval()
        >>> images = torch.randn(3, 3, 8, 8)
        >>> prompt = image_start(clip, images, PromptSpec(tokens=2, dim=10))
        >>> module = stage_clip(clip, ClassTexts(clip, ["dog", "cat"]), image_prompt=prompt).module
        >>> module(images).shape, [name for name, p in module.named_parameters() if p.requires_grad]
        (torch.Size([3, 2]), ['image_prompt.z'])
    """

    text_features: Tensor | None

    def __init__(
        self, clip: Any, texts: ClassTexts | Tensor, text_prompt: IntrinsicPrompt | None,
        image_prompt: IntrinsicPrompt | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.visual, self.logit_scale, self.logit_bias = clip.visual, clip.logit_scale, clip.logit_bias
        self.text_prompt, self.image_prompt = text_prompt, image_prompt
        self.texts = texts if isinstance(texts, ClassTexts) and text_prompt is not None else None
        if isinstance(texts, ClassTexts):
            with torch.no_grad():
                fixed = None if text_prompt else texts.encode(texts.words(len(texts.prefix))[None])[0]
        else:
            fixed = texts.detach()
        self.register_buffer("text_features", fixed)
        self.stages = clip_stages(self)  # kept, as the last one keeps the text features

    def forward(self, images: Tensor) -> Tensor:
        """``(b, c)`` logits of ``(b, 3, h, w)`` images."""
        x: Any = images
        for stage in self.stages:
            x = stage.run(x)
        logits: Tensor = x
        return logits


def stage_clip(
    clip: nn.Module, texts: ClassTexts | Tensor, *, text_prompt: IntrinsicPrompt | None = None,
    image_prompt: IntrinsicPrompt | None = None,
) -> StagedNetwork:  # fmt: skip
    """Put prompts into a CLIP of open_clip, freeze all of it, and cut it into stages.

    Args:
        clip: The model; its parameters no longer require a gradient.
        texts: The class texts; or, without a text prompt, ``(c, e)`` unit features of them.
        text_prompt: Stands before the class names, in the place of the template's words.
        image_prompt: Appended to the patch tokens, after their first norm.

    Returns:
        The network: images ``(b, 3, h, w)`` to logits ``(b, c)``. Its module is a :class:`PromptedCLIP`.

    Raises:
        SettingError: no prompt at all, prompts of the wrong width, or an image tower that takes no tokens.

    Example:
        >>> import open_clip
        >>> tower = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        >>> vision = {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1}
        >>> clip = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=tower).eval()
        >>> texts = ClassTexts(clip, ["dog", "hot air balloon"])
        >>> prompt = IntrinsicPrompt(texts.words(4), PromptSpec(tokens=4, dim=10), std=0.02)
        >>> network = stage_clip(clip, texts, text_prompt=prompt)
        >>> [stage.name for stage in network.stages], network.run(torch.randn(3, 3, 8, 8)).shape
        (['features', 'scores'], torch.Size([3, 2]))
    """
    if text_prompt is None and image_prompt is None:
        raise SettingError("text_prompt", None, "and no image_prompt either: nothing would be trained.", "Give one.")
    if text_prompt is not None:
        if not isinstance(texts, ClassTexts):
            problem = "are already features, but a text prompt changes the texts themselves."
            raise SettingError("texts", tuple(texts.shape), problem, "Give ClassTexts.")
        _check_width("text_prompt", text_prompt, texts.width)
        texts.check(len(text_prompt.start))
    if image_prompt is not None:
        _check_width("image_prompt", image_prompt, token_tower(clip).conv1.out_channels)
    clip.requires_grad_(False)
    module = PromptedCLIP(clip, texts, text_prompt, image_prompt)
    return StagedNetwork(module, module.stages)


def text_start(texts: ClassTexts, spec: PromptSpec) -> IntrinsicPrompt:
    """A prompt for :func:`stage_clip`, at the words before the name or at zero; ``W`` as wide as word embeddings."""
    start = texts.words(spec.tokens) if spec.init == "data" else texts.words(0).new_zeros(spec.tokens, texts.width)
    return IntrinsicPrompt(start, spec, std=float(texts.token_embedding.weight.detach().std()))


@torch.no_grad()
def image_start(clip: nn.Module, images: Tensor, spec: PromptSpec) -> IntrinsicPrompt:
    """A prompt for :func:`stage_clip`, at the mean patch of some images or at zero; ``W`` as wide as their patches.

    Raises:
        SettingError: an image tower that takes no tokens.
    """
    patches = raw_patches(token_tower(clip), images)[:, 1:].flatten(0, 1)
    start = patches.mean(0).expand(spec.tokens, -1) if spec.init == "data" else patches.new_zeros(spec.tokens, 1)
    start = start.expand(-1, patches.shape[1])
    return IntrinsicPrompt(start, spec, std=float(patches.std()), seed_offset=IMAGE_SEED)


def token_tower(clip: Any) -> Any:
    """The image tower of a CLIP, where it is a transformer that reads its class token.

    Raises:
        SettingError: it is another.
    """
    visual = clip.visual
    plain = hasattr(visual, "class_embedding") and hasattr(getattr(visual, "transformer", None), "resblocks")
    if not plain or visual.attn_pool is not None or visual.pool_type != "tok" or not visual.transformer.batch_first:
        raise SettingError(
            "image_prompt", type(visual).__name__, "is no image tower of open_clip that is a transformer with a class "
            "token, to which prompt tokens could be added.", "Leave the image prompt out; a text prompt still works.",
        )  # fmt: skip
    return visual


def clip_stages(module: PromptedCLIP) -> tuple[Stage, ...]:
    """The stages of a CLIP with prompts."""
    members, prompted = ("texts", "text_prompt", "logit_scale", "logit_bias"), module.text_prompt is not None
    scores = ClassScores(module)
    context = StageContext(scores.features, scores.logits) if prompted else None
    top = Stage("scores", scores, members, by_row=prompted, context=context)
    if module.image_prompt is None:
        return Stage("features", _Features(module), ("visual",)), top
    embedding = ("conv1", "class_embedding", "positional_embedding", "ln_pre")
    tower = cast("Any", module.visual)
    return (
        Stage("patches", _Patches(module), tuple(f"visual.{part}" for part in embedding)),
        Stage("image_prompt", _Append(module), ("image_prompt",), by_row=True),
        *(
            Stage(f"blocks.{i}", block, (f"visual.transformer.resblocks.{i}",))
            for i, block in enumerate(tower.transformer.resblocks)
        ),
        Stage("pool", _Pool(module), ("visual.ln_post", "visual.proj"), reads=slice(0, 1), narrows=True),
        top,
    )


def _check_width(setting: str, prompt: IntrinsicPrompt, width: int) -> None:
    if prompt.start.shape[1] != width:
        problem = f"has tokens of another width than its tower, {width}."
        raise SettingError(setting, tuple(prompt.start.shape), problem, f"Start from tokens of width {width}.")


# Small objects instead of closures, so that a network survives pickling and deepcopy together with its stages.


@dataclass(frozen=True, eq=False)
class _Features:
    clip: PromptedCLIP

    def __call__(self, images: Tensor) -> Tensor:
        return images if images.dim() == 2 else image_features(self.clip.visual, images)  # or features that were kept


def raw_patches(tower: Any, images: Tensor) -> Tensor:
    """``(b, t, w)`` class token and patches with their positions, before the first norm."""
    patches = tower.conv1(images).flatten(2).transpose(1, 2)
    cls = tower.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
    return torch.cat([cls, patches], 1) + tower.positional_embedding.to(patches.dtype)


def image_features(tower: Any, images: Tensor) -> Tensor:
    """``(b, e)`` unit features of images without a prompt."""
    features = tower(images)
    return normalize(at_least_float32(features[0] if isinstance(features, tuple) else features), dim=-1)


def embedded_patches(tower: Any, images: Tensor) -> Tensor:
    """``(b, t, w)`` tokens that enter the first block, without a prompt."""
    tokens: Tensor = tower.ln_pre(raw_patches(tower, images))
    return tokens


def with_prompt(tower: Any, x: Tensor, prompt: Tensor) -> Tensor:
    """``(r, t + n, w)`` tokens ``x`` and, after them, those of a prompt: ``(n, w)`` for all rows, or each row's own."""
    return torch.cat([x, tower.ln_pre(prompt.to(x.dtype)).expand(len(x), -1, -1)], 1)


def pooled(tower: Any, x: Tensor) -> Tensor:
    """``(r, e)`` unit features of what leaves the last block."""
    cls = tower.ln_post(x[:, 0])
    return normalize(at_least_float32(cls if tower.proj is None else cls @ tower.proj), dim=-1)


@dataclass(frozen=True, eq=False)
class _Patches:
    clip: PromptedCLIP

    def __call__(self, images: Tensor) -> Tensor:
        return embedded_patches(self.clip.visual, images)


@dataclass(frozen=True, eq=False)
class _Append:
    clip: PromptedCLIP

    def __call__(self, x: Tensor) -> Tensor:
        return with_prompt(self.clip.visual, x, cast("IntrinsicPrompt", self.clip.image_prompt)())


@dataclass(frozen=True, eq=False)
class _Pool:
    clip: PromptedCLIP

    def __call__(self, x: Tensor) -> Tensor:
        return pooled(self.clip.visual, x)


@dataclass(eq=False)
class ClassScores:
    """Logits of unit image features ``(r, e)``; keeps the text features for as long as nothing they need changes."""

    clip: PromptedCLIP
    _key: tuple[Any, ...] = ()
    _kept: Tensor | None = field(default=None, repr=False)

    def __call__(self, x: Tensor) -> Tensor:
        """``(r, c)`` logits of image features ``x``."""
        return self.logits(x, self.features())

    def forget(self) -> None:
        """Encode the texts anew when they are needed next."""
        self._key, self._kept = (), None

    def logits(self, x: Tensor, features: Tensor) -> Tensor:
        """``(r, c)`` logits for text features ``(c, e)``, or ``(r, c, e)`` with those of each row."""
        bias, x = self.clip.logit_bias, x.to(features.dtype)
        with full_precision(x):  # queries differ from the clean pass by little
            cosines = (features @ x.unsqueeze(-1)).squeeze(-1) if features.dim() == 3 else x @ features.T
        logits: Tensor = self.clip.logit_scale.exp() * cosines
        return logits if bias is None else logits + bias

    def features(self) -> Tensor:
        """``(c, e)`` unit features of the classes; ``(m, c, e)`` where ``z`` is replaced by ``m`` of them."""
        texts, prompt = self.clip.texts, self.clip.text_prompt
        if texts is None or prompt is None:
            return cast("Tensor", self.clip.text_features)
        # A query replaces the parameter by a plain tensor; a graph belongs to one backward pass.
        if not isinstance(prompt.z, nn.Parameter) or (torch.is_grad_enabled() and prompt.z.requires_grad):
            prompts = prompt()
            return texts.encode(prompts) if prompts.dim() == 3 else texts.encode(prompts[None])[0]
        key = _state((*prompt.parameters(), *prompt.buffers(), *texts.parameters()), prompt.z)
        if self._kept is None or key != self._key:
            # Neither a graph nor the marks of inference mode, in which validation runs: training reads them as well.
            with torch.inference_mode(mode=False), torch.no_grad():
                self._kept, self._key = texts.encode(prompt()[None])[0], key
        return self._kept


def _state(tensors: Iterable[Tensor], like: Tensor) -> tuple[Any, ...]:
    """Changes whenever one of the tensors does: its memory is another, or was written (``_version`` alone tells)."""
    versions = ((t.data_ptr(), t.dtype, 0 if t.is_inference() else t._version) for t in tensors)
    return torch.is_autocast_enabled(like.device.type), *versions
