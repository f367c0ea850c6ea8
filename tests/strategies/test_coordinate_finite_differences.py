import copy
import math
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.errors import SettingError
from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import CoordinateFiniteDifferences
from flops_lightning.strategies.coordinate_probes import Masks, draw_masks, inclusion_probabilities
from tests.reference.networks import (
    Loss,
    TokenMean,
    autograd_gradient,
    cross_entropy,
    estimated,
    freeze,
    gradients,
    shaken,
    squared_error,
    tiny_vit,
    token_network,
)

SILENT = pytest.mark.filterwarnings("ignore:.*lost every query")


def bound(module: nn.Module, loss: Loss, **settings: Any) -> CoordinateFiniteDifferences:
    defaults = {"coordinates": 20, "step": 1e-5, "ratios": "uniform", "grasp_queries": 6, "seed": 7}
    strategy = CoordinateFiniteDifferences(**{**defaults, **settings})
    strategy.bind(stage_network(module), loss)
    return strategy


def sizes(module: nn.Module) -> dict[str, int]:
    return {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}


def all_of(module: nn.Module) -> int:
    return sum(sizes(module).values())


def uniform_masks(module: nn.Module, strategy: CoordinateFiniteDifferences, draw: int = 0) -> Masks:
    probabilities = inclusion_probabilities(sizes(module), dict.fromkeys(sizes(module), 1.0), strategy.coordinates)
    return draw_masks(sizes(module), probabilities, seed=strategy.seed, draw=draw)


def masked(gradient: dict[str, Tensor], masks: Masks) -> dict[str, Tensor]:
    """The gradient at the coordinates of the masks, zeros elsewhere."""
    found = {name: torch.zeros_like(g, memory_format=torch.contiguous_format) for name, g in gradient.items()}
    for name, index in masks.items():
        found[name].view(-1)[index] = gradient[name].reshape(-1)[index]
    return found


def reference(
    module: nn.Module, loss: Loss, x: Tensor, y: Tensor, masks: Masks, *, step: float, scheme: str
) -> tuple[dict[str, Tensor], Tensor]:
    """Slow and obvious: a copy of the network for every coordinate, one sample at a time; and ``(n, b)`` lost terms."""
    gradient = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    lost = []

    def loss_of(name: str, i: int, move: float, sample: int) -> float:
        moved = copy.deepcopy(module).eval()
        with torch.no_grad():
            moved.get_parameter(name).view(-1)[i] += move
            return float(loss(moved(x[sample : sample + 1]), y[sample : sample + 1]))

    for name, index in masks.items():
        for i in index.tolist():
            low, b_all = -step if scheme == "central" else 0.0, range(len(x))
            terms = [(loss_of(name, i, step, b) - loss_of(name, i, low, b)) / (step - low) / len(x) for b in b_all]
            gradient[name].view(-1)[i] = sum(t for t in terms if math.isfinite(t))
            lost.append([not math.isfinite(t) for t in terms])
    return gradient, torch.tensor(lost)


def assert_close(found: dict[str, Tensor | None], expected: dict[str, Tensor], atol: float) -> None:
    assert {name for name, g in found.items() if g is not None} == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def check_masked_gradient(module: nn.Module, loss: Loss, x: Tensor, y: Tensor, **settings: Any) -> None:
    strategy = bound(module, loss, scheme="central", **settings)
    _, found = estimated(strategy, x, y)
    # Right to the square of the step 1e-5, and to the rounding of losses divided by it.
    expected = masked(autograd_gradient(module, loss, x, y), uniform_masks(module, strategy))
    assert_close(found, expected, atol=2e-8)


def test_weights_tied_within_a_stage_and_others_that_are_not_contiguous(tokens):
    inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net = shaken(nn.Sequential(inner, nn.Sequential(TokenMean(), nn.Linear(3, 2))))
    inner[2].weight = inner[0].weight
    net[1][1].weight = nn.Parameter(net[1][1].weight.detach().T.contiguous().T)
    check_masked_gradient(net, squared_error, *tokens, coordinates=all_of(net))


def test_it_is_autograd_s_gradient_where_the_mask_is_and_zero_elsewhere(vit, images):
    check_masked_gradient(vit, cross_entropy, *images, coordinates=300)


def test_every_parameter_of_a_vit_is_reached(images):
    """Class token, positions, norms, biases: the whole gradient, when everything is measured."""
    vit = tiny_vit(depth=1, embed_dim=4, num_heads=2, mlp_ratio=1.0)
    freeze(vit, "blocks.0.norm1.weight")
    check_masked_gradient(vit, cross_entropy, *images, coordinates=all_of(vit))


