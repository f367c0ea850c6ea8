"""A scorer at the other end of an HTTP connection."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.noise.keys import NoiseKey
from flops_lightning.prompts.class_texts import check_class_names
from flops_lightning.service.client import Request, ServiceClient
from flops_lightning.service.payload import BASE64, ImageStore, classes_name, hex_names, packed, unpacked
from flops_lightning.service.scorer import TEXTLESS, Scorer, ServiceInfo
from flops_lightning.service.settings import ServiceSettings

MOST_UPLOAD = 2**23
"""Bytes of images in a request that hands them over."""


class HttpScorer(Scorer):
    """Asks a scoring service; docs/service.md has the protocol.

    Images and classes are handed over when they are first needed, and again to a server that has lost them.

    Attributes:
        client: Connections and retries.
        template: Text with ``{}`` where the class name stands.

    Example:
        >>> HttpScorer("http://localhost:8000", ["dog", "cat", "dog"])
        Traceback (most recent call last):
        flops_lightning.errors.SettingError: class_names = 'dog': is the name of two classes, whose texts would be ...
    """

    def __init__(
        self, url: str, names: Sequence[str], template: str = "a photo of a {}.", *, doubled_names: bool = False,
        **settings: Any,
    ) -> None:  # fmt: skip
        """Ask the server what it is.

        Args:
            url: Its address.
            names: Names of the classes, in the order of the logits.
            template: Text with ``{}`` where the name stands. The prompt takes the place of what comes before it.
            doubled_names: Accept the name of two classes.
            **settings: Those of :class:`ServiceSettings`.

        Raises:
            SettingError: settings or names that cannot work; a server that does not answer, or is no scorer.
        """
        check_class_names(names, doubled=doubled_names)
        self.client = ServiceClient(ServiceSettings(url=url, **settings))
        super().__init__(self._info(), names, ImageStore(2**20 * self.client.settings.images_mb))
        self.usage, self.template = self.client.usage, template
        self.largest = self.client.settings.rows_of_a_request(self.info.max_rows)
        self._classes = classes_name(names, template)
        self._known: set[str] = set()  # what the server has
        self._words: Tensor | None = None
        self._room = 0  # tokens of the text prompt

    def _info(self) -> ServiceInfo:
        return self.client.read_info(ServiceInfo.read, "a scorer", "Compare it with docs/service.md.")

    @contextmanager
    def rows_of(self, key: NoiseKey) -> Iterator[None]:
        """See :meth:`Scorer.rows_of`."""
        with self.client.rows_of(key):
            yield

    def words(self, tokens: int) -> Tensor:
        """See :meth:`Scorer.words`."""
        self._hand_over_classes()
        assert self._words is not None
        if tokens > self._room:
            problem = f"is more than the {self._room} tokens for which the longest class text leaves room."
            raise SettingError("text_prompt.tokens", tokens, problem, f"Write {self._room} or less.")
        words = self._words
        if tokens and not len(words):
            problem = "has no words before the name, with which the prompt could start."
            raise SettingError("template", self.template, problem, "Add some, or write init: zeros.")
        return words.repeat(-(-tokens // len(words)), 1)[-tokens:] if tokens else words[:0]

    def _answers(self, kind: str, count: int, asked: Mapping[str, Tensor]) -> Tensor:
        images = hex_names(asked["names"]) if "names" in asked else []
        by_row = {name for name, x in asked.items() if len(x) == count}
        sent = {name: asked[name] for name in ("text", "image") if name in asked}

        def payload(rows: slice) -> dict[str, Any]:
            made: dict[str, Any] = {"kind": kind}
            if kind not in TEXTLESS:
                made["classes"] = self._classes
            if images:
                made["images"] = images[rows]
            if "labels" in asked:
                made["labels"] = asked["labels"][rows].tolist()
            return made | {name: packed(x[rows] if name in by_row else x) for name, x in sent.items()}

        def cost(rows: int) -> dict[str, int]:
            texts = 0 if kind in TEXTLESS else rows if "text" in by_row else 1
            return {"rows": rows, "text_passes": texts}

        of_row = sum(BASE64 * 4 * x[0].numel() for name, x in sent.items() if name in by_row)
        fitting = int(self.info.max_bytes / max(1.0, of_row + 100.0))
        if not fitting:
            problem = f"takes {self.info.max_bytes} bytes a request, and one row of these prompts has {of_row:.0f}."
            raise SettingError("service", self.client.settings.url, problem, "Write fewer tokens.")
        self._hand_over(images, classes=kind not in TEXTLESS)
        largest, shape = min(self.largest, fitting), self.shape_of(kind)
        return self.client.rows(payload, count, shape, largest=largest, cost=cost, supply=self._supply)

    def _hand_over(self, images: Sequence[str], *, classes: bool) -> bool:
        """Send what the server does not have; whether all of it has arrived."""
        if classes and self._classes not in self._known and not self._hand_over_classes(must=False):
            return False
        new = [name for name in dict.fromkeys(images) if name not in self._known]
        if gone := self.images.missing(new):
            problem = (
                f"does not hold the {len(gone) + len(self.images)} images of a step, which the server wants again."
            )
            raise SettingError("service.images_mb", self.client.settings.images_mb, problem, "Write more.")
        if not new:
            return True
        each = BASE64 * self.images.get(new[:1]).nbytes
        most = max(1, int(min(MOST_UPLOAD, self.info.max_bytes) / each))
        parts = [new[i : i + most] for i in range(0, len(new), most)]

        def upload(part: list[str]) -> dict[str, Any]:
            return {"kind": "images", "images": part, "pixels": packed(self.images.get(part))}

        requests = [Request(partial(upload, part)) for part in parts]
        for part, answer in zip(parts, self.client.ask(requests), strict=True):
            if answer is not None:
                self._known.update(part)
        return self._known.issuperset(new)

    def _hand_over_classes(self, *, must: bool = True) -> bool:
        if self._classes in self._known and self._words is not None:
            return True
        request = {"kind": "classes", "classes": self._classes, "names": list(self.names), "template": self.template}
        (answer,) = self.client.ask([Request(lambda: request)])
        if answer is None and must:
            problem, remedy = "gave no answer to the class names.", "Start the server, or correct the address."
            raise SettingError("service.url", self.client.settings.url, problem, remedy)
        if answer is None:
            return False
        try:
            self._words, self._room = unpacked(answer["words"]), int(answer["room"])
        except (KeyError, TypeError, ValueError) as error:
            problem, remedy = f"gave no words for the classes: {error}.", "Compare it with docs/service.md."
            raise SettingError("service.url", self.client.settings.url, problem, remedy) from error
        self._known.add(self._classes)
        return True

    def _supply(self, missing: Sequence[Any]) -> bool:
        """Hand over again what the server has lost."""
        lost = [name for each in missing for name in each]
        self._known.difference_update(lost)
        return self._hand_over([name for name in lost if name != self._classes], classes=self._classes in lost)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the images, which the next batch brings."""
        store = ImageStore(self.images.most_bytes)
        return {**self.__dict__, "images": store, "_known": set(), "client": self.client}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Count in one place again."""
        self.__dict__.update(state)
        self.usage = self.client.usage
