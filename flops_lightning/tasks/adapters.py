"""Adapters from the features of images to the embeddings of a language model."""

from collections import OrderedDict
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError, check_choice, check_whole

AdapterKind = Literal["linear", "mlp2x_gelu"]
Start = Literal["embedding", "default"]


def make_adapter(
    kind: AdapterKind, features: int, width: int, *, visual_tokens: int = 1, patches: bool = False
) -> nn.Sequential:
    """A network of one stage, ``adapter``: ``(b, f)`` features to ``(b, k d)`` numbers, ``k`` vectors of width ``d``.

    Args:
        kind: ``linear``, one layer, as in the paper; ``mlp2x_gelu``, two with a GELU between, as in LLaVA-1.5.
        features: Width ``f`` of a feature.
        width: Width ``d`` of the language model's embeddings.
        visual_tokens: Number ``k`` of vectors.
        patches: Features are ``(b, k, f)``, and each becomes one vector.

    Raises:
        SettingError: a number below 1, or another kind.

    Example:
        >>> make_adapter("linear", 192, 64, visual_tokens=4)(torch.zeros(3, 192)).shape
        torch.Size([3, 256])
    """
    check_choice("adapter", kind, get_args(AdapterKind))
    for name, size in (("visual_tokens", visual_tokens), ("feature_width", features)):
        check_whole(name, size, 1, "Write 1 or more.")
    out = width if patches else visual_tokens * width
    layers: list[nn.Module] = [nn.Linear(features, out)]
    if kind == "mlp2x_gelu":
        layers = [nn.Linear(features, width), nn.GELU(), nn.Linear(width, out)]
    return nn.Sequential(OrderedDict(adapter=nn.Sequential(*layers)))


@torch.no_grad()
def start_adapter(adapter: nn.Sequential, start: Start, embedding: Tensor | None) -> None:
    """Let an adapter begin at the mean embedding of the language model, whatever the image; ``default``: as torch does.

    Args:
        adapter: What :func:`make_adapter` made.
        start: ``embedding``: the last layer's weights are 0 and its bias is the mean, for each vector.
        embedding: ``(d,)`` the mean.

    Raises:
        SettingError: there is no mean.
    """
    check_choice("init", start, get_args(Start))
    if start == "default":
        return
    if embedding is None:
        problem = "needs the embeddings of the language model, which runs elsewhere."
        raise SettingError("init", start, problem, "Write init: default.")
    last: Any = cast("nn.Sequential", adapter.get_submodule("adapter"))[-1]
    last.weight.zero_()
    last.bias.copy_(embedding.to(last.bias).repeat(len(last.bias) // len(embedding)))
