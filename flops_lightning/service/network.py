"""Prompts in front of a scorer, as a chain of stages on images: strategies need not know that rows run elsewhere.

With ``features`` ``images`` -> ``image_prompt`` (or ``features``) -> ``scores``, as :func:`stage_clip` cuts a model;
with ``logits`` or ``losses`` ``images`` -> ``scores`` -> ``answer``, where a row moves both prompts and pays for both.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError, check_choice
from flops_lightning.network.rows import Rows
from flops_lightning.network.staging import Stage, StageContext, StagedNetwork
from flops_lightning.noise.keys import NoiseKey
from flops_lightning.prompts.intrinsic import IntrinsicPrompt
from flops_lightning.prompts.stages import ClassScores
from flops_lightning.service.payload import WORDS, hex_names
from flops_lightning.service.scorer import ANSWERS, RemoteTower, Scorer

Answer = Literal["losses", "logits", "features"]


class ServiceCLIP(nn.Module):
    """Prompts for a CLIP that is somewhere else; made by :func:`stage_service`.

    Attributes:
        scorer: Who scores.
        answer: What it is asked for.
        text_prompt: The prompt before the class names, or None.
        image_prompt: The prompt after the image's patches, or None.

    Example:
        >>> import open_clip
        >>> from flops_lightning.prompts import ClassTexts, PromptSpec
        >>> from flops_lightning.service import LocalScorer, service_image_start
        >>> tower = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        >>> vision = {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1}
        >>> clip = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=tower).eval()
        >>> scorer = LocalScorer(clip, ClassTexts(clip, ["dog", "cat"]))
        >>> images = torch.randn(3, 3, 8, 8)
        >>> prompt = service_image_start(scorer, images, PromptSpec(tokens=2, dim=10))
        >>> module = stage_service(scorer, image_prompt=prompt, answer="logits").module
        >>> with torch.no_grad():
        ...     logits = module(images)
        >>> logits.shape, [name for name, p in module.named_parameters()]
        (torch.Size([3, 2]), ['image_prompt.z'])
    """

    logit_scale: Tensor
    logit_bias: Tensor

    def __init__(
        self, scorer: Scorer, answer: Answer, text_prompt: IntrinsicPrompt | None, image_prompt: IntrinsicPrompt | None
    ) -> None:
        super().__init__()
        self.scorer, self.answer = scorer, answer
        self.text_prompt, self.image_prompt = text_prompt, image_prompt
        self.texts, self.text_features = _Texts(self), None
        self.register_buffer("logit_scale", torch.tensor(scorer.info.logit_scale).log(), persistent=False)
        self.register_buffer("logit_bias", torch.tensor(scorer.info.logit_bias), persistent=False)
        pixels = {"mean": scorer.info.mean, "std": scorer.info.std} if scorer.info.std else {}
        self.visual = RemoteTower(scorer.info.image_size, pixels)
        self.asks = True
        self.stages = _stages(self)

    def forward(self, inputs: Any) -> Tensor:
        """``(b, c)`` logits of ``(b, 3, h, w)`` images; ``(b, 1)`` losses of ``images`` and ``labels``."""
        x = inputs
        for stage in self.stages:
            x = stage.run(x)
        logits: Tensor = x
        return logits

    def rows_of(self, key: NoiseKey) -> AbstractContextManager[None]:
        """See :meth:`StagedNetwork.rows_of`."""
        return self.scorer.rows_of(key)

    @contextmanager
    def unpaid(self) -> Iterator[None]:
        """See :meth:`StagedNetwork.unpaid`."""
        self.asks = False
        try:
            yield
        finally:
            self.asks = True

    def of_text(self) -> Tensor | None:
        """``(m, n, w)`` text prompts, or None."""
        return None if self.text_prompt is None else _by_row(self.text_prompt)

    def of_image(self) -> Tensor | None:
        """``(m, n, w)`` image prompts, or None."""
        return None if self.image_prompt is None else _by_row(self.image_prompt)

    def ask(self, kind: str, rows: int, *given: Any) -> Tensor:
        """The scorer's answer to ``rows`` rows; zeros where nothing is asked."""
        scorer = self.scorer
        if not self.asks:
            return torch.zeros(rows, *scorer.shape_of(kind), device=self.logit_scale.device)
        tensors = [x for x in given if isinstance(x, Tensor)]
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            raise self._no_derivative()
        method = {"text": "encode_text", "image": "encode_image"}.get(kind, kind)
        try:
            [x.numpy() for x in tensors if x.device.type == "cpu" and not x.requires_grad]
        except RuntimeError as error:  # a tensor of torch.func has no numbers of its own
            raise self._no_derivative() from error
        answer: Tensor = getattr(scorer, method)(*given)
        return answer

    def _no_derivative(self) -> SettingError:
        problem = "returns only numbers, but derivatives are needed."
        remedy = "Use EvolutionStrategies or SPSA, and torch.no_grad() outside of them."
        return SettingError("service", self.scorer.info.model, problem, remedy)


