"""Unbiased: every variant and kind of site against autograd's gradient of the smoothed loss, and faults that must fail.

``reference/smoothed.py`` holds the check. It needs a standard error of at most 2 %, so a bias of 8 % cannot pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flops_lightning.strategies import LikelihoodRatio, PilotSpec, site_queries
from flops_lightning.strategies.delta import DeltaSums
from tests.reference.networks import (
    bound,
    cross_entropy,
    freeze,
    gradients,
    tiny_vit,
)
from tests.reference.smoothed import (
    Sampled,
    assert_unbiased,
    estimates,
    exact_gradients,
    flat,
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
def test_wide_noise(variant: str, layout: str) -> None:
    check(layout, variant)


@pytest.mark.parametrize("layout", ["group", "together"])
@pytest.mark.parametrize("variant", ["baseline", "antithetic"])
def test_narrow_noise(variant: str, layout: str) -> None:
    strategy, x, y = token_strategy(layout, sigma=1e-4, variant=variant)
    check_against_autograd(strategy, x, y, counts=COUNTS, draws=20)


def test_wide_noise_smooths() -> None:
    """Else the tests with wide noise would say no more than those with narrow noise."""
    strategy, x, y = token_strategy("block", sigma=0.5)
    smoothed = token_truth("block", sigma=0.5)["0"]
    with pytest.raises(AssertionError, match="slope"):
        assert_unbiased(exact_gradients(strategy, x, y)[0], smoothed)


@pytest.mark.parametrize("variant", ["baseline", "antithetic"])
def test_vit(variant: str, images: tuple[Tensor, Tensor]) -> None:
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
def test_vit_everywhere(kwargs: dict[str, Any], variant: str, layout: str, images: tuple[Tensor, Tensor]) -> None:
    """Every stage or every layer of a ViT is a site of its own, or all layers are perturbed together."""
    vit = tiny_vit(**kwargs)
    if layout != "block":
        freeze(vit, "cls_token", "pos_embed", "reg_token", "attn_pool.latent")
    site = {"stages": ["embed", "head"], "sigma": 1e-3, "kind": "block" if layout == "block" else "linear"}
    strategy = bound(vit, cross_entropy, [{**site, "together": layout == "together"}], variant=variant)
    x, _ = images
    counts = torch.tensor([1200, 720, 2000, 480]) * (4 if layout == "together" else 1)
    check_against_autograd(strategy, x, torch.full((4,), 2), counts=counts, draws=20)


def test_pilots_do_not_bias_though_the_counts_depend_on_them() -> None:
    """The weight of the pilots is fixed before they are seen, so they may decide the counts and still be used."""
    pilots = PilotSpec("2", 4)
    net, x, y = token_problem()
    site = {"stages": ["0", "4"], "kind": "block", "sigma": 0.5, "queries_per_sample": 20}
    strategy = bound(net, shifted_squared_error, [site], pilots=pilots, chunk_rows=1000)
    found = []
    for _ in range(1000):
        clean = strategy.clean_pass(x, y)
        trace = strategy.pilot_traces(clean).trace[1]
        strategy.estimate(clean, 1 + (60 * trace / trace.sum()).floor().long(), sites=["2"])
        grads = gradients(net)
        found.append(flat([grads["2.weight"], grads["2.bias"]]))
    assert_unbiased(Sampled(torch.stack(found)), token_truth("block", sigma=0.5)["2"])


# Faults to plant. Each is one that a public implementation of the method has.


def divide_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, of_layer = DeltaSums.delta, site_queries.layer_gradient
    monkeypatch.setattr(DeltaSums, "delta", lambda sums: whole(sums) / (sums.weighted[0, ..., 0].numel()))

    def divided(module: nn.Module, x: Tensor, d: Tensor) -> dict[str, Tensor]:
        tokens = d[0, ..., 0].numel()
        return {name: gradient / tokens for name, gradient in of_layer(module, x, d).items()}

    monkeypatch.setattr(site_queries, "layer_gradient", divided)


def average_expanded_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    joint_pass = site_queries.SiteQueries._joint_pass

    def mean_count(counts: np.ndarray) -> np.ndarray:
        return np.full(len(counts), counts.sum() // len(counts))

    monkeypatch.setattr(DeltaSums, "delta", lambda sums: sums.weighted / sums.survivors.sum() * len(sums.survivors))
    monkeypatch.setattr(
        site_queries.SiteQueries,
        "_joint_pass",
        lambda self, site, clean, plan, counts: joint_pass(self, site, clean, plan, mean_count(counts)),
    )


def forget_the_half(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = site_queries.query_weights

    def doubled(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        weights, alive = whole(*args, **kwargs)
        return 2 * weights, alive

    monkeypatch.setattr(site_queries, "query_weights", doubled)


def cross_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of -z comes from another sample of the chunk."""
    whole = site_queries.query_weights

    def crossed(losses: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        plus, minus = losses.view(-1, 2).unbind(1)
        mixed = torch.stack([plus, minus.roll(len(minus) // 2)], dim=1).flatten()
        return whole(mixed, *args, **kwargs)

    monkeypatch.setattr(site_queries, "query_weights", crossed)


@pytest.mark.parametrize("layout", ["group", "linear", "together"])
@pytest.mark.parametrize(
    ("fault", "variant"),
    [
        (divide_by_tokens, "baseline"),
        (average_expanded_rows, "baseline"),
        (forget_the_half, "antithetic"),
        (cross_the_pairs, "antithetic"),
    ],
)
def test_planted_faults_are_caught(
    fault: Callable[[pytest.MonkeyPatch], None], variant: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    token_truth(layout, sigma=0.5)
    fault(monkeypatch)
    with pytest.raises(AssertionError, match=r"^slope"):
        check(layout, variant)
