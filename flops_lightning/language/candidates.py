"""Losses of a text's candidate completions, from a language model's logits.

Targets of a batch name the tokens of each candidate and the places of the logits that predict them::

    tokens (b, c, m)      ids; -100 after a candidate's end
    positions (b, c, m)   places in the sequence; 0 after a candidate's end
    label (b,)            the right candidate

A text with one completion has one candidate, ``c = 1``.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""Stands for no token, as in transformers."""

Targets = Mapping[str, Tensor]


def token_log_probabilities(logits: Tensor, targets: Targets) -> Tensor:
    """``(r, c, m)`` log-probabilities of the candidates' tokens in float32 at least, 0 after a candidate's end.

    ``logits`` are ``(r, t, v)``. The language model's head has seen a token's whole past, so the logits at a place
    predict the next token.
    """
    positions, tokens = targets["positions"], targets["tokens"]
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    picked = logits[rows, positions.flatten(1)].flatten(0, 1)  # before the softmax: a text may be long, a choice short
    picked = picked.to(torch.promote_types(picked.dtype, torch.float32))
    return -F.cross_entropy(picked, tokens.flatten(), ignore_index=IGNORED, reduction="none").reshape(tokens.shape)


def candidate_log_likelihoods(logits: Tensor, targets: Targets) -> Tensor:
    """``(r, c)`` log-likelihoods of whole candidates: sums over their tokens, in nats."""
    return token_log_probabilities(logits, targets).sum(2)


def completion(logits: Tensor, targets: Targets) -> Tensor:
    """``(r,)`` mean negative log-probability of the right candidate's own tokens, in nats a token.

    Each text counts alike, whatever its length. The loss that transformers returns for a batch is the mean over all
    tokens of the batch, in which long texts count for more.

    Example:
        >>> targets = targets_of_labels(torch.tensor([[3, 1, 2], [3, 1, -100]]))
        >>> completion(torch.zeros(2, 3, 4), targets).exp()  # all of four tokens are as likely
        tensor([4., 4.])
    """
    own = targets["label"][:, None, None].expand(-1, 1, targets["tokens"].shape[2])
    right = {name: targets[name].gather(1, own) for name in ("tokens", "positions")}
    lengths = (right["tokens"] != IGNORED).sum(2)
    return (-candidate_log_likelihoods(logits, right) / lengths)[:, 0]


def choice(logits: Tensor, targets: Targets) -> Tensor:
    """``(r,)`` cross-entropy over the candidates' log-likelihoods: how far the right one is ahead of the others."""
    return F.cross_entropy(candidate_log_likelihoods(logits, targets), targets["label"], reduction="none")


def targets_of_labels(labels: Tensor) -> dict[str, Tensor]:
    """Targets from ``(b, t)`` labels as transformers has them: the ids, or -100 where nothing is to be learned."""
    shifted = labels[:, 1:]
    places = torch.arange(shifted.shape[1], device=labels.device).expand_as(shifted)
    here = shifted != IGNORED
    return {
        "tokens": shifted[:, None], "positions": torch.where(here, places, 0)[:, None],
        "label": torch.zeros(len(labels), dtype=torch.long, device=labels.device),
    }  # fmt: skip


def live_tokens(targets: Targets, tokens: int) -> Tensor:
    """``(b, tokens)`` whether a token of a sequence can reach the losses: none after the last prediction can."""
    last = targets["positions"].flatten(1).amax(1)
    return torch.arange(tokens, device=last.device) <= last[:, None]


def predicting_tokens(targets: Targets, tokens: int) -> Tensor:
    """``(b, tokens)`` whether the logits at a token predict one of a candidate."""
    places = torch.where(targets["tokens"] != IGNORED, targets["positions"], tokens).flatten(1)
    found = torch.zeros(len(places), tokens + 1, dtype=torch.bool, device=places.device)
    return found.scatter_(1, places, True)[:, :tokens]