def stage_service(
    scorer: Scorer, *, text_prompt: IntrinsicPrompt | None = None, image_prompt: IntrinsicPrompt | None = None,
    answer: Answer = "features",
) -> StagedNetwork:  # fmt: skip
    """Put prompts in front of a scorer.

    Args:
        scorer: A :class:`LocalScorer` or :class:`HttpScorer`.
        text_prompt: Stands before the class names, in the place of the template's words.
        image_prompt: Appended to the patch tokens.
        answer: What the scorer is asked for. ``features`` of texts and images apart, so that each prompt is moved by
            itself (sites ``image_prompt`` and ``scores``) and text draws are shared; ``logits``, or ``losses``, of
            which the inputs are mappings of ``images`` and ``labels`` and the outputs ``(b, 1)`` (one site ``scores``).

    Returns:
        The network: images ``(b, 3, h, w)`` to logits ``(b, c)``, or losses. Its module is a :class:`ServiceCLIP`.

    Raises:
        SettingError: no prompt at all, prompts of another width, or an answer that the scorer does not give.

    Example:
        >>> import open_clip
        >>> from flops_lightning.prompts import ClassTexts, PromptSpec
        >>> from flops_lightning.service import LocalScorer, service_text_start
        >>> tower = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        >>> vision = {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1}
        >>> clip = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=tower).eval()
        >>> scorer = LocalScorer(clip, ClassTexts(clip, ["dog", "cat"]))
        >>> prompt = service_text_start(scorer, PromptSpec(tokens=4, dim=10))
        >>> network = stage_service(scorer, text_prompt=prompt)
        >>> with torch.no_grad():
        ...     logits = network.run(torch.randn(3, 3, 8, 8))
        >>> [stage.name for stage in network.stages], logits.shape
        (['images', 'features', 'scores'], torch.Size([3, 2]))
    """
    check_choice("answer", answer, ANSWERS)
    info = scorer.info
    if text_prompt is None and image_prompt is None:
        raise SettingError("text_prompt", None, "and no image_prompt either: nothing would be trained.", "Give one.")
    if answer not in info.answers:
        problem = f"is not among what the service gives, {', '.join(info.answers)}."
        remedy = "Write pairing: joint." if answer == "features" else f"Write {info.answers[0]}."
        raise SettingError("answer", answer, problem, remedy)
    for name, prompt, width in (
        ("text_prompt", text_prompt, info.text_width), ("image_prompt", image_prompt, info.image_width),
    ):  # fmt: skip
        if prompt is not None and prompt.start.shape[1] != width:
            problem = f"has tokens of another width than the service's tower, {width}."
            remedy = f"Start from tokens of width {width}." if width else "Leave it out."
            raise SettingError(name, tuple(prompt.start.shape), problem, remedy)
    if text_prompt is not None:
        scorer.words(len(text_prompt.start))  # refuses what leaves no room for a class
    module = ServiceCLIP(scorer, answer, text_prompt, image_prompt)
    return StagedNetwork(module, module.stages)


def _by_row(prompt: IntrinsicPrompt) -> Tensor:
    tokens = prompt()
    return tokens if tokens.dim() == 3 else tokens[None]


