"""Who scores images and prompts: the interface of a service and of a model in this process."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.noise.keys import NoiseKey
from flops_lightning.service.payload import ImageStore, changed
from flops_lightning.service.rounding import RoundingWatch
from flops_lightning.service.usage import Usage

ANSWERS = ("losses", "logits", "features")
"""What a service may answer: (a) the loss of a row, (b) its logits, (c) features of texts and of images apart."""

TEXTLESS = ("image", "patches")
"""Questions to which no text is encoded."""


@dataclass(frozen=True)
class ServiceInfo:
    """What a service tells of its model (``/info``).

    Attributes:
        answers: Which of :data:`ANSWERS` it gives.
        model: Name of the model, by which checkpoints tell services apart.
        text_width: Width of a token of the text tower; 0 where it takes no text prompt.
        image_width: The same of the image tower.
        features: Length ``e`` of a feature.
        context: Most tokens of a text.
        image_size: Height and width of an image.
        mean: What is subtracted from the channels of an image; empty where it is not known.
        std: What they are divided by.
        text_std: Standard deviation of the word embeddings, beside which a text prompt stands.
        logit_scale: Factor of the cosines.
        logit_bias: What is added to them.
        max_rows: Most rows of a request.
        max_bytes: Most bytes of a request.
        image_flops: Work of an image with its prompt; 0 where it is not known.
        class_flops: Work of a text prompt for each class, about; 0 where it is not known.

    Example:
        >>> told = {"answers": ["losses"], "model": "ViT-B-32", "max_rows": 64, "further": "things"}
        >>> ServiceInfo.read(told).max_rows
        64
    """

    answers: tuple[str, ...]
    model: str = ""
    text_width: int = 0
    image_width: int = 0
    features: int = 0
    context: int = 0
    image_size: tuple[int, int] = (0, 0)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    text_std: float = 0.0
    logit_scale: float = 1.0
    logit_bias: float = 0.0
    max_rows: int = 256
    max_bytes: int = 2**25
    image_flops: float = 0.0
    class_flops: float = 0.0

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> "ServiceInfo":
        """From what ``/info`` answers, of which further entries are left alone.

        Raises:
            ValueError: an entry is missing or has another type.
        """
        given = {each.name: told[each.name] for each in fields(cls) if each.name in told}
        if not isinstance(given.get("answers"), (list, tuple)) or not set(given["answers"]) & set(ANSWERS):
            raise ValueError(f"it has no `answers` out of {', '.join(ANSWERS)}")
        made: dict[str, Any] = {}
        for each in fields(cls):
            if each.name in given:
                kind: Any = tuple if each.name == "answers" else type(each.default)
                made[each.name] = kind(given[each.name])
        if made.get("max_rows", 1) < 1 or made.get("max_bytes", 1) < 1:
            raise ValueError("its largest request is less than one row")
        return cls(**made)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, which :meth:`read` takes."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


@dataclass(frozen=True)
class RemoteTower:
    """What is known of an image tower elsewhere, as open_clip's towers tell it.

    Attributes:
        image_size: Height and width of an image.
        preprocess_cfg: Its ``mean`` and ``std``; empty where they are not known.
    """

    image_size: tuple[int, int]
    preprocess_cfg: Mapping[str, Any]


class Scorer(ABC):
    """Scores images with prompts, in this process or elsewhere.

    Prompts are ``(m, n, w)`` tokens, of one row each, or, with ``m = 1``, of all. None: without one. Rows that were
    lost are NaN.

    Attributes:
        info: What the model is.
        names: Names of the classes, in the order of the logits.
        usage: What was asked so far.
        max_queries: Rows after which nothing more is asked; 0: no limit.
        images: Images that were handed over.

    Example:
        >>> class Indifferent(Scorer):
        ...     def words(self, tokens):
        ...         return torch.zeros(tokens, 16)
        ...
        ...     def _answers(self, kind, count, asked):
        ...         self.usage.add(calls=1, rows=count)
        ...         return torch.zeros(count, *self.shape_of(kind))
        >>> scorer = Indifferent(ServiceInfo(answers=("logits",)), ["dog", "cat"], ImageStore(2**20))
        >>> scorer.logits(scorer.keep(torch.randn(3, 3, 8, 8)), None, None).shape, scorer.usage.rows
        (torch.Size([3, 2]), 3)
    """

    def __init__(self, info: ServiceInfo, names: Sequence[str], images: ImageStore) -> None:
        """Keep what is known of the model."""
        self.info, self.names, self.images = info, tuple(names), images
        self.usage, self.max_queries, self._rounding = Usage(), 0, RoundingWatch()

    def __deepcopy__(self, memo: Any) -> "Scorer":
        """Itself: copies of a network ask the same model, and what they spend is counted once."""
        return self

    @contextmanager
    def rows_of(self, key: NoiseKey) -> Iterator[None]:
        """Tell whose rows are asked for while the context lasts; site ``clean``: unperturbed ones."""
        del key
        yield

    def keep(self, images: Tensor) -> Tensor:
        """``(b, 4)`` names of ``(b, 3, h, w)`` images, by which rows refer to them.

        Raises:
            SettingError: images of another size than the model's.
        """
        size = self.info.image_size
        if images.dim() != 4 or (all(size) and tuple(images.shape[2:]) != tuple(size)):
            problem = f"is not the shape of images that the model takes, (b, 3, {size[0]}, {size[1]})."
            raise SettingError("data", tuple(images.shape), problem, "Resize them to the model's size.")
        return self.images.keep(images)

    @abstractmethod
    def words(self, tokens: int) -> Tensor:
        """``(tokens, w)`` embeddings of the template's words before the class name, as a start of the text prompt."""

    def patches(self, names: Tensor) -> Tensor:
        """``(r, w + 1)`` mean patch of ``(r, 4)`` images, and the mean square of their patches' numbers."""
        return self._asked("patches", len(names), names, None, None, None)

    def encode_text(self, prompts: Tensor | None) -> Tensor:
        """``(m, c, e)`` unit features of all classes for each of ``(m, n, w)`` prompts; None: for the template."""
        return self._asked("text", 1 if prompts is None else len(prompts), None, None, prompts, None)

    def encode_image(self, names: Tensor, prompts: Tensor | None) -> Tensor:
        """``(r, e)`` unit features of ``(r, 4)`` images."""
        return self._asked("image", len(names), names, None, None, prompts)

    def logits(self, names: Tensor, text: Tensor | None, image: Tensor | None) -> Tensor:
        """``(r, c)`` logits of ``(r, 4)`` images."""
        return self._asked("logits", len(names), names, None, text, image)

    def losses(self, names: Tensor, labels: Tensor, text: Tensor | None, image: Tensor | None) -> Tensor:
        """``(r,)`` cross-entropies of ``(r, 4)`` images with ``(r,)`` labels."""
        return self._asked("losses", len(names), names, labels, text, image)

    def _asked(
        self, kind: str, count: int, names: Tensor | None, labels: Tensor | None, text: Tensor | None,
        image: Tensor | None,
    ) -> Tensor:  # fmt: skip
        by_row = {"names": names, "labels": labels, "text": text, "image": image}
        device = next((x.device for x in (names, text) if x is not None), torch.device("cpu"))
        given = {name: x.detach().cpu() for name, x in by_row.items() if x is not None}
        needs = kind if kind in ANSWERS else "features"
        if needs not in self.info.answers and kind != "patches":
            problem = f"gives {', '.join(self.info.answers)}, and {needs} were asked for."
            raise SettingError("service", self.info.model, problem, "Write pairing: joint.")
        own = {name: x for name, x in given.items() if len(x) == count}
        keep = changed(*own.values()) if own else torch.ones(count, dtype=torch.bool)
        place = keep.long().cumsum(0) - 1
        asked = {name: x[keep] if name in own else x for name, x in given.items()}
        rows = int(keep.sum())
        self.usage.check_room(rows, self.max_queries)
        answers = self._answers(kind, rows, asked)
        self._rounding.see(kind, asked.get("names"), answers)
        return answers[place].to(device)

    @abstractmethod
    def _answers(self, kind: str, count: int, asked: Mapping[str, Tensor]) -> Tensor:
        """``(r, ...)`` values for rows whose tensors (``names``, ``labels``, ``text``, ``image``) are on the CPU."""

    def shape_of(self, kind: str) -> tuple[int, ...]:
        """Shape of a row's values."""
        c, e = len(self.names), self.info.features
        shapes = {"text": (c, e), "image": (e,), "logits": (c,), "patches": (self.info.image_width + 1,)}
        return shapes.get(kind, ())