def test_rescaling_divides_by_the_probability(tokens_net, tokens):
    """So the estimate is unbiased for the whole gradient: an entry is in the mask with this probability."""
    found = []
    for rescale in (False, True):
        strategy = bound(tokens_net, squared_error, rescale=rescale, ratios="zo_grasp", keep=0.8)
        found.append(estimated(strategy, *tokens)[1])
    probabilities = inclusion_probabilities(sizes(tokens_net), strategy.state_dict()["ratios"], 20)
    assert len(set(probabilities.values())) > 2
    torch.testing.assert_close(found[1], {name: gradient / probabilities[name] for name, gradient in found[0].items()})


@pytest.mark.parametrize("scheme", ["forward", "central"])
@pytest.mark.parametrize("chunk_rows", [1, 3, 4, 9])
def test_the_chunk_size_changes_nothing(chunk_rows, scheme, vit, images):
    found = []
    for rows in (chunk_rows, 256):
        strategy = bound(vit, cross_entropy, scheme=scheme, step=1e-3, chunk_rows=rows, ratios="zo_grasp")
        found.append((estimated(strategy, *images)[1], strategy.state_dict()))
    assert_close(found[0][0], found[1][0], atol=1e-11)
    assert found[0][1] == found[1][1]


def test_what_lies_below_is_not_run_again(vit, images):
    freeze(vit, *[name for name in sizes(vit) if not name.startswith(("blocks.2", "head"))])
    strategy = bound(vit, cross_entropy)
    clean = strategy.clean_pass(*images)
    calls = []
    for i, block in enumerate(vit.blocks):
        block.mlp.register_forward_hook(lambda *_, i=i: calls.append(i))
    strategy.estimate(clean)
    assert set(calls) == {2}
    assert set(clean.activations) <= {0, 3, 5, 6}


def test_a_mask_has_its_size_and_each_entry_its_probability():
    entries = {"a": 40, "b": 3, "c": 1, "d": 16}
    probabilities = inclusion_probabilities(entries, {"a": 0.5, "b": 1.0, "c": 0.1, "d": 0.05}, 6)
    assert sum(probabilities[name] * size for name, size in entries.items()) == pytest.approx(6)
    draws, found = 4000, {name: torch.zeros(size) for name, size in entries.items()}
    for draw in range(draws):
        masks = draw_masks(entries, probabilities, seed=3, draw=draw)
        assert sum(len(index) for index in masks.values()) == 6
        for name, index in masks.items():
            assert abs(len(index) - probabilities[name] * entries[name]) < 1
            assert (index[1:] > index[:-1]).all()
            found[name][index] += 1
    for name, p in probabilities.items():
        error = math.sqrt(p * (1 - p) / draws)
        assert ((found[name] / draws - p).abs() < 4.5 * error).all(), name


def test_a_full_mask_has_everything():
    entries = {"a": 7, "b": 1, "c": 3}
    probabilities = inclusion_probabilities(entries, dict.fromkeys(entries, 0.3), 11)
    for draw in range(50):
        masks = draw_masks(entries, probabilities, seed=0, draw=draw)
        assert {name: len(set(index.tolist())) for name, index in masks.items()} == entries


def measured(strategy: CoordinateFiniteDifferences, tokens: tuple[Tensor, Tensor]) -> dict[str, list[int]]:
    return {name: g.flatten().nonzero().flatten().tolist() for name, g in estimated(strategy, *tokens)[1].items()}


def test_a_mask_lasts_as_long_as_it_should(tokens_net, tokens):
    strategy = bound(tokens_net, squared_error, resample_every=2)
    found = [measured(strategy, tokens) for _ in range(4)]
    assert found[0] == found[1] != found[2] == found[3]


def test_ranks_measure_the_same_coordinates(tokens_net, tokens):
    one, other = bound(tokens_net, squared_error), bound(tokens_net, squared_error)
    other.rank = 1
    assert measured(one, tokens) == measured(other, tokens)


def brittle(output: Tensor, target: Tensor) -> Tensor:
    return torch.where(output[:, 0] > 0.28, math.nan, squared_error(output, target))


@SILENT
@pytest.mark.parametrize("scheme", ["forward", "central"])
def test_lost_terms_have_weight_zero(scheme, tokens_net, tokens):
    """Against the slow reference at a large step; dropout is off."""
    tokens_net.insert(1, nn.Dropout(0.5))
    strategy = bound(tokens_net.train(), brittle, step=0.3, scheme=scheme, coordinates=30)
    estimate = strategy.estimate(strategy.clean_pass(*tokens))
    found = gradients(tokens_net)
    masks = uniform_masks(tokens_net, strategy)
    expected, lost = reference(tokens_net, brittle, *tokens, masks, step=0.3, scheme=scheme)
    assert 0 < lost.sum() < lost.numel()
    assert_close(found, expected, atol=1e-12)
    evaluations = 2 if scheme == "central" else 1
    assert estimate.lost == int(lost.sum()) * evaluations == strategy.meter.sites["coordinates"].lost
    assert estimate.silent_samples == int(lost.all(0).sum())
    assert estimate.queries == 30 * 4 * evaluations
    assert not estimate.lost_batch


