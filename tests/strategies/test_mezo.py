"""MeZO against the slow reference and against SPSA, what a step costs, what it leaves alone, and refusals."""

import math
import statistics
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import MeZO
from flops_lightning.strategies.costs import site_costs
from tests.reference.layouts import convolutional
from tests.reference.networks import (
    TokenMean,
    brittle_loss,
    cross_entropy,
    freeze,
    gradients,
    shaken,
    squared_error,
    tiny_vit,
    token_network,
)
from tests.reference.parameter_perturbation import assert_gradients, queries_of_sample

SILENT = pytest.mark.filterwarnings("ignore:.*lost every query")


def mezo(module: nn.Module, loss: Any, **settings: Any) -> MeZO:
    strategy = MeZO(**{"seed": 7, "sigma": 0.1, **settings})
    strategy.bind(stage_network(module), loss)
    return strategy


FZOO = {"variant": "baseline", "distribution": "rademacher"}


def test_one_sided_steps_take_samples_that_are_single_numbers() -> None:
    strategy = mezo(nn.Sequential(nn.Embedding(5, 3)).double(), squared_error, queries=2, **FZOO)
    strategy.estimate(strategy.clean_pass(torch.tensor([0, 4, 2]), torch.zeros(3, 3).double()))
    assert all(p.grad is not None for p in strategy.network.module.parameters())


def assert_equals_reference(strategy: MeZO, x: Tensor, y: Tensor) -> None:
    module, draw = strategy.network.module, strategy.draw
    estimate = strategy.estimate(strategy.clean_pass(x.clone(), y))
    assert estimate.queries == len(x) * strategy.queries
    assert_gradients(module, strategy, x, y, torch.full((len(x),), strategy.queries), gradients(module), draw=draw)


@pytest.mark.parametrize("chunk_rows", [1, 3, 256])
@pytest.mark.parametrize("queries", [2, 6])
@pytest.mark.parametrize("batch", [1, 3, 4])
def test_tokens(batch, queries, chunk_rows, tokens_net, tokens):
    strategy = mezo(tokens_net, squared_error, queries=queries, chunk_rows=chunk_rows)
    x, y = tokens
    for _ in range(2):
        assert_equals_reference(strategy, x[:batch], y[:batch])
    strategy.rank = 2
    assert_equals_reference(strategy, x[:batch], y[:batch])
    assert strategy.draw == 3


def test_normalised_by_the_standard_deviation_over_directions(tokens_net, tokens):
    """FZOO: whatever the scale of the loss, and no step where it is flat."""
    strategy, samples = mezo(tokens_net, squared_error, queries=6, normalize="std"), len(tokens[0])
    strategy.estimate(strategy.clean_pass(*tokens))
    found = gradients(tokens_net)
    (site,) = strategy.sites
    rows = [queries_of_sample(tokens_net, strategy, site, *tokens, b, 6) for b in range(samples)]
    quotients = [sum(row[q].loss - row[q + 1].loss for row in rows) / samples / (2 * 0.1) for q in (0, 2, 4)]
    directions = [rows[0][q].direction for q in (0, 2, 4)]
    total = sum(w * z for w, z in zip(quotients, directions, strict=True)) / 3 / statistics.stdev(quotients)
    torch.testing.assert_close(torch.cat([g.flatten() for g in found.values()]), total, rtol=1e-9, atol=1e-9)
    for scale in (100.0, 0.0):
        scaled = mezo(tokens_net, lambda o, t, s=scale: s * squared_error(o, t), queries=6, normalize="std")
        scaled.estimate(scaled.clean_pass(*tokens))
        for name, gradient in gradients(tokens_net).items():
            torch.testing.assert_close(gradient, found[name] * (scale > 0), rtol=1e-9, atol=1e-9)
    with pytest.raises(SettingError, match=r"normalize = 'std': needs two directions or more, and queries = 2 is one"):
        MeZO(normalize="std")


@pytest.mark.parametrize(("distribution", "chunk_rows"), [("gaussian", 3), ("rademacher", 256)])
def test_one_sided_queries(distribution, chunk_rows, tokens_net, tokens):
    settings = {"variant": "baseline", "distribution": distribution, "chunk_rows": chunk_rows}
    strategy = mezo(tokens_net, squared_error, queries=5, **settings)
    for _ in range(2):
        assert_equals_reference(strategy, *tokens)
    estimate = strategy.estimate(strategy.clean_pass(*tokens))
    torch.testing.assert_close(estimate.output, tokens_net(tokens[0]).detach())
    torch.testing.assert_close(estimate.loss, squared_error(estimate.output, tokens[1]))
    total = strategy.meter.total()
    assert (total.queries, total.clean_passes, total.forward_equivalents) == (3 * 5 * 4, 3 * 4, 3 * 6 * 4)


