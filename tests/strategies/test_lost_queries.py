"""Queries with a non-finite loss: dropped with their partners, counted, and the rest divides by what survived."""

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.strategies import LikelihoodRatio, PilotSpec
from tests.reference.layouts import TOKEN_SITES
from tests.reference.likelihood_ratio import (
    assert_equals_reference,
    in_parameter_space,
    reference_gradient,
    reference_traces,
    surviving_queries,
)
from tests.reference.networks import (
    TokenMean,
    assert_entries,
    bound,
    brittle_loss,
    gradients,
    shaken,
    squared_error,
    token_network,
)

LAYOUTS = ("group", "linear", "together")
CASES = [
    (variant, layout)
    for variant in ("plain", "baseline", "leave_one_out", "antithetic")
    for layout in LAYOUTS
    if (variant, layout) != ("leave_one_out", "together")
]
COUNTS = [6, 0, 10, 4]
SILENT = pytest.mark.filterwarnings("ignore:.*lost every query")


class Fuse(nn.Module):
    """Lets nothing above a limit through: NaN instead, for the layers that follow to choke on."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x > self.limit, math.nan, x)


def lost_by_reference(module: nn.Module, strategy: LikelihoodRatio, x: Tensor, y: Tensor) -> list[int]:
    """Lost queries of each site."""
    return [sum(COUNTS) - sum(surviving_queries(module, strategy, site, x, y, COUNTS)) for site in strategy.sites]


@SILENT
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, "inside the network"])
@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_lost_rows(variant, layout, bad, tokens_net, tokens):
    """In the loss, or below it: the inputs of later layers are NaN there, and zero times NaN is not zero."""
    net, (x, y) = tokens_net, tokens
    if bad == "inside the network":
        loss, fuse = squared_error, Fuse(float(net[:3](x).detach().max()) + 0.4)
        net = nn.Sequential(*net[:3], nn.Sequential(fuse, net[3]), net[4])
    else:
        loss = brittle_loss(bad, float(net(x)[:, 0].detach().max()) + 0.1)
    strategy = bound(net, loss, TOKEN_SITES[layout], variant=variant, chunk_rows=7)
    lost = lost_by_reference(net, strategy, x, y)
    assert 0 < sum(lost) < sum(COUNTS) * len(lost), "the test needs lost rows and survivors"
    assert_equals_reference(net, strategy, x, y, torch.tensor(COUNTS))
    assert [strategy.meter.sites[site.name].lost for site in strategy.sites] == lost
    strategy.draw = 0
    estimate = strategy.estimate(strategy.clean_pass(x, y), torch.tensor(COUNTS), traces=True)
    assert strategy.meter.total().lost == sum(lost) + estimate.lost == 2 * sum(lost)
    seen = estimate.observation
    for site, trace, queries in zip(strategy.sites, seen.trace, seen.queries, strict=True):
        if not site.together:
            expected = reference_traces(net, strategy, site, x, y, COUNTS, in_parameters=in_parameter_space(site))
            torch.testing.assert_close(trace, expected, rtol=1e-9, atol=1e-9, equal_nan=True)
            assert queries.tolist() == surviving_queries(net, strategy, site, x, y, COUNTS)


@SILENT
def test_jointly_perturbed_layers_pay_for_running_again(tokens_net, tokens):
    limit = float(tokens_net(tokens[0])[:, 0].detach().max()) + 0.1
    strategy = bound(tokens_net, brittle_loss(math.nan, limit), TOKEN_SITES["together"])
    (lost,) = lost_by_reference(tokens_net, strategy, *tokens)
    estimate = strategy.estimate(strategy.clean_pass(*tokens), torch.tensor(COUNTS))
    assert estimate.lost == lost
    assert estimate.queries == sum(COUNTS) + (sum(COUNTS) - lost)
    assert strategy.meter.total().queries == estimate.queries


def doomed_loss(output: Tensor, target: Tensor) -> Tensor:
    """Squared error; NaN as soon as a marked sample's output is not the clean one. Target: y, mark, clean output."""
    moved = squared_error(output, target[:, 3:]) > 1e-20
    return torch.where(moved & (target[:, 2] > 0), math.nan, squared_error(output, target[:, :2]))


def doomed(net: nn.Module, x: Tensor, y: Tensor, marks: list[float]) -> Tensor:
    return torch.cat([y, torch.tensor(marks, dtype=y.dtype)[:, None], net(x).detach()], dim=1)