@SILENT
def test_a_batch_that_loses_all_its_moved_losses_touches_no_gradient(tokens_net, tokens):
    clean_output = tokens_net(tokens[0]).detach()

    def exact_only(output: Tensor, target: Tensor) -> Tensor:
        rows = clean_output.repeat(len(output) // 4, 1)
        return torch.where((output == rows).all(1), 1.0, math.inf).double()

    freeze(tokens_net, *[name for name in sizes(tokens_net) if name != "4.bias"])
    strategy = bound(tokens_net, exact_only, coordinates=2)
    estimate = strategy.estimate(strategy.clean_pass(*tokens))
    assert (estimate.lost_batch, estimate.lost, estimate.silent_samples) == (True, 8, 4)
    assert set(gradients(tokens_net).values()) == {None}


@pytest.mark.parametrize(("scheme", "evaluations"), [("forward", 1), ("central", 2)])
def test_what_it_pays(scheme, evaluations, vit, images):
    """Positions cost the whole network, the head a vanishing part of it; ZO-GraSP is paid once."""
    strategy = bound(vit, cross_entropy, scheme=scheme, ratios="zo_grasp", grasp_queries=3)
    for _ in range(2):
        estimate = strategy.estimate(strategy.clean_pass(*images))
    sites = strategy.meter.sites
    assert estimate.queries == 4 * 20 * evaluations
    assert (sites["coordinates"].queries, sites["zo_grasp"].queries) == (2 * 4 * 20 * evaluations, 4 * 7)
    assert (sites["zo_grasp"].forward_equivalents, sites["clean"].clean_passes) == (28, 8)
    costs = []
    for part in ("pos_embed", "head"):
        alone = tiny_vit()
        freeze(alone, *[name for name in sizes(alone) if not name.startswith(part)])
        strategy = bound(alone, cross_entropy, scheme=scheme)
        estimated(strategy, *images)
        costs.append(strategy.meter.sites["coordinates"].forward_equivalents)
    assert costs[0] == pytest.approx(4 * 20 * evaluations)
    assert costs[1] < 0.01 * costs[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"coordinates": 0}, "strategy.coordinates = 0.*1 or more"),
        ({"grasp_queries": 0}, "strategy.grasp_queries = 0"),
        ({"resample_every": 0}, "strategy.resample_every = 0"),
        ({"chunk_rows": 0}, "strategy.chunk_rows = 0"),
        ({"step": 0.0}, "strategy.step = 0.0.*0.001"),
        ({"step": math.inf}, "strategy.step = inf"),
        ({"step": math.nan}, "strategy.step = nan"),
        ({"keep": 0.0}, "strategy.keep = 0.0"),
        ({"keep": 1.5}, "strategy.keep = 1.5"),
        ({"scheme": "backward"}, "strategy.scheme = 'backward'.*central"),
        ({"ratios": "grasp"}, "strategy.ratios = 'grasp'.*zo_grasp"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        CoordinateFiniteDifferences(**settings)


def test_a_mask_larger_than_the_network_is_refused(tokens_net):
    with pytest.raises(SettingError, match=rf"coordinates = 1000.*Write {all_of(tokens_net)} or less"):
        bound(tokens_net, squared_error, coordinates=1000)
    with pytest.raises(RuntimeError, match="bind"):
        CoordinateFiniteDifferences().clean_pass(torch.zeros(1), torch.zeros(1))


def test_other_parameters_than_zo_grasp_s_are_refused(tokens_net, tokens):
    strategy = bound(tokens_net, squared_error, ratios="zo_grasp")
    strategy.estimate(strategy.clean_pass(*tokens))
    freeze(tokens_net, "4.bias")
    with pytest.raises(SettingError, match=r"freeze = \['4.bias'\]: are not frozen as they were.*ratios: uniform"):
        strategy.clean_pass(*tokens)


def test_a_step_that_the_precision_does_not_resolve_is_reported(tokens):
    """At the tensor with the largest weights, and what is proposed instead is enough."""
    net = token_network().bfloat16()
    x = tokens[0].bfloat16()
    largest = max(net.parameters(), key=lambda p: float(p.detach().square().mean()))
    needed = 160 * torch.finfo(torch.bfloat16).eps * float(largest.detach().float().square().mean().sqrt())
    strategy = bound(net, squared_error, step=1e-3)
    with pytest.warns(RuntimeWarning, match=r"strategy.step = 0.001 is below .* '3.0.weight'") as caught:
        strategy.clean_pass(x, tokens[1])
    proposed = float(re.findall(r"Write ([\d.]+) or more", str(caught[0].message))[0])
    assert needed <= proposed < 3 * needed
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bound(net, squared_error, step=proposed).clean_pass(x, tokens[1])
