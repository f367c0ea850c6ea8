"""Noise in the parameters: ES, SPSA and forward gradients in the weights, in every noise layout.

What they share with the likelihood ratio is tested there; whether the estimates are unbiased is in ``statistical/``.
"""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from flops_lightning.errors import SettingError
from flops_lightning.strategies import SPSA, EvolutionStrategies, PilotSpec, WeightForwardMode, precision
from tests.reference.layouts import SIGMA, TOKEN_SITES, VIT_SITES, convolutional
from tests.reference.networks import (
    Prompted,
    TokenMean,
    brittle_loss,
    cross_entropy,
    estimated,
    gradients,
    shaken,
    squared_error,
    tiny_vit,
)
from tests.reference.networks import bound_to as bound
from tests.reference.parameter_perturbation import (
    LAYOUTS,
    RANKS,
    STRATEGIES,
    assert_equals_reference,
    assert_gradients,
    reference_traces,
    surviving_queries,
)

ALL = [(strategy, layout) for strategy in STRATEGIES for layout in LAYOUTS]
KINDS = ("baseline", "spsa", "forward")
"""Single queries, pairs and tangents; the other strategies are single queries with another weight."""
OF_KINDS = [(strategy, layout) for strategy, layout in ALL if strategy in KINDS]
TWO = [{"stages": ["0", "1"], "sigma": 0.5}, {"stages": ["2", "4"], "sigma": 0.5}]
WHOLE = [{"stages": ["0", "4"], "sigma": 0.5}]
SILENT = pytest.mark.filterwarnings("ignore:.*lost every query")
pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect. derivatives are exact")  # sigma, set for all


def perturbing(
    strategy: str, layout: str, module: nn.Module, sites: list[dict[str, Any]], loss: Any = squared_error, **more: Any
) -> Any:
    kind, settings = STRATEGIES[strategy]
    return bound(kind, module, loss, sites, **{"chunk_rows": 3, **settings, **(LAYOUTS | RANKS)[layout], **more})


def only(strategy: Any, site: Any) -> Any:
    alone = copy.copy(strategy)
    alone.sites = (site,)
    return alone


def uneven(strategy: str) -> Tensor:
    return torch.tensor([4, 0, 6, 2] if strategy == "spsa" else [3, 0, 5, 2])


@pytest.mark.parametrize(("strategy", "layout"), OF_KINDS)
def test_vit(strategy, layout, vit, images):
    """Class token and position embedding belong to no layer, and are trained as well."""
    chosen = perturbing(strategy, layout, vit, VIT_SITES["group"], cross_entropy)
    assert {"cls_token", "pos_embed"} < set(chosen.sites[0].parameters)
    # Counts of its own for every site: each must read its own line of the table.
    table = torch.stack([uneven(strategy).roll(s) for s in range(len(chosen.sites))])
    assert_equals_reference(vit, chosen, *images, table)


@pytest.mark.parametrize(("strategy", "layout"), [*ALL, *((kind, rank) for kind in KINDS for rank in RANKS)])
def test_tokens(strategy, layout, tokens_net, tokens):
    chosen = perturbing(strategy, layout, tokens_net, TOKEN_SITES["block"])
    table = torch.stack([uneven(strategy).roll(s) for s in range(len(chosen.sites))])
    assert_equals_reference(tokens_net, chosen, *tokens, table)


@pytest.mark.parametrize("layout", ["shared", "factored", "factored, rank 2", "flipout"])
@pytest.mark.parametrize("strategy", KINDS)
def test_convolutions(strategy, layout, images):
    net = convolutional()
    chosen = perturbing(strategy, layout, net, [{"stages": ["0", "6"], **SIGMA}], cross_entropy)
    assert_equals_reference(net, chosen, *images, uneven(strategy))