@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_a_sample_that_loses_every_query_contributes_nothing(variant, layout, tokens_net, tokens):
    x, y = tokens
    y = doomed(tokens_net, x, y, [0, 1, 1, 0])
    strategy = bound(tokens_net, doomed_loss, TOKEN_SITES[layout], variant=variant, chunk_rows=7)
    with pytest.warns(RuntimeWarning, match=rf"^{len(strategy.sites)} \(sample, site\) pairs lost every query"):
        assert_equals_reference(tokens_net, strategy, x, y, torch.tensor(COUNTS))
    clean = strategy.clean_pass(x, y)
    with pytest.warns(RuntimeWarning, match="sigma"):
        estimate = strategy.estimate(clean, torch.tensor(COUNTS))
    # Sample 1 is marked too, but has no query that it could lose.
    assert estimate.silent_samples == len(strategy.sites)
    assert estimate.lost == 10 * len(strategy.sites)
    assert not estimate.lost_batch


@SILENT
@pytest.mark.parametrize(("variant", "layout"), CASES)
def test_a_sample_without_a_finite_clean_loss_contributes_nothing(variant, layout, tokens_net, tokens):
    """Its activations are not finite either, and must not reach the others through the Jacobian."""
    x, y = tokens
    x = x.clone()
    x[2, 1, 0] = math.nan
    strategy = bound(tokens_net, squared_error, TOKEN_SITES[layout], variant=variant, chunk_rows=7)
    clean = strategy.clean_pass(x, y)
    estimate = strategy.estimate(clean, torch.tensor(COUNTS))
    assert estimate.lost == 10 * len(strategy.sites)
    assert not clean.loss[2].isfinite()
    found = gradients(tokens_net)
    rest = [0, 1, 3]
    for site in strategy.sites:
        # The reference on the other samples, each at its own place of the batch.
        finite = x.clone()
        finite[2] = 0.0
        counts = [0 if b == 2 else count for b, count in enumerate(COUNTS)]
        assert_entries(found, reference_gradient(tokens_net, strategy, site, finite, y, counts), rtol=1e-9, atol=1e-9)
    assert estimate.loss[rest].isfinite().all()


def test_a_site_that_loses_everything_leaves_its_gradient_alone(tokens):
    net = shaken(nn.Sequential(nn.Linear(3, 4), Fuse(1e3), nn.Linear(4, 3), TokenMean(), nn.Linear(3, 2)))
    sites = [{"stages": ["0"], "sigma": 1e9}, {"stages": ["2"], "sigma": 1e-3}, {"stages": ["4"], "sigma": 1e-3}]
    strategy = bound(net, squared_error, sites)
    before = net[0].weight.grad = torch.ones_like(net[0].weight)
    with pytest.warns(RuntimeWarning, match=r"^4 \(sample, site\) pairs"):
        estimate = strategy.estimate(strategy.clean_pass(*tokens))
    assert net[0].weight.grad is before
    assert (before == 1).all()
    assert net[0].bias.grad is None
    assert net[2].weight.grad.abs().min() > 0
    assert (estimate.lost, estimate.silent_samples, estimate.lost_batch) == (80, 4, False)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_lost_batch_touches_no_gradient(layout, tokens_net, tokens):
    x, y = tokens
    strategy = bound(tokens_net, doomed_loss, TOKEN_SITES[layout], chunk_rows=7)
    before = tokens_net[0].weight.grad = torch.ones_like(tokens_net[0].weight)
    clean = strategy.clean_pass(x, doomed(tokens_net, x, y, [1, 1, 1, 1]))
    with pytest.warns(RuntimeWarning, match="lost every query"):
        estimate = strategy.estimate(clean)
    assert estimate.lost_batch
    assert estimate.lost == 80 * len(strategy.sites)
    assert tokens_net[0].weight.grad is before
    assert (before == 1).all()
    assert all(p.grad is None for name, p in tokens_net.named_parameters() if name != "0.weight")
    assert strategy.draw == 1, "the next batch must draw other noise"


