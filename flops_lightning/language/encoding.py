"""Texts as token ids, and batches of them: a prompt once, with all its candidate completions behind it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from flops_lightning.errors import SettingError
from flops_lightning.language.candidates import IGNORED


@dataclass(frozen=True)
class EncodedText:
    """A prompt and its candidate completions as token ids.

    Attributes:
        prompt: Ids that come first; one at least.
        candidates: Ids of each completion; one at least.
        label: The right one.

    Example:
        >>> EncodedText(prompt=[1, 5, 6], candidates=[[7, 8], [9]]).tokens
        5
    """

    prompt: list[int]
    candidates: list[list[int]]
    label: int = 0

    @property
    def tokens(self) -> int:
        """Length of the prompt with its longest candidate."""
        return len(self.prompt) + max(map(len, self.candidates))

    def truncated(self, most: int) -> "EncodedText":
        """At most ``most`` tokens: the prompt loses its oldest but the first, a completion alone its last.

        Raises:
            SettingError: candidates to choose from are longer than that.
        """
        first, longest = self.prompt[:1], max(map(len, self.candidates))
        room = most - longest - 1
        if room < 0 and len(self.candidates) > 1:
            problem = f"leaves no room for a candidate of {longest} tokens."
            raise SettingError("data.max_tokens", most, problem, f"Write {longest + 1} or more.")
        kept = self.prompt[max(1, len(self.prompt) - room) :] if room > 0 else []
        return replace(self, prompt=first + kept, candidates=[ids[: most - 1] for ids in self.candidates])


def encode(
    tokenizer: Any, prompt: str, candidates: Sequence[str], label: int = 0, *, special: bool = True
) -> EncodedText:
    """Tokenise a prompt with each of its completions as one text.

    Completions begin where the tokens of all these texts and of the prompt part: a token that reaches over the end of
    the prompt belongs to them. ``special``: add the tokenizer's own special tokens, such as one for the beginning;
    False where a chat template has put them in.

    Raises:
        ValueError: nothing is before a completion that could predict its first token, or a completion is empty. The
            message begins with "has", for callers that know which text it is.
    """
    alone = list(tokenizer(prompt, add_special_tokens=special)["input_ids"])
    whole = [list(tokenizer(prompt + text, add_special_tokens=special)["input_ids"]) for text in candidates]
    start = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(alone, *whole, strict=False)))
    if not start:
        raise ValueError("has nothing before the completion, and the tokenizer no token for the beginning")
    if min(map(len, whole)) <= start:
        raise ValueError("has a completion without tokens")
    return EncodedText(alone[:start], [ids[start:] for ids in whole], label)


def pack(texts: Sequence[EncodedText], *, branching: bool) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs and targets of a batch, padded at the right to its longest text.

    A prompt runs once: its candidates lie one after the other behind it. No candidate reads another, which takes
    a mask ``attention_mask`` ``(b, 1, t, t)`` and ``position_ids`` ``(b, t)``. A batch without ``branching``, whose
    texts have one candidate each or candidates of one token, needs neither: no token reads what comes later.

    Returns:
        ``{"input_ids": (b, t), ...}`` and the targets of :mod:`flops_lightning.language.candidates`.
    """
    rows, places, owners, tokens, positions = (list[Tensor]() for _ in range(5))
    for text in texts:
        ids, own, branch = list(text.prompt), list(range(len(text.prompt))), [0] * len(text.prompt)
        lines = []
        for number, candidate in enumerate(text.candidates, 1):
            lines.append([len(text.prompt) - 1, *range(len(ids), len(ids) + len(candidate) - 1)])
            ids += candidate[:-1]  # the last is predicted and predicts nothing
            own += range(len(text.prompt), len(text.prompt) + len(candidate) - 1)
            branch += [number] * (len(candidate) - 1)
        for parts, new in ((rows, ids), (places, own), (owners, branch)):
            parts.append(torch.tensor(new))
        tokens.append(_table(text.candidates, IGNORED))
        positions.append(_table(lines, 0))
    inputs = {"input_ids": pad_sequence(rows, batch_first=True)}
    if branching:
        inputs["attention_mask"] = _branch_mask(pad_sequence(owners, batch_first=True))
        inputs["position_ids"] = pad_sequence(places, batch_first=True)
    label = torch.tensor([text.label for text in texts])
    return inputs, {"tokens": _stacked(tokens, IGNORED), "positions": _stacked(positions, 0), "label": label}


def branches(texts: Sequence[EncodedText]) -> bool:
    """Whether some text has several candidates, one of them of two tokens or more."""
    return any(len(text.candidates) > 1 and max(map(len, text.candidates)) > 1 for text in texts)


def _branch_mask(owners: Tensor) -> Tensor:
    """``(b, 1, t, t)`` what is added to attention's scores: 0 where a token may be read, else minus infinity."""
    places = torch.arange(owners.shape[1])
    earlier = places[:, None] >= places
    same = (owners[:, None] == 0) | (owners[:, None] == owners[:, :, None])
    return torch.where(earlier & same, 0.0, -torch.inf)[:, None]


def _table(lines: Sequence[Sequence[int]], fill: int) -> Tensor:
    return pad_sequence([torch.tensor(line) for line in lines], batch_first=True, padding_value=fill)


def _stacked(tables: Sequence[Tensor], fill: int) -> Tensor:
    width = max(table.shape[1] for table in tables)
    return torch.stack([F.pad(table, (0, width - table.shape[1]), value=fill) for table in tables])