@pytest.mark.parametrize("layout", ["guided", "guided, rank 2", "guided, a span of 2"])
def test_guided_convolutions(layout, images):
    first, second = nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.Conv2d(3, 2, 2, dilation=2)
    net = shaken(nn.Sequential(first, nn.GroupNorm(1, 3), nn.Tanh(), second, nn.Flatten(), nn.Linear(8, 5)))
    chosen = perturbing("spsa", layout, net, [{"stages": ["0", "5"], **SIGMA}], cross_entropy)
    assert_equals_reference(net, chosen, *images, uneven("spsa"))


@pytest.mark.parametrize("layout", ["factored", "guided", "flipout"])
@pytest.mark.parametrize("kwargs", [{"init_values": 0.5, "qk_norm": True}, {"global_pool": "map", "reg_tokens": 2}])
def test_vits_with_more_of_them(kwargs, layout, images):
    vit = tiny_vit(depth=2, **kwargs)
    chosen = perturbing("spsa", layout, vit, [{"stages": ["embed", "head"], **SIGMA}], cross_entropy)
    assert_equals_reference(vit, chosen, *images, uneven("spsa"))


@pytest.mark.parametrize(("strategy", "layout"), ALL)
def test_traces(strategy, layout, tokens_net, tokens):
    chosen = perturbing(strategy, layout, tokens_net, TWO)
    clean = chosen.clean_pass(*tokens)
    seen = chosen.estimate(clean, uneven(strategy), traces=True).observation
    for site, found, queries in zip(chosen.sites, seen.trace, seen.queries, strict=True):
        expected = reference_traces(tokens_net, chosen, site, *tokens, uneven(strategy).tolist())
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
        assert torch.equal(queries, uneven(strategy).double())
    assert seen.unit == (2 if strategy == "spsa" else 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_that_start_at_an_odd_index(layout, tokens_net, tokens):
    """A caller may name any index above those used so far; partners stay together."""
    chosen = perturbing("spsa", layout, tokens_net, TWO)
    clean, counts = chosen.clean_pass(*tokens), torch.full((4,), 4)
    odd, even = (chosen.observe_traces(clean, counts, first_query=first).trace for first in (101, 102))
    torch.testing.assert_close(odd, even, rtol=0, atol=0)


def test_a_width_for_all_sites(tokens_net, tokens):
    _, expected = estimated(bound(SPSA, tokens_net, squared_error, TWO), *tokens)
    sites = [{**site, "sigma": 0.01} for site in TWO]
    _, found = estimated(bound(SPSA, tokens_net, squared_error, sites, sigma=0.5), *tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


# Pilots


@pytest.mark.parametrize(
    ("strategy", "layout", "weights"),
    [*((*case, [0.1, 0.5, 0.3, 0.9]) for case in ALL), *((*case, None) for case in OF_KINDS)],
)
def test_pilots_that_are_used_again(strategy, layout, weights, tokens_net, tokens):
    sites = [{**TWO[0], "queries_per_sample": 10}, TWO[1]]
    chosen = perturbing(strategy, layout, tokens_net, sites, pilots=PilotSpec("lowest", 4))
    clean = chosen.clean_pass(*tokens)
    trace = chosen.pilot_traces(clean).trace
    expected = reference_traces(tokens_net, chosen, chosen.sites[0], *tokens, [4] * 4)
    torch.testing.assert_close(trace[0], expected, rtol=1e-9, atol=1e-9)
    assert trace[1].isnan().all(), "nothing was seen there"
    counts = torch.tensor([2, 4, 6, 0])
    chosen.estimate(clean, counts, pilot_weight=None if weights is None else torch.tensor(weights, dtype=torch.float64))
    found, (lower, upper) = gradients(tokens_net), chosen.sites
    for site, early in ((lower, {"pilots": 4, "pilot_weight": weights}), (upper, {})):
        part = {name: found[name] for name in site.parameters}
        assert_gradients(tokens_net, only(chosen, site), *tokens, counts, part, draw=0, **early)


@SILENT
@pytest.mark.parametrize(
    ("strategy", "layout", "bad"),
    [
        *((*case, math.nan) for case in ALL if case[0] != "forward"),
        *(("spsa", layout, -math.inf) for layout in LAYOUTS),
    ],
)
def test_rows_without_a_finite_loss(strategy, layout, bad, tokens_net, tokens):
    """Dropped, with their antithetic partners; the rest divides by what survived."""
    limit = float(tokens_net(tokens[0])[:, 0].detach().max()) + 1e-3
    chosen = perturbing(strategy, layout, tokens_net, TWO, brittle_loss(bad, limit))
    counts = torch.tensor([6, 0, 10, 4])
    alive = [surviving_queries(tokens_net, chosen, site, *tokens, counts.tolist()) for site in chosen.sites]
    lost = [20 - sum(each) for each in alive]
    assert 0 < sum(lost) < 40, "the test needs lost rows and survivors"
    assert_equals_reference(tokens_net, chosen, *tokens, counts)
    assert [chosen.meter.sites[site.name].lost for site in chosen.sites] == lost
    chosen.draw = 0
    seen = chosen.estimate(chosen.clean_pass(*tokens), counts, traces=True).observation
    for site, trace, queries, survivors in zip(chosen.sites, seen.trace, seen.queries, alive, strict=True):
        expected = reference_traces(tokens_net, chosen, site, *tokens, counts.tolist())
        torch.testing.assert_close(trace, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
        assert queries.tolist() == survivors


@SILENT
@pytest.mark.parametrize(("strategy", "layout"), ALL)
def test_a_sample_without_a_finite_clean_loss_contributes_nothing(strategy, layout, tokens_net, tokens):
    """Its activations are not finite either, and must not reach the others."""
    x, y = tokens[0].clone(), tokens[1]
    x[2, 1, 0] = math.nan
    chosen = perturbing(strategy, layout, tokens_net, TWO)
    estimate = chosen.estimate(chosen.clean_pass(x, y), torch.tensor([6, 0, 10, 4]))
    assert (estimate.lost, estimate.silent_samples) == (20, 2)
    x[2] = 0.0
    assert_gradients(tokens_net, chosen, x, y, torch.tensor([6, 0, 0, 4]), gradients(tokens_net), draw=0)


@SILENT
@pytest.mark.parametrize(
    ("strategy", "layout"), [("leave_one_out", "shared"), ("spsa", "factored"), ("spsa", "guided")]
)
def test_the_weight_of_lost_pilots_goes_to_the_other_queries(strategy, layout, tokens_net, tokens):
    """And that of the others to the pilots."""
    x, y = tokens
    limit = float(tokens_net(x)[:, 0].detach().max()) + 0.1
    sites, loss = [{"stages": ["0", "4"], "sigma": 1.0, "queries_per_sample": 10}], brittle_loss(math.nan, limit)
    chosen = perturbing(strategy, layout, tokens_net, sites, loss, pilots=PilotSpec("lowest", 4))
    counts, some = torch.tensor([2, 2, 4, 6]), set()
    for draw in range(8):
        clean = chosen.clean_pass(x, y)
        (survivors,) = chosen.pilot_traces(clean).queries
        some |= set((survivors > (1 if strategy == "leave_one_out" else 0)).tolist())
        chosen.estimate(clean, counts)
        assert_gradients(tokens_net, chosen, x, y, counts, gradients(tokens_net), draw=draw, pilots=4)
    assert some == {True, False}, "the test needs samples that lose all pilots and samples that do not"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("strategy", "passes"), [("spsa", 1), ("baseline", 1), ("forward", 2)])
def test_a_query_costs_its_site_and_all_above_it(strategy, passes, layout, tokens_net, tokens):
    """Twice that with a tangent."""
    chosen = perturbing(strategy, layout, tokens_net, TWO)
    estimated(chosen, *tokens, torch.full((4,), 2))
    products = {"0": 3 * 3 * 4, "2": 3 * 4 * 3, "4": 3 * 2}
    share = (products["2"] + products["4"]) / sum(products.values())
    costs = {name: count.forward_equivalents for name, count in chosen.meter.sites.items()}
    # Activation-guided directions need the inputs of the site's layers: one more pass of each sample through the site.
    once = 4 if chosen.activation_guided else 0
    once += 8 * passes * (layout == "flipout")  # one more product a query in each layer of the site
    expected = {"0..1": 8 * passes + once * (1 - share), "2..4": (8 * passes + once) * share}
    assert costs == pytest.approx({"clean": 4, **expected})


def test_activation_guided_directions_cost_a_pass_at_the_sites_that_have_them(tokens_net, tokens):
    shared = [{**site, "directions": "shared"} for site in TWO]
    chosen = perturbing("spsa", "guided", tokens_net, [shared[0], TWO[1]])
    estimated(chosen, *tokens, torch.full((4,), 2))
    costs = {name: count.forward_equivalents for name, count in chosen.meter.sites.items()}
    share = (3 * 4 * 3 + 3 * 2) / (3 * 3 * 4 + 3 * 4 * 3 + 3 * 2)
    assert costs == pytest.approx({"clean": 4, "0..1": 8, "2..4": (8 + 4) * share})
    with pytest.raises(SettingError, match=r"activation_guided = True: has no effect: all samples share"):
        perturbing("spsa", "guided", tokens_net, shared)
    with pytest.raises(SettingError, match=r"rank = 2: has no effect: all samples share"):
        bound(SPSA, tokens_net, squared_error, shared, layout="factored", rank=2)


def test_scales_are_the_mean_weights(tokens_net, tokens):
    """Traces are in the parameters' own units, and directions the same in all of them."""
    chosen = perturbing("spsa", "factored", tokens_net, TWO)
    metric = {name: torch.rand_like(p) for name, p in tokens_net.named_parameters()}
    clean = chosen.clean_pass(*tokens)
    statistics = chosen.sample_statistics(clean, {"scale", "preconditioned_scale"}, metric)
    assert statistics.scale.tolist() == [1.0, 1.0]
    means = [torch.cat([metric[name].flatten() for name in site.parameters]).mean() for site in chosen.sites]
    torch.testing.assert_close(statistics.preconditioned_scale, torch.stack(means).detach())


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", KINDS)
def test_weights_of_bfloat16(strategy, layout, tokens):
    """Parameters that belong to no layer stay in their own precision when they are moved."""
    net = shaken(nn.Sequential(nn.Linear(3, 3), Prompted(), TokenMean(), nn.Linear(3, 2))).float()
    sites = [{"stages": ["0", "3"], **SIGMA, "sigma": 0.1}]
    x, y = tokens[0].float(), tokens[1].float()
    counts = torch.full((4,), 32)
    _, exact = estimated(perturbing(strategy, layout, net, sites), x, y, counts)
    half = copy.deepcopy(net).to(torch.bfloat16)
    _, rounded = estimated(perturbing(strategy, layout, half, sites), x.bfloat16(), y, counts)
    for name, gradient in exact.items():
        assert rounded[name].dtype == torch.bfloat16
        assert (rounded[name].float() - gradient).norm() < 0.15 * gradient.norm(), name


def test_the_width_of_the_noise_is_compared_without_a_copy_of_the_weights():
    """A step has the memory of inference, the first one too. Over all weights the rms is sqrt(2.5)."""
    weights = [torch.full((500, 20), 1.0), torch.full((10_000,), 2.0), torch.zeros(0)]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        least = precision.Resolution("", 0.5, 4.0).least_width(*weights)
    assert least == pytest.approx(2.0 * math.sqrt(2.5))
    assert sum(max(0, event.self_cpu_memory_usage) for event in watched.key_averages()) < 4_000  # bytes, of 80,000


@pytest.mark.parametrize(
    ("kind", "settings", "problem"),
    [
        (EvolutionStrategies, {"variant": "antithetic"}, r"variant = 'antithetic': is the estimator SPSA\."),
        (SPSA, {"layout": "dense"}, r"layout = 'dense': is not one of the choices\. Choose from shared, factored"),
        (SPSA, {"rank": 2}, r"rank = 2: has no effect here.*layout: factored"),
        (SPSA, {"layout": "factored", "rank": 0}, r"rank = 0: must be 1 or more"),
        (SPSA, {"activation_guided": True}, r"activation_guided = True: has no effect here.*layout: factored"),
        (SPSA, {"span": 2}, r"span = 2: has no effect here.*activation_guided: true"),
        (SPSA, {"layout": "factored", "span": 2}, r"span = 2: has no effect here.*activation_guided: true"),
        (SPSA, {"layout": "factored", "activation_guided": True, "span": -1}, r"span = -1: must be 0 or more"),
        (SPSA, {"sigma": -1.0}, r"sigma = -1.0: must be 0 or more"),
        (EvolutionStrategies, {"sigma": math.nan}, r"sigma = nan: must be 0"),
        (EvolutionStrategies, {"sigma": math.inf}, r"sigma = inf: must be 0"),
        (WeightForwardMode, {"rank": 2}, r"rank = 2: has no effect here"),
        (WeightForwardMode, {"layout": "dense"}, r"layout = 'dense'"),
    ],
)
def test_settings_that_are_refused(kind, settings, problem):
    with pytest.raises(SettingError, match=r"^model\.strategy\." + problem):
        kind(**settings)


@pytest.mark.parametrize(
    ("site", "setting", "problem"),
    [
        ({"kind": "linear"}, "kind", r"this strategy perturbs parameters.*block or group.*LikelihoodRatio"),
        ({"active_tokens": False}, "active_tokens", r"no effect where parameters are perturbed"),
    ],
)
@pytest.mark.parametrize("strategy", KINDS)
def test_sites_that_are_refused(strategy, site, setting, problem, tokens_net):
    with pytest.raises(SettingError, match=problem) as error:
        perturbing(strategy, "shared", tokens_net, [{**WHOLE[0], **site}])
    assert error.value.setting == f"model.strategy.sites[0].{setting}"


class Tied(nn.Module):
    """Two modules with one weight, whose first name is that of either."""

    def __init__(self, first: str) -> None:
        super().__init__()
        for kind in ("embedding", "layer") if first == "embedding" else ("layer", "embedding"):
            self.add_module(kind, nn.Embedding(5, 3) if kind == "embedding" else nn.Linear(3, 5, bias=False))
        self.get_submodule("layer" if first == "embedding" else "embedding").weight = self.get_submodule(first).weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.embedding(x)).mean(1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first", ["embedding", "layer"])
def test_tied_weights_within_a_stage(first, layout, tokens):
    net = shaken(nn.Sequential(Tied(first), nn.Linear(5, 2)))
    sites = [{"stages": ["0", "1"], **SIGMA}]
    if layout == "shared":
        x = torch.tensor([[1, 2], [2, 4], [0, 0], [3, 1]])
        for strategy in ("spsa", "forward"):
            assert_equals_reference(net, perturbing(strategy, layout, net, sites), x, tokens[1], uneven("spsa"))
        return
    name = rf"'0.{first}.weight'"
    with pytest.raises(SettingError, match=rf"{name} belongs to two modules.*freeze: \[{name}\].*layout: shared"):
        perturbing("spsa", layout, net, sites)
    with pytest.raises(SettingError, match=rf"{name} belongs to two modules.*write directions: shared at this site"):
        perturbing("spsa", "shared", net, [{**sites[0], "directions": "own"}])


def test_a_guided_convolution_of_several_groups_is_refused():
    net = convolutional()
    with pytest.raises(SettingError, match=r"activation_guided = True: 2 is a convolution of several groups"):
        perturbing("spsa", "guided", net, [{"stages": ["0", "6"], **SIGMA}])
