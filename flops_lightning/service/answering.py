"""The server's side of the protocol: a mapping in, a mapping out, whatever web framework is around it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.prompts.class_texts import ClassTexts
from flops_lightning.service.local import LocalScorer, clip_info
from flops_lightning.service.payload import ImageStore, classes_name, hex_names, packed, unpacked
from flops_lightning.service.scorer import ANSWERS, TEXTLESS

KINDS = ("images", "classes", "text", "image", "logits", "losses", "patches")
SETS_OF_CLASSES = 16
"""How many are kept; the oldest goes."""


class BadRequest(ValueError):  # noqa: N818 -- the status is the error
    """A request that cannot be answered.

    Attributes:
        status: HTTP status to answer with.

    Example:
        >>> BadRequest("300 rows in a request", 413).status
        413
    """

    def __init__(self, message: str, status: int = 422) -> None:
        super().__init__(message)
        self.status = status


class ClipAnswers:
    """Answers the requests of :class:`~flops_lightning.service.HttpScorer` with a CLIP in this process.

    Attributes:
        info: What ``/info`` tells.

    Example:
        >>> import open_clip
        >>> tower = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
        >>> vision = {"image_size": 8, "patch_size": 4, "width": 16, "head_width": 8, "layers": 1}
        >>> clip = open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=tower).eval()
        >>> answers = ClipAnswers(clip, max_rows=64)
        >>> answers({"kind": "image", "rows": [0], "images": ["0" * 64]})  # not yet handed over
        {'missing': ['0000000000000000000000000000000000000000000000000000000000000000']}
    """

    def __init__(
        self, clip: nn.Module, *, tokenizer: Any = None, answers: tuple[str, ...] = ANSWERS, images_mb: int = 4096,
        model: str = "", max_rows: int = 256, max_bytes: int = 2**25,
    ) -> None:  # fmt: skip
        """Keep the model.

        Args:
            clip: A CLIP of open_clip, on its device and in eval mode.
            tokenizer: The model's; None: CLIP's own.
            answers: Which of :data:`ANSWERS` are given.
            images_mb: Images that are kept, in MiB.
            model: Its name, by which checkpoints tell services apart.
            max_rows: Most rows of a request.
            max_bytes: Most bytes of a request.
        """
        self.info = clip_info(clip, answers, model=model, max_rows=max_rows, max_bytes=max_bytes)
        self.images = ImageStore(2**20 * images_mb)
        self._clip, self._tokenizer, self._kinds = clip, tokenizer, answers
        self._scorers: dict[str, LocalScorer] = {}
        self._images_alone = LocalScorer(clip, None, answers=answers, images=self.images)

    def __call__(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            BadRequest: it cannot be answered; its ``status`` is that of HTTP.
        """
        kind = request.get("kind")
        if kind not in KINDS:
            raise BadRequest(f"kind = {kind!r} is none of {', '.join(KINDS)}", 400)
        try:
            if kind == "images":
                return self._keep(request)
            if kind == "classes":
                return self._learn_classes(request)
            return self._score(kind, request)
        except SettingError as error:
            raise BadRequest(str(error)) from error
        except (KeyError, TypeError, ValueError) as error:
            raise error if isinstance(error, BadRequest) else BadRequest(f"{type(error).__name__}: {error}") from error

    def _keep(self, request: Mapping[str, Any]) -> dict[str, Any]:
        pixels = unpacked(request["pixels"])
        height, width = self.info.image_size
        if list(pixels.shape[1:]) != [3, height, width]:
            raise BadRequest(f"images have the shape {tuple(pixels.shape[1:])} and not {(3, height, width)}")
        if hex_names(self.images.keep(pixels)) != list(request["images"]):
            raise BadRequest("images have other names than their content")
        return {"stored": len(pixels)}

    def _learn_classes(self, request: Mapping[str, Any]) -> dict[str, Any]:
        names, template = list(request["names"]), str(request["template"])
        name = classes_name(names, template)
        if name != request["classes"]:
            raise BadRequest("classes have another name than their content")
        if name not in self._scorers:
            texts = ClassTexts(self._clip, names, template, self._tokenizer, doubled_names=True)
            self._scorers[name] = LocalScorer(self._clip, texts, answers=self._kinds, images=self.images)
            while len(self._scorers) > SETS_OF_CLASSES:
                del self._scorers[next(iter(self._scorers))]
        texts = self._scorers[name].texts
        words = texts.words(len(texts.prefix)) if len(texts.prefix) else torch.zeros(0, texts.width)
        return {"words": packed(words), "room": texts.context - 1 - texts.lengths[-1]}

    def _score(self, kind: str, request: Mapping[str, Any]) -> dict[str, Any]:
        rows = list(request["rows"])
        if not 0 < len(rows) <= self.info.max_rows:
            raise BadRequest(f"{len(rows)} rows in a request, and 1 to {self.info.max_rows} are taken", 413)
        images = [str(name) for name in request.get("images") or ()]
        missing = self.images.missing(images)
        scorer = None
        if kind not in TEXTLESS:
            scorer = self._scorers.get(request["classes"])
            missing += [] if scorer else [request["classes"]]
        if missing:
            return {"missing": missing}
        scorer = scorer or self._images_alone
        text = self._prompts(request.get("text"), len(rows), self.info.text_width)
        image = self._prompts(request.get("image"), len(rows), self.info.image_width)
        names = self.images.names(images)
        values: Tensor
        if kind == "text":
            if len(rows) != (1 if text is None else len(text)):
                raise BadRequest("a text prompt belongs to each row, and none to a single one")
            values = scorer.encode_text(text)
        elif len(images) != len(rows):
            raise BadRequest(f"{len(images)} images for {len(rows)} rows")
        elif kind == "patches":
            values = scorer.patches(names)
        elif kind == "image":
            values = scorer.encode_image(names, image)
        elif kind == "logits":
            values = scorer.logits(names, text, image)
        else:
            values = scorer.losses(names, torch.tensor(request["labels"]), text, image)
        return {"rows": rows, "values": packed(values)}

    @staticmethod
    def _prompts(given: Any, rows: int, width: int) -> Tensor | None:
        if given is None:
            return None
        prompts = unpacked(given)
        if prompts.dim() != 3 or len(prompts) not in (1, rows) or prompts.shape[2] != width:
            raise BadRequest(f"prompts have the shape {tuple(prompts.shape)} and not (1 or {rows}, tokens, {width})")
        return prompts
