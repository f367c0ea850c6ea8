"""Unbiased: every variant and kind of site against autograd's gradient of the smoothed loss.

``reference/smoothed.py`` holds the check. It needs a standard error of at most 2 %, so a bias of 8 % cannot pass.
"""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from flops_lightning.strategies import LikelihoodRatio
from tests.reference.layouts import NOISES
from tests.reference.networks import bound, cross_entropy, freeze, tiny_vit
from tests.reference.smoothed import (
    Sampled,
    assert_unbiased,
    estimates,
    exact_gradients,
    shifted_squared_error,
    token_problem,
    true_gradients,
)

LAYOUTS: dict[str, list[dict[str, Any]]] = {
    "group": [{"stages": ["0", "1"]}, {"stages": ["2", "3"]}, {"stages": ["4"]}],
    "block": [{"stages": ["0", "4"], "kind": "block"}],
    "linear": [{"stages": ["0", "4"], "kind": "linear"}],
    "together": [{"stages": ["0", "4"], "kind": "linear", "together": True}],
}
CASES = [
    (variant, layout)
    for variant in ("plain", "baseline", "leave_one_out", "antithetic")
    for layout in LAYOUTS
    if (variant, layout) != ("leave_one_out", "together")
]
# Uneven, and in step with the samples' shares of the gradient, so that weighting samples by their counts shows.
COUNTS = torch.tensor([300, 640, 300, 60])


def token_strategy(layout: str, *, sigma: float, **settings: Any) -> tuple[LikelihoodRatio, Tensor, Tensor]:
    net, x, y = token_problem()
    sites = [{**site, "sigma": sigma} for site in LAYOUTS[layout]]
    return bound(net, shifted_squared_error, sites, chunk_rows=1000, **settings), x, y


@cache
def token_truth(layout: str, *, sigma: float) -> dict[str, Sampled]:
    """Gradients of the smoothed loss, site by site; the same for all variants."""
    return true_gradients(*token_strategy(layout, sigma=sigma))


def check(layout: str, variant: str, *, sigma: float = 0.5, draws: int = 20) -> None:
    """The estimates of every site against the gradient of the loss smoothed at that site."""
    strategy, x, y = token_strategy(layout, sigma=sigma, variant=variant)
    for site, estimate in estimates(strategy, x, y, COUNTS, draws=draws).items():
        assert_unbiased(estimate, token_truth(layout, sigma=sigma)[site])


def check_against_autograd(strategy: LikelihoodRatio, x: Tensor, y: Tensor, *, counts: Tensor, draws: int) -> None:
    """The same where sigma is so small that the smoothed loss is the loss."""
    found = estimates(strategy, x, y, counts, draws=draws).values()
    for estimate, exact in zip(found, exact_gradients(strategy, x, y), strict=True):
        assert_unbiased(estimate, exact)


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_wide_noise(variant, layout):
    check(layout, variant)


# A run's widths, far from equal, that go on being learned; several layers together have none.
WIDTHS = {"mean": torch.tensor([1.0, 16.0, 81.0]), "error": torch.zeros(3), "mass": torch.ones(())}
KINDS: dict[str, dict[str, Any]] = {name: {"noise": noise} for name, noise in NOISES.items()}
KINDS["widths of tokens"] = {"token_sigma": True}
WITHOUT_WIDTHS = ("widths of tokens", "together")


VARIED = ("orthogonal", "widths of tokens")
"""Kinds whose queries depend on each other, or that learn from them: here every variant is tried."""


@pytest.mark.parametrize(
    ("kind", "variant", "layout"),
    [
        *((kind, "baseline", layout) for kind in KINDS for layout in LAYOUTS if (kind, layout) != WITHOUT_WIDTHS),
        *((kind, variant, "group") for kind in VARIED for variant in ("plain", "leave_one_out", "antithetic")),
    ],
)
def test_narrow_noise(kind, variant, layout):
    """Every kind of noise; clean losses are +- sigma, or `plain` would need a day."""
    strategy, x, y = token_strategy(layout, sigma=1e-3, variant=variant, **KINDS[kind])
    y[:, -1] += torch.tensor([0.3, -0.2, 0.2, -0.3]) - 1e-3 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    if kind == "widths of tokens":
        strategy._tokens.load_state_dict({site.name: WIDTHS for site in strategy.sites if site.last < 3})
    check_against_autograd(strategy, x, y, counts=COUNTS, draws=16)


def test_wide_noise_smooths():
    """Else the tests with wide noise would say no more than those with narrow noise."""
    strategy, x, y = token_strategy("block", sigma=0.5)
    smoothed = token_truth("block", sigma=0.5)["0"]
    with pytest.raises(AssertionError, match="slope"):
        assert_unbiased(exact_gradients(strategy, x, y)[0], smoothed)


@pytest.mark.parametrize("variant", ["baseline", "antithetic"])
def test_vit(variant, images):
    """Attention mixes the tokens; the last group is estimated from noise on the class token alone."""
    sites = [
        {"stages": ["embed", "blocks.0"], "sigma": 1e-3},
        {"stages": ["blocks.1", "blocks.2"], "sigma": 1e-3},
        {"stages": ["pool", "head"], "sigma": 1e-3},
    ]
    strategy = bound(tiny_vit(), cross_entropy, sites, variant=variant)
    x, _ = images
    counts = torch.tensor([600, 360, 1000, 240])
    check_against_autograd(strategy, x, torch.full((4,), 2), counts=counts, draws=16)


@pytest.mark.statistical_heavy
@pytest.mark.parametrize(
    ("kwargs", "variant", "layout"),
    [
        *(({}, variant, layout) for variant, layout in CASES if variant != "plain" and layout != "group"),
        ({"global_pool": "avg", "reg_tokens": 2}, "baseline", "block"),
        ({"global_pool": "avg", "reg_tokens": 2}, "antithetic", "linear"),
        ({"global_pool": "map"}, "baseline", "linear"),
    ],
)
def test_vit_everywhere(kwargs, variant, layout, images):
    """Every stage or every layer of a ViT is a site of its own, or all layers are perturbed together."""
    vit = tiny_vit(**kwargs)
    if layout != "block":
        freeze(vit, "cls_token", "pos_embed", "reg_token", "attn_pool.latent")
    site = {"stages": ["embed", "head"], "sigma": 1e-3, "kind": "block" if layout == "block" else "linear"}
    strategy = bound(vit, cross_entropy, [{**site, "together": layout == "together"}], variant=variant)
    x, _ = images
    counts = torch.tensor([1200, 720, 2000, 480]) * (4 if layout == "together" else 1)
    check_against_autograd(strategy, x, torch.full((4,), 2), counts=counts, draws=20)
