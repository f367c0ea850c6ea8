"""The slow reference again, on networks, sites and counts that nobody thought of."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.strategies import LikelihoodRatio
from tests.reference.likelihood_ratio import assert_equals_reference
from tests.reference.networks import TokenMean, bound, shaken, squared_error


class Mix(nn.Module):
    """Mixes two tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x.mT).mT


class Brittle(nn.Module):
    """NaN above a limit."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > 1.5, math.nan, x)


LAYERS = {
    "linear": lambda: nn.Linear(3, 3),
    "no bias": lambda: nn.Linear(3, 3, bias=False),
    "norm": lambda: nn.LayerNorm(3),
    "tanh": nn.Tanh,
    "in place": lambda: nn.SiLU(inplace=True),
    "nested": lambda: nn.Sequential(nn.Linear(3, 4), nn.SiLU(inplace=True), nn.Linear(4, 3)),
    "mix": Mix,
    "dropout": lambda: nn.Dropout(0.5),
    "brittle": Brittle,
}
KINDS: dict[str, dict[str, Any]] = {
    "group": {"kind": "group"},
    "block": {"kind": "block"},
    "linear": {"kind": "linear"},
    "together": {"kind": "linear", "together": True},
}


@st.composite
def strategies(draw: st.DrawFn) -> LikelihoodRatio:
    """A network of one to five layers and a head, in one to three ranges of stages, some parameters frozen."""
    layers = draw(st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=5))
    torch.manual_seed(draw(st.integers(0, 99)))
    net = shaken(nn.Sequential(*(LAYERS[layer]() for layer in layers), TokenMean(), nn.Linear(3, 2)))
    for parameter in list(net.parameters())[:-1]:
        parameter.requires_grad_(draw(st.integers(0, 4)) > 0)
    cuts = sorted({0, len(net), *draw(st.lists(st.integers(1, len(net) - 1), min_size=1, max_size=2))})
    sites = [
        {
            "stages": [str(a), str(b - 1)],
            "sigma": draw(st.sampled_from([0.01, 0.3])),
            "name": f"from {a}",
            **KINDS[kind],
        }
        for a, b in itertools.pairwise(cuts)
        if any(p.requires_grad for p in net[a:b].parameters())
        for kind in [draw(st.sampled_from(sorted(KINDS)))]
    ]
    variant = draw(st.sampled_from(["plain", "baseline", "leave_one_out", "antithetic"]))
    try:
        strategy = bound(
            net.train(draw(st.booleans())), squared_error, sites, variant=variant, chunk_rows=draw(st.integers(2, 9))
        )
    except SettingError:  # leave-one-out of layers together, or layers that have no linear site
        reject()
    strategy.draw, strategy.rank = draw(st.integers(0, 2)), draw(st.integers(0, 1))
    return strategy


@pytest.mark.filterwarnings("ignore:.*contribute nothing")
@settings(max_examples=150)
@given(strategy=strategies(), data=st.data())
def test_equals_the_reference(strategy, data):
    batch = data.draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(batch, 2, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(batch, 2, generator=generator, dtype=torch.float64)
    count = st.sampled_from(
        {"antithetic": [0, 2, 4, 6], "leave_one_out": [0, 2, 3]}.get(strategy.variant, [0, 1, 2, 3])
    )
    table = [[data.draw(count) for _ in range(batch)] for _ in strategy.sites]
    assert_equals_reference(strategy.network.module, strategy, x, y, torch.tensor(table))