def _stages(module: ServiceCLIP) -> tuple[Stage, ...]:
    info, prompts = module.scorer.info, ("text_prompt", "image_prompt")
    image, text = info.image_flops or 1.0, info.class_flops * len(module.scorer.names) or 1.0
    images = Stage("images", _Images(module), (), flops=(0.0, 0.0))
    if module.answer != "features":
        scores = Stage("scores", _Joint(module), prompts, by_row=True, flops=(image + text, 0.0))
        return images, scores, Stage("answer", _same, (), flops=(0.0, 0.0))
    encoded = Stage("features", _Features(module), ("image_prompt",), by_row=True, flops=(image, 0.0))
    if module.image_prompt is not None:
        encoded = Stage("image_prompt", _Features(module), ("image_prompt",), by_row=True, flops=(image, 0.0))
    top = _Scores(cast("Any", module))
    prompted = module.text_prompt is not None
    context = StageContext(top.features, top.logits) if prompted else None
    work = (0.0, text if prompted else 0.0)
    return images, encoded, Stage("scores", top, ("text_prompt",), by_row=prompted, context=context, flops=work)


@dataclass(frozen=True, eq=False)
class _Images:
    """Names in the place of images; behind them their labels, where losses are asked for."""

    clip: ServiceCLIP

    def __call__(self, inputs: Any) -> Tensor:
        labels = None
        if isinstance(inputs, Rows):
            inputs = inputs.tree()
        if not isinstance(inputs, Tensor):
            inputs, labels = inputs["images"], inputs["labels"]
        if (labels is None) == (self.clip.answer == "losses"):
            problem = "must be mappings of `images` and `labels` where a service returns losses, and else images."
            raise SettingError("inputs", type(inputs).__name__, problem, "Give them so.")
        images: Tensor = inputs
        if images.dim() == 2:  # features that were kept
            return images
        if self.clip.asks:
            names = self.clip.scorer.keep(images)
        else:
            names = torch.zeros(len(images), WORDS, dtype=torch.long, device=images.device)
        return names if labels is None else torch.cat([names, labels.view(-1, 1).to(names)], 1)


@dataclass(eq=False)
class _Features:
    """Unit features of named images; without a prompt each image is encoded once in a run."""

    clip: ServiceCLIP

    def __post_init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def __call__(self, names: Tensor) -> Tensor:
        if names.is_floating_point():  # features that were kept
            return names
        prompts = self.clip.of_image()
        if prompts is not None or not self.clip.asks:
            return self.clip.ask("image", len(names), names, prompts)
        texts = hex_names(names)
        new = [i for i, name in enumerate(texts) if name not in self._kept]
        if new:
            found = self.clip.ask("image", len(new), names[new], None)
            known = torch.isfinite(found).all(1).tolist()
            self._kept |= {texts[i]: x for i, x, here in zip(new, found, known, strict=True) if here}
        lost = torch.full((self.clip.scorer.info.features,), torch.nan, device=names.device)
        return torch.stack([self._kept.get(name, lost) for name in texts])


class _Texts:
    """The class texts at a service, in the form of :class:`ClassTexts`."""

    def __init__(self, clip: ServiceCLIP) -> None:
        self._clip = clip

    def encode(self, prompts: Tensor) -> Tensor:
        """``(m, c, e)`` features for ``(m, n, w)`` prompts."""
        return self._clip.ask("text", len(prompts), prompts)

    def parameters(self) -> tuple[Tensor, ...]:
        """None that could change."""
        return ()


class _Scores(ClassScores):
    """Logits of features; those of texts are kept, unless some were lost."""

    def features(self) -> Tensor:
        """See :class:`ClassScores`."""
        clip = cast("ServiceCLIP", self.clip)
        if not clip.asks:
            return clip.ask("text", 1)[0]
        if clip.text_prompt is None and self._kept is None:
            self._kept = clip.ask("text", 1, None)[0].to(clip.logit_scale.device)
        found = super().features() if clip.text_prompt is not None else cast("Tensor", self._kept)
        if not bool(torch.isfinite(found).all()):
            self.forget()
        return found


@dataclass(frozen=True, eq=False)
class _Joint:
    """Logits or losses of rows, each with both prompts."""

    clip: ServiceCLIP

    def __call__(self, names: Tensor) -> Tensor:
        text, image = self.clip.of_text(), self.clip.of_image()
        if self.clip.answer == "logits":
            return self.clip.ask("logits", len(names), names, text, image)
        return self.clip.ask("losses", len(names), names[:, :WORDS], names[:, WORDS], text, image).unsqueeze(1)


def _same(x: Tensor) -> Tensor:
    return x
