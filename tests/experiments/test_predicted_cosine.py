"""Predicted cosines against estimates, and against the paper's formulas where noise enters the rows alone."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from experiments.components import Component, SplitLinear, batch_gradients, find_components
from experiments.drawn_cosine import Drawn, draw
from experiments.predicted_cosine import (
    RowGradients,
    likelihood_ratio_traces,
    predicted_cosine,
    shared_objective,
    spsa_traces,
)
from flops_lightning.allocators.objective import objective
from flops_lightning.errors import SettingError
from flops_lightning.network.staging import stage_network
from tests.reference.networks import autograd_gradient, cross_entropy, normal, tiny_vit

X, DELTA = normal(4, 5, 3), normal(4, 5, 6, seed=1)
SAMPLES = torch.einsum("bto,bti->boi", DELTA, X)  # their gradients


def squares(gradients: Tensor) -> Tensor:
    return gradients.square().flatten(1).sum(1)


def test_the_formulas_of_noise_on_the_rows_alone() -> None:
    found = RowGradients.of(X, DELTA)
    own, parameters = squares(SAMPLES), 6 * 3
    by_hand = 6 * squares(DELTA) * squares(X) + own
    torch.testing.assert_close(likelihood_ratio_traces(found), by_hand)
    torch.testing.assert_close(spsa_traces(found), 2 * (parameters + 1) * own)
    torch.testing.assert_close(spsa_traces(found, rank=1), 2 * ((6 + 2) * (3 + 2) - 1) * own)
    assert predicted_cosine(found, shared_objective(found, 10)) == pytest.approx(math.sqrt(10 / (10 + parameters + 1)))
    counts = torch.tensor([1, 2, 3, 4])
    variance = float((by_hand / counts).sum() / SAMPLES.sum(0).square().sum())
    assert predicted_cosine(found, objective(by_hand, counts)) == pytest.approx((1 + variance) ** -0.5)


def test_directions_of_one_sample_are_the_same_whether_shared_or_its_own() -> None:
    found = RowGradients.of(X[:1], DELTA[:1], slice(2, 4), bias=True)
    assert float(spsa_traces(found)) / 12 == pytest.approx(float(shared_objective(found, 6)))


def test_noise_in_the_whole_layer_adds_variance_at_its_rows() -> None:
    alone, module = RowGradients.of(X, DELTA[..., 2:4]), RowGradients.of(X, DELTA, slice(2, 4), bias=True)
    torch.testing.assert_close(alone.samples.rows, module.samples.rows)
    torch.testing.assert_close(module.samples.rows, squares(SAMPLES[:, 2:4]))
    torch.testing.assert_close(alone.batch.rows, module.batch.rows)
    for traces in (likelihood_ratio_traces, spsa_traces):
        assert bool((traces(module) > traces(alone)).all())


def test_what_cancels_up_to_rounding_is_zero() -> None:
    x, delta = X.float(), DELTA.float()
    delta = torch.cat([delta, -delta]) * (1 + torch.finfo(delta.dtype).eps)
    assert RowGradients.of(torch.cat([x, x]), delta).zero
    assert not RowGradients.of(x, 1e-20 * DELTA.float()).zero


def test_gradients_of_components_are_those_of_autograd(vit: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    network, names = stage_network(vit), ["query", "key", "value", "proj", "fc1", "fc2"]
    exact = autograd_gradient(vit, cross_entropy, *images)
    components = find_components(network, [], names)
    found = batch_gradients(network, cross_entropy, images, components, noise="tensor")
    assert [(each.layer, each.name) for each in components] == [(i, name) for i in (1, 2, 3) for name in names]
    for each in components:
        weight = 4 * exact[f"{each.module}.weight"]  # a sum over the samples
        expected = weight[each.rows(len(weight))].square().sum()
        torch.testing.assert_close(found.rows[each].batch.rows, expected)
    torch.testing.assert_close(vit.head(found.embedding), vit(images[0]).detach())


KEY, VALUE, FC1 = Component(1, "key"), Component(1, "value"), Component(2, "fc1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("noise", "estimator", "component"),
    [
        ("tensor", "lr", KEY), ("tensor", "lr", FC1), ("module", "lr", VALUE), ("tensor", "spsa", KEY),
        ("tensor", "spsa", FC1), ("module", "spsa", VALUE), ("tensor", "spsa_factored", KEY),
        ("tensor", "spsa_factored", FC1), ("module", "spsa_factored", VALUE), ("module", "spsa_factored", FC1),
    ],
)  # fmt: skip
def test_predicted_and_drawn_cosines_agree(
    noise: Any, estimator: Any, component: Component, images: tuple[Tensor, Tensor]
) -> None:
    network, queries = stage_network(tiny_vit(embed_dim=8, depth=2)), 8
    batch = (images[0], torch.full_like(images[1], 3))  # one class: gradients that do not cancel need fewer draws
    rows = batch_gradients(network, cross_entropy, batch, [component], noise=noise).rows[component]
    if estimator == "spsa":
        j = shared_objective(rows, queries / 2)
    else:
        traces = likelihood_ratio_traces(rows) if estimator == "lr" else spsa_traces(rows, rank=1)
        j = traces.sum() / queries
    predicted = predicted_cosine(rows, j)
    drawn = draw(
        network, cross_entropy, batch, component, noise=noise, estimator=estimator, queries=queries, draws=40,
        sigma=1e-4, seed=3, chunk_rows=64,
    )  # fmt: skip
    assert abs(drawn.cosine - predicted) < 3 * drawn.error
    assert drawn.error < 0.12 * predicted  # so that a factor of 1.5 would be seen


def test_the_mean_of_cosines_and_the_jackknife() -> None:
    exact, estimates = normal(7), normal(7) + 2 * normal(400, 7, seed=2)
    parts = [Drawn.of(part, exact) for part in estimates.split(20)]
    spread = float(torch.tensor([part.cosine for part in parts]).std())
    errors = float(torch.tensor([part.error for part in parts]).square().mean().sqrt())
    assert errors == pytest.approx(spread, rel=3 * (2 * len(parts)) ** -0.5)
    own = torch.nn.functional.cosine_similarity(estimates[:20], exact[None])
    assert parts[0].mean == pytest.approx(float(own.mean()))


def test_a_split_layer_computes_what_the_whole_one_does() -> None:
    whole = nn.Linear(4, 6)
    torch.testing.assert_close(SplitLinear(whole, ("a", "b", "c"))(normal(2, 4).float()), whole(normal(2, 4).float()))


@pytest.mark.parametrize(
    ("layers", "names", "message"),
    [
        ([4], ["fc1"], r"--layers = 4: is not a layer of this network. Choose from 1 to 3."),
        ([0], ["fc1"], r"--layers = 0: .* Choose from 1 to 3."),
        ([2], ["gate"], r"--components = 'gate': .* Choose from query, key, value, proj, fc1, fc2."),
    ],
)
def test_a_layer_or_component_that_is_not_there(layers: list[int], names: list[str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        find_components(stage_network(tiny_vit()), layers, names)


def test_the_key_of_an_unfused_network_and_a_network_without_blocks() -> None:
    unfused = tiny_vit()
    unfused.blocks[1].attn.qkv = SplitLinear(unfused.blocks[1].attn.qkv, ("query", "key", "value"))
    with pytest.raises(SettingError, match=r"'key': .* of a fused qkv\) of blocks.1. Choose from proj, fc1, fc2."):
        find_components(stage_network(unfused), [], ["key"])
    with pytest.raises(SettingError, match="has no blocks, but the stages"):
        find_components(stage_network(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), [], ["fc1"])