def test_fzoo_is_one_sided_with_signs_over_the_standard_deviation_of_the_losses(tokens_net, tokens):
    """Its step is ``rate / sigma`` times ours: there the losses' deviation is not divided by the width."""
    strategy, samples = mezo(tokens_net, squared_error, queries=3, normalize="std", **FZOO), len(tokens[0])
    strategy.estimate(strategy.clean_pass(*tokens))
    (site,) = strategy.sites
    rows = [queries_of_sample(tokens_net, strategy, site, *tokens, b, 3) for b in range(samples)]
    losses = [sum(row[q].loss for row in rows) / samples for q in range(3)]
    clean = squared_error(tokens_net(tokens[0]), tokens[1]).mean().item()
    directions = [rows[0][q].direction for q in range(3)]
    assert set(torch.cat(directions).tolist()) == {-1.0, 1.0}
    step = sum((loss - clean) * u for loss, u in zip(losses, directions, strict=True)) / 3 / 0.1
    found = torch.cat([g.flatten() for g in gradients(tokens_net).values()])
    torch.testing.assert_close(found, step / statistics.stdev(losses) * 0.1, rtol=1e-9, atol=1e-9)


def test_one_sided_queries_above_what_is_frozen_and_of_samples_without_a_clean_loss(tokens_net, tokens):
    for stage in tokens_net[:2]:
        stage.requires_grad_(False)
    strategy = mezo(tokens_net, squared_error, queries=3, **FZOO)
    assert_equals_reference(strategy, *tokens)
    x = tokens[0].clone()
    x[1, 0, 0] = math.nan
    with pytest.warns(RuntimeWarning, match="1 samples lost every query"):
        estimate = strategy.estimate(strategy.clean_pass(x, tokens[1]))
    assert (estimate.lost, estimate.silent_samples) == (3, 1)


@pytest.mark.parametrize("kwargs", [{}, {"global_pool": "map", "reg_tokens": 2, "init_values": 0.5}])
def test_vit(kwargs, images):
    vit = tiny_vit(**kwargs)
    freeze(vit, "blocks.0.attn.qkv.weight", "blocks.1.norm1.bias")
    assert_equals_reference(mezo(vit, cross_entropy, queries=4), *images)


def test_convolutions(images):
    assert_equals_reference(mezo(convolutional(), cross_entropy, queries=4, chunk_rows=3), *images)


def test_what_is_frozen_below_runs_once(tokens_net, tokens):
    for stage in tokens_net[:2]:
        stage.requires_grad_(False)
    strategy = mezo(tokens_net, squared_error, queries=6, chunk_rows=3)
    calls: list[int] = []
    tokens_net[0].register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    strategy.estimate(strategy.clean_pass(*tokens))
    assert sum(calls) == len(tokens[0]) + 1, "the batch, and one sample whose cost is counted"
    total = strategy.meter.total()
    (site,) = strategy.sites
    cost = site_costs(strategy.network, (), tokens[0]).from_stage[site.first]
    assert 0 < cost < 1
    assert total.forward_equivalents == pytest.approx(len(tokens[0]) * (1 - cost + 6 * cost))
    tokens_net.zero_grad()
    assert_equals_reference(strategy, *tokens)


def test_integer_inputs_and_stages_that_work_in_place(tokens):
    net = shaken(nn.Sequential(nn.Embedding(10, 3), nn.SiLU(inplace=True), TokenMean(), nn.Linear(3, 2)))
    assert_equals_reference(mezo(net, squared_error), torch.tensor([[1, 2], [2, 9], [0, 0], [3, 1]]), tokens[1])