def test_leave_one_out_warns_of_a_sample_with_a_single_survivor(tokens_net, tokens):
    """There is nothing to centre the one survivor with, so that sample is silent too."""
    strategy = bound(tokens_net, squared_error, [{"stages": ["0", "4"], "kind": "block"}], variant="leave_one_out")
    clean = strategy.clean_pass(*tokens)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        losses = squared_error(output, target)
        losses[1:3] = math.nan
        return losses

    strategy.loss = loss
    with pytest.warns(RuntimeWarning, match="contribute nothing"):
        estimate = strategy.estimate(clean, torch.tensor([3, 3, 3, 3]))
    assert estimate.silent_samples == len(strategy.sites)


@SILENT
def test_a_difference_too_large_for_float32_is_lost(tokens):
    """The loss is still finite, divided by sigma it is not."""
    net = token_network().float()
    x, y = tokens[0].float(), tokens[1].float()
    strategy = bound(net, squared_error, [{"stages": ["0", "4"], "kind": "block", "sigma": 1e-2}])
    clean = strategy.clean_pass(x, y)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        losses = squared_error(output, target)
        losses[0] = 3e38
        return losses

    strategy.loss = loss
    estimate = strategy.estimate(clean)
    assert estimate.lost == len(strategy.sites)
    assert all(p.grad.isfinite().all() for p in net.parameters())


@SILENT
@pytest.mark.parametrize(
    ("variant", "pilots", "counts"),
    [("baseline", 2, [1, 1, 2, 3]), ("leave_one_out", 2, [2, 2, 2, 3]), ("antithetic", 4, [2, 2, 4, 6])],
)
def test_the_weight_of_lost_pilots_goes_to_the_other_queries(variant, pilots, counts, tokens_net, tokens):
    """And that of the others to the pilots; a lone leave-one-out query counts as lost."""
    x, y = tokens
    limit = float(tokens_net(x)[:, 0].detach().max()) + 0.1
    site = {"stages": ["0", "4"], "kind": "block", "sigma": 1.0, "queries_per_sample": 10}
    strategy = bound(tokens_net, brittle_loss(math.nan, limit), [site], variant=variant, pilots=PilotSpec("2", pilots))
    some = {"trace": False, "no trace": False}
    for draw in range(8):
        clean = strategy.clean_pass(x, y)
        (trace,) = strategy.pilot_traces(clean).trace[[site.name == "2" for site in strategy.sites]]
        strategy.estimate(clean, torch.tensor(counts))
        found = gradients(tokens_net)
        (place,) = [site for site in strategy.sites if site.name == "2"]
        expected = reference_gradient(tokens_net, strategy, place, x, y, counts, draw=draw, pilots=pilots)
        assert_entries(found, expected, rtol=1e-9, atol=1e-9)
        some["trace"] |= bool(trace.isfinite().any())
        some["no trace"] |= bool(trace.isnan().any())
    assert some == {"trace": True, "no trace": True}, "the test needs samples that lose pilots and samples that do not"


def test_pilots_stand_in_for_a_site_that_lost_all_its_other_queries(tokens_net, tokens):
    """What the pilots found is used, so no sample is silent and the step counts."""
    site = {"stages": ["0", "4"], "kind": "block", "queries_per_sample": 6}
    strategy = bound(tokens_net, squared_error, [site], pilots=PilotSpec("2", 4))
    clean = strategy.clean_pass(*tokens)
    strategy.pilot_traces(clean)
    strategy.loss = lambda output, target: squared_error(output, target) * math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        estimate = strategy.estimate(clean, sites=["2"])
    assert (estimate.lost, estimate.silent_samples, estimate.lost_batch) == (8, 0, False)
    found = gradients(tokens_net)
    strategy.loss = squared_error
    (place,) = [site for site in strategy.sites if site.name == "2"]
    assert_entries(found, reference_gradient(tokens_net, strategy, place, *tokens, [4] * 4), rtol=1e-9, atol=1e-9)


class Direction(nn.Module):
    """Length one; its derivative at zero does not exist."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)


@SILENT
@pytest.mark.parametrize("kind", ["block", "linear"])
def test_whatever_stands_in_for_a_lost_sample_is_harmless(kind, tokens):
    """A sample of zeros would not be: this network has no gradient there."""
    net = shaken(nn.Sequential(nn.Sequential(Direction(), nn.Linear(3, 3)), TokenMean(), nn.Linear(3, 2)))
    x, y = tokens[0].clone(), tokens[1]
    x[1] = math.nan
    strategy = bound(net, squared_error, [{"stages": ["0", "2"], "kind": kind}])
    strategy.estimate(strategy.clean_pass(x, y))
    assert all(p.grad.isfinite().all() for p in net.parameters())
