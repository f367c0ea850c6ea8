"""Sites of every kind on the networks of the tests, and uneven counts for every variant."""

from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn

from flops_lightning.noise.kinds import NoiseSpec
from tests.reference.networks import TokenMean, freeze, shaken, tiny_vit

SIGMA = {"sigma": 0.1}
VIT_SITES: dict[str, list[dict[str, Any]]] = {
    "group": [
        {"stages": ["embed", "blocks.0"], **SIGMA},
        {"stages": ["blocks.1", "blocks.2"], **SIGMA},
        {"stages": ["pool", "head"], **SIGMA},
    ],
    "block": [{"stages": ["embed", "head"], "kind": "block", **SIGMA}],
    "linear": [{"stages": ["embed", "head"], "kind": "linear", **SIGMA}],
    "together": [
        {"stages": ["embed", "blocks.1"], "kind": "linear", "together": True, **SIGMA},
        {"stages": ["blocks.2", "head"], "kind": "linear", "together": True, **SIGMA},
    ],
}
TOKEN_SITES: dict[str, list[dict[str, Any]]] = {
    "group": [{"stages": ["0", "1"], "sigma": 0.5}, {"stages": ["2", "4"], "sigma": 0.5}],
    "block": [{"stages": ["0", "4"], "kind": "block", "sigma": 0.5}],
    "linear": [{"stages": ["0", "4"], "kind": "linear", "sigma": 0.5}],
    "together": [{"stages": ["0", "4"], "kind": "linear", "together": True, "sigma": 0.5}],
}
COUNTS = {"plain": [3, 0, 5, 2], "baseline": [3, 0, 5, 2], "leave_one_out": [3, 0, 5, 2], "antithetic": [4, 0, 6, 2]}

CONVOLUTIONS = {
    **{name: st.tuples(st.integers(1, 3), st.integers(1, 3)) for name in ("kernel", "stride")},
    "padding": st.tuples(st.integers(0, 2), st.integers(0, 2)),
    "dilation": st.tuples(st.integers(1, 2), st.integers(1, 2)),
    "size": st.tuples(st.integers(5, 7), st.integers(5, 7)),
}
"""For hypothesis: settings of convolutions, and the sides of images that they fit on."""
NOISES = {
    "gaussian": NoiseSpec(),
    "rademacher": NoiseSpec(distribution="rademacher"),
    "factored": NoiseSpec(layout="factored"),
    "factored_rademacher": NoiseSpec(distribution="rademacher", layout="factored"),
    "orthogonal": NoiseSpec(orthogonal=True),
}


def vit_for(layout: str, **kwargs: Any) -> nn.Module:
    """A tiny ViT without the parameters that ``linear`` sites cannot train."""
    vit = tiny_vit(**kwargs)
    if layout in ("linear", "together"):
        freeze(vit, "cls_token", "pos_embed", "reg_token")
    return vit


def convolutional() -> nn.Sequential:
    """Strided, dilated and grouped convolutions, a layer norm over two dimensions and a head; for 8x8 images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1),
            nn.GroupNorm(2, 4, affine=False),
            nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, bias=False),
            nn.Flatten(2),
            nn.LayerNorm((6, 16)),
            TokenMean(),
            nn.Linear(16, 5, bias=False),
        )
    return shaken(net)