def test_a_step_is_two_forward_passes_and_one_scalar(tokens):
    """Nothing is run unperturbed, and the gradient of all parameters is one number times the direction."""
    net, (x, y) = token_network(), tokens
    rows: dict[int, list[int]] = {i: [] for i in range(len(net))}
    for i, stage in enumerate(net):
        stage.register_forward_hook(lambda _, args, __, i=i: rows[i].append(len(args[0])))
    strategy = mezo(net, squared_error)
    clean = strategy.clean_pass(x, y)
    assert clean.loss.isnan().all()
    assert rows == {i: [] for i in rows}
    first = strategy.estimate(clean)
    assert rows == {i: [4, 4] for i in rows}
    spent = strategy.meter.total()
    assert (spent.queries, spent.clean_passes, spent.forward_equivalents) == (8, 0, 8)
    once = gradients(net)
    strategy.loss = lambda output, target: 3 * squared_error(output, target)
    strategy.estimate(clean)
    torch.testing.assert_close(gradients(net), {name: 3 * g for name, g in once.items()}, rtol=1e-12, atol=1e-12)
    assert first.observation is None


@pytest.mark.parametrize("chunk_rows", [1, 3, 256])
def test_the_result_reports_the_first_direction(chunk_rows, tokens_net, tokens):
    """The mean loss of both signs, and the output under the plus sign: near the clean ones for a small sigma."""
    x, y = tokens
    strategy = mezo(tokens_net, squared_error, queries=4, chunk_rows=chunk_rows, sigma=1e-7)
    estimate = strategy.estimate(strategy.clean_pass(x, y))
    torch.testing.assert_close(estimate.output, tokens_net(x).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(estimate.loss, squared_error(tokens_net(x), y).detach(), rtol=1e-10, atol=1e-10)
    wide = mezo(tokens_net, squared_error, queries=4, chunk_rows=chunk_rows)
    found = wide.estimate(wide.clean_pass(x, y))
    alone = mezo(tokens_net, squared_error)
    expected = alone.estimate(alone.clean_pass(x, y))
    torch.testing.assert_close((found.output, found.loss), (expected.output, expected.loss), rtol=1e-12, atol=1e-12)


# Lost queries


@SILENT
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_pairs_without_finite_losses(bad, tokens_net, tokens):
    """Dropped together; the rest of the sample's queries divides by what survived."""
    limit = float(tokens_net(tokens[0])[:, 0].detach().max()) + 0.1
    strategy = mezo(tokens_net, brittle_loss(bad, limit), queries=10, sigma=0.5)
    assert_equals_reference(strategy, *tokens)
    lost = strategy.meter.total().lost
    assert 0 < lost < 40
    assert lost % 2 == 0


def test_a_sample_that_loses_every_query_contributes_nothing(tokens_net, tokens):
    x, y = tokens[0].clone(), tokens[1]
    x[2, 1, 0] = math.nan
    strategy = mezo(tokens_net, squared_error, queries=4)
    with pytest.warns(RuntimeWarning, match=r"^1 samples lost every query.*sigma"):
        estimate = strategy.estimate(strategy.clean_pass(x, y))
    assert (estimate.lost, estimate.silent_samples, estimate.lost_batch) == (4, 1, False)
    x[2] = 0.0
    assert_gradients(tokens_net, strategy, x, y, torch.tensor([4, 4, 0, 4]), gradients(tokens_net), draw=0)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"queries": 3}, r"queries = 3: must be even and 2 or more"),
        ({"queries": 0}, r"queries = 0: must be 1 or more"),
        ({"variant": "plain"}, r"variant = 'plain': is not one of"),
        ({"distribution": "signs"}, r"distribution = 'signs': is not one of"),
        ({"queries": 1, "variant": "baseline", "normalize": "std"}, r"normalize = 'std': needs two .* queries: 2"),
        ({"sigma": 0.0}, r"sigma = 0.0: must be a number above 0"),
        ({"sigma": -1e-3}, r"sigma = -0.001: must be a number above 0"),
        ({"sigma": math.nan}, r"sigma = nan: must be a number above 0"),
        ({"sigma": math.inf}, r"sigma = inf: must be a number above 0"),
        ({"chunk_rows": 0}, r"chunk_rows = 0: must be auto or a number, 1 or more"),
    ],
)
def test_settings_that_are_refused(settings, problem):
    with pytest.raises(SettingError, match=r"^model\.strategy\." + problem):
        MeZO(**settings)


@pytest.mark.parametrize(("sigma", "warned"), [(1e-2, False), (1e-7, True)])
def test_a_sigma_below_the_precision_is_warned_of_once(sigma, warned, tokens_net, tokens):
    strategy = mezo(tokens_net.float(), squared_error, sigma=sigma)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            strategy.clean_pass(tokens[0].float(), tokens[1].float())
    assert ["sigma = 1e-07" in str(each.message) for each in caught] == [True] * warned
