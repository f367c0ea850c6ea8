"""What a language model answers to an adapter's vectors: the caption that it writes, and the likeliest of several."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.language import CaptionLoss, CaptionScorer
from flops_lightning.queries import row_losses
from flops_lightning.suffix_loss import PaddedTargets

MOST_TOKENS = 64
"""Of a caption where the data does not tell how long they are."""


@torch.no_grad()
def greedy_captions(
    loss: CaptionScorer, tokenizer: Any, vectors: Tensor, questions: Tensor | None, given: NDArray[np.int64] | None,
    longest: int,
) -> list[str]:  # fmt: skip
    """The likeliest token each time, until the model's token of the end or ``longest`` tokens (0: 64).

    Args:
        loss: Has the language model.
        tokenizer: Turns tokens into text.
        vectors: ``(b, k d)`` or ``(b, k, d)``.
        questions: ``(b, t)`` tokens that begin with a question; None: no question.
        given: ``(b,)`` lengths of the questions.
        longest: Most tokens of a caption.

    Raises:
        SettingError: the language model runs elsewhere, or there is no tokenizer.
    """
    if not isinstance(loss, CaptionLoss) or tokenizer is None:
        problem = "can only score captions, not write them."
        raise SettingError("llm", type(loss).__name__, problem, "Give the name of a language model.")
    table = loss.llm.get_input_embeddings()
    lengths = np.zeros(len(vectors), dtype=np.int64) if given is None else given
    texts = [""] * len(vectors)
    for length in np.unique(lengths):
        rows = torch.from_numpy(np.flatnonzero(lengths == length)).to(vectors.device)
        parts = [vectors[rows].reshape(len(rows), loss.visual_tokens, loss.width).to(table.weight.dtype)]
        if loss.bos is not None:
            parts.insert(0, table(rows.new_full((1, 1), loss.bos)).expand(len(rows), -1, -1))
        if questions is not None:
            parts.append(table(questions[rows][:, : int(length)]))
        inputs, end = torch.cat(parts, 1), tokenizer.eos_token_id
        settings = {"max_new_tokens": longest or MOST_TOKENS, "eos_token_id": end, "do_sample": False}
        with _greedy(loss.llm):
            ids = loss.llm.generate(
                inputs_embeds=inputs, attention_mask=inputs.new_ones(inputs.shape[:2], dtype=torch.long),
                pad_token_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id, **settings,
            )  # fmt: skip
        for row, text in zip(rows.tolist(), tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            texts[row] = text.strip()
    return texts


@contextmanager
def _greedy(llm: Any) -> Iterator[None]:
    """Leave out what a model brings for its generations: a penalty on repetitions, say, would choose other tokens."""
    own = llm.generation_config
    llm.generation_config = type(own)()
    try:
        yield
    finally:
        llm.generation_config = own


@torch.no_grad()
def likeliest(
    loss: CaptionScorer, vectors: Tensor, captions: PaddedTargets, classes: Sequence[Sequence[int]]
) -> Tensor:
    """``(b,)`` 1.0 where, of the captions of all ``classes``, a sample's own has the largest likelihood, else 0.0.

    NaN where a service gave no answer to one of them.
    """
    totals = []
    for ids in classes:
        caption = PaddedTargets.of([torch.tensor(ids, device=vectors.device)])
        repeated = caption.take(torch.zeros(len(vectors), dtype=torch.long, device=vectors.device))
        totals.append(row_losses(loss, vectors, repeated) * (len(ids) + (loss.eos is not None)))
    table = torch.stack(totals, 1)
    chosen = table.argmin(1).tolist()
    own = [tuple(row[:length]) for row, length in zip(captions.values.tolist(), captions.lengths, strict=True)]
    right = [tuple(classes[c]) == mine for c, mine in zip(chosen, own, strict=True)]
    return torch.where(table.isnan().any(1), torch.nan, torch.tensor(right, dtype=torch.float32, device=vectors.device))
