"""Captions scored by a language model elsewhere: what a server answers, and the loss that asks it.

``GET /info`` tells ``{"model": ...}`` with the fields of :class:`CaptionInfo`. ``POST /score`` takes::

    {"kind": "captions", "rows": [0, 1], "ids": [[5, 6, 7], [8]], "vectors": {"shape": [2, k, d], "data": ...}}

with ``vectors`` in base64 of little-endian float32, left out for captions alone, and ``given``, the number of each
one's first ids that are not scored, left out where all are. The answer has ``rows``, the same, and ``values``, ``(r,)``
losses packed in the same way.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.language.caption_scorer import CaptionScorer
from flops_lightning.noise.keys import NoiseKey
from flops_lightning.service.answering import BadRequest
from flops_lightning.service.client import ServiceClient
from flops_lightning.service.payload import BASE64, changed, packed, unpacked
from flops_lightning.service.settings import ServiceSettings
from flops_lightning.service.usage import Usage
from flops_lightning.suffix_loss import PaddedTargets

BYTES_OF_ID, BYTES_OF_ROW = 8, 100


@dataclass(frozen=True)
class CaptionInfo:
    """What a server tells of its model (``/info``).

    Attributes:
        model: Its name, by which checkpoints tell services apart.
        width: See :class:`CaptionScorer`, as are ``context``, ``visual_tokens``, ``bos`` and ``eos``.
        polynomial: See :meth:`CaptionScorer.polynomial`; empty where it is not known.
        max_rows: Most rows of a request.
        max_bytes: Most bytes of a request.
    """

    model: str = ""
    width: int = 0
    context: int = 0
    visual_tokens: int = 1
    bos: int | None = None
    eos: int | None = None
    polynomial: tuple[float, ...] = ()
    max_rows: int = 256
    max_bytes: int = 2**25

    def as_dict(self) -> dict[str, Any]:
        """Plain values, which :meth:`read` takes."""
        return {**asdict(self), "polynomial": list(self.polynomial)}

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> "CaptionInfo":
        """From what ``/info`` answers, of which further entries are left alone.

        Raises:
            ValueError: no width of the model's embeddings, or no room for a row.
        """
        info = cls(**{each.name: told[each.name] for each in fields(cls) if each.name in told})
        if min(info.width, info.visual_tokens, info.max_rows, info.max_bytes) < 1:
            raise ValueError("it names no `width`, or takes no rows")
        return info


class CaptionAnswers:
    """Answers the requests of :class:`RemoteCaptionLoss` with a model in this process.

    Attributes:
        info: What ``/info`` tells.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from flops_lightning.language import CaptionLoss
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> answers = CaptionAnswers(CaptionLoss(LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))))
        >>> request = {"kind": "captions", "rows": [0], "ids": [[5, 6]], "vectors": packed(torch.zeros(1, 1, 16))}
        >>> unpacked(answers(request)["values"]).shape
        torch.Size([1])
    """

    def __init__(self, scorer: CaptionScorer, *, model: str = "", max_rows: int = 256, max_bytes: int = 2**25) -> None:
        """Keep the scorer, whose settings (``visual_tokens``, ``bos``, ``eos``) are those of all who ask."""
        self.scorer = scorer
        self.info = CaptionInfo(
            model, scorer.width, scorer.context, scorer.visual_tokens, scorer.bos, scorer.eos, scorer.polynomial(),
            max_rows, max_bytes,
        )  # fmt: skip

    @torch.no_grad()
    def __call__(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request.

        Raises:
            BadRequest: it cannot be answered; its ``status`` is that of HTTP.
        """
        if request.get("kind") != "captions":
            raise BadRequest(f"kind = {request.get('kind')!r} is not captions", 400)
        try:
            rows, ids = list(request["rows"]), [self._tokens(each) for each in request["ids"]]
            vectors = unpacked(request["vectors"]).to(self._device) if "vectors" in request else None
            given = np.array([_whole(each) for each in request["given"]]) if "given" in request else None
        except (KeyError, TypeError, ValueError) as error:
            raise BadRequest(f"{type(error).__name__}: {error}") from error
        if not 0 < len(rows) <= self.info.max_rows:
            raise BadRequest(f"{len(rows)} rows in a request, and 1 to {self.info.max_rows} are taken", 413)
        shape = (len(rows), self.info.visual_tokens, self.info.width)
        if len(ids) != len(rows) or (given is not None and given.shape != (len(rows),)):
            raise BadRequest(f"{len(ids)} captions or their given ids do not fit {len(rows)} rows")
        if vectors is not None and tuple(vectors.shape) != shape:
            raise BadRequest(f"vectors have the shape {tuple(vectors.shape)}, not {shape}")
        try:
            losses = self.scorer.score(vectors, PaddedTargets.of(ids, given=given).to(self._device))
        except SettingError as error:
            raise BadRequest(str(error)) from error
        return {"rows": rows, "values": packed(losses)}

    @property
    def _device(self) -> torch.device:
        llm = getattr(self.scorer, "llm", None)
        return torch.device("cpu") if llm is None else llm.get_input_embeddings().weight.device

    def _tokens(self, ids: Any) -> Tensor:
        """Ids are checked before they reach a GPU, whose process a wrong one would end."""
        vocabulary, numbers = getattr(self.scorer, "vocabulary", 0), [_whole(each) for each in ids]
        if vocabulary and max(numbers, default=0) >= vocabulary:
            raise ValueError(f"{max(numbers)} is no id of the language model, whose embedding has {vocabulary}")
        return torch.tensor(numbers, dtype=torch.long)


