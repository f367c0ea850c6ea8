"""Above which stage the tokens of a sequence go their own ways."""

from typing import Any

import torch
from torch import Tensor

from flops_lightning.network.rows import as_rows, value_of, with_value
from flops_lightning.network.staging import StagedNetwork


@torch.no_grad()
def tokenwise_from(network: StagedNetwork, inputs: Any) -> int:
    """First stage from which on no token reads another; ``len(network)`` if the last stage mixes them.

    Found by trying: where the first token of the activations ``(b, t, d)`` that enter a stage becomes another one, the
    outputs ``(b, t, ...)`` of the others stay the same, bit for bit. ``inputs`` are those of a few short samples.

    Example:
        >>> from torch import nn
        >>> from flops_lightning import stage_network
        >>> class Mixing(nn.Module):
        ...     def forward(self, x):
        ...         return x.cumsum(1)
        >>> network = stage_network(nn.Sequential(nn.Linear(4, 4), Mixing(), nn.LayerNorm(4), nn.Linear(4, 9)))
        >>> tokenwise_from(network, torch.randn(2, 3, 4))  # the stages 0 and 1 come before
        2
    """
    entering: dict[int, Any] = {}
    with network.evaluating():
        network.visit(as_rows(inputs), 0, range(1, len(network)), lambda i, h: entering.update({i: h.clone()}))
        first = len(network)
        while first > 1 and _tokenwise(network, entering[first - 1], first - 1):
            first -= 1
    return first


def _tokenwise(network: StagedNetwork, h: Any, stage: int) -> bool:
    value: Tensor = value_of(h)
    if value.dim() != 3 or value.shape[1] < 2:
        return False
    other = value.clone()
    other[:, 0] = value[:, 0].flip(-1)  # not moved by a constant, which a layer norm would not see
    before, after = (network.run(with_value(h, v), stage) for v in (value, other))
    return before.dim() == 3 and torch.equal(before[:, 1:], after[:, 1:])