def _whole(number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"{number!r} is no whole number, 0 or more")
    return number


class RemoteCaptionLoss(CaptionScorer):
    """Asks a server for the losses of captions; it takes the place of a :class:`CaptionLoss`.

    Failed requests are repeated; rows that were lost in the end are NaN, and strategies count them as lost queries.
    Copies of a row within a chunk are asked for once. It cannot be differentiated.

    Attributes:
        client: Connections and retries.
        info: What the server tells.
        largest: Most rows of a request.
        max_queries: Rows after which nothing more is asked; 0: no limit.

    Example:
        >>> RemoteCaptionLoss("localhost:8000")
        Traceback (most recent call last):
        flops_lightning.errors.SettingError: service.url = 'localhost:8000': is not the address of a web service. ...
    """

    differentiable = False
    remote = True
    max_queries = 0

    def __init__(self, url: str, **settings: Any) -> None:
        """Ask the server what it is; ``settings`` are those of :class:`ServiceSettings`.

        Raises:
            SettingError: settings that cannot work; a server that does not answer, or scores no captions.
        """
        self.client = ServiceClient(ServiceSettings(url=url, **settings))
        info = self.client.read_info(CaptionInfo.read, "captions", "Start a server with CaptionAnswers.")
        self.info, self.largest = info, self.client.settings.rows_of_a_request(info.max_rows)
        super().__init__(info.width, context=info.context, visual_tokens=info.visual_tokens, bos=info.bos, eos=info.eos)

    @property
    def usage(self) -> Usage:
        """What was asked so far."""
        return self.client.usage

    def score(self, embeddings: Tensor | None, ids: PaddedTargets) -> Tensor:
        """See :meth:`CaptionScorer.score`; NaN in the rows that were lost."""
        self.check_captions(embeddings, self.closed(ids))
        tokens = torch.where(ids.mask(), ids.trimmed(), -1).cpu()
        vectors = None if embeddings is None else embeddings.detach().float().cpu()
        starts = torch.zeros(len(ids)) if ids.given is None else torch.from_numpy(ids.given)
        keep = changed(tokens, starts) if vectors is None else changed(tokens, starts, vectors)
        place = keep.long().cumsum(0) - 1
        asked, lengths = tokens[keep].tolist(), ids.lengths[keep.numpy()]
        given = None if ids.given is None else ids.given[keep.numpy()].tolist()
        captions = [line[:n] for line, n in zip(asked, lengths, strict=True)]
        sent = None if vectors is None else vectors[keep]

        def payload(rows: slice) -> dict[str, Any]:
            made: dict[str, Any] = {"kind": "captions", "ids": captions[rows]}
            if given is not None:
                made["given"] = given[rows]
            return made if sent is None else made | {"vectors": packed(sent[rows])}

        numbers = 0 if sent is None else sent[:1].numel()
        of_row = BASE64 * 4 * numbers + BYTES_OF_ID * int(lengths.max(initial=1)) + BYTES_OF_ROW
        largest = min(self.largest, int(self.info.max_bytes / of_row))
        if not largest:
            problem = f"takes {self.info.max_bytes} bytes a request, and one row has {of_row:.0f}."
            raise SettingError("service", self.client.settings.url, problem, "Write fewer visual_tokens.")
        self.usage.check_room(len(captions), self.max_queries)
        losses = self.client.rows(payload, len(captions), (), largest=largest)
        return losses[place].to(ids.values.device)

    def polynomial(self) -> tuple[float, ...]:
        """See :meth:`CaptionScorer.polynomial`; as the server tells."""
        return tuple(self.info.polynomial) or (0.0,)

    def rows_of(self, key: NoiseKey) -> AbstractContextManager[None]:
        """See :meth:`SuffixLoss.rows_of`."""
        return self.client.rows_of(key)
