"""Samples that are drawn: estimates divided by the probability are unbiased, and their variance is as given.

Reference: Horvitz and Thompson, 1952; the formula stands in :mod:`flops_lightning.allocators.inclusion`.
"""

import pytest
import torch

from flops_lightning.allocators import EqualAllocator, QueryBudget, SampleStatistics
from flops_lightning.allocators.inclusion import draw_counts
from flops_lightning.errors import SettingError
from flops_lightning.strategies import SPSA, EvolutionStrategies, LikelihoodRatio, PilotSpec
from tests.reference.layouts import TOKEN_SITES
from tests.reference.networks import autograd_gradient, gradients, squared_error, token_network
from tests.reference.networks import bound_to as bound
from tests.reference.smoothed import Sampled, flat

SITE = [{"stages": ["2"], "kind": "linear", "sigma": 1e-3, "queries_per_sample": 4}]


def drawn_estimates(strategy, x, y, expected, *, draws):
    """Estimates with counts that are drawn anew each time."""
    generator, found = torch.Generator().manual_seed(1), []
    for _ in range(draws):
        counts, inclusion = draw_counts(expected, generator, unit=strategy.unit)
        strategy.estimate(strategy.clean_pass(x, y), counts, inclusion=inclusion)
        grads = gradients(strategy.network.module)
        found.append(flat([grads[name] for name in strategy.sites[0].parameters]))
    return Sampled(torch.stack(found))


def problem(kind=LikelihoodRatio, **settings):
    net = token_network()
    net.requires_grad_(False)
    net.get_submodule("2").requires_grad_(True)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(8, 3, 3, generator=generator, dtype=torch.float64)
    y = net(x).detach() + torch.linspace(0.5, 4.0, 8)[:, None] * torch.randn(8, 2, generator=generator).double()
    site = [{**SITE[0], "kind": "linear" if kind is LikelihoodRatio else "group"}]
    return bound(kind, net, squared_error, site, **settings), x, y


EXPECTED = torch.tensor([0.25, 0.5, 0.75, 1.0, 1.5, 0.5, 2.0, 0.5], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        *((LikelihoodRatio, {"variant": variant}) for variant in ("baseline", "antithetic", "leave_one_out")),
        *((EvolutionStrategies, {"variant": variant}) for variant in ("baseline", "leave_one_out")),
        *((SPSA, {"layout": layout}) for layout in ("shared", "factored")),
    ],
)
def test_each_sample_that_has_queries_counts_by_the_inverse_of_its_probability(kind, settings) -> None:
    counts, inclusion = torch.tensor([2, 0, 4, 2, 0, 0, 2, 4]), torch.tensor([0.5, 0.1, 1, 0.25, 0.1, 0.1, 0.8, 1])

    def gradient(counts, **given):
        strategy, x, y = problem(kind, **settings)
        strategy.estimate(strategy.clean_pass(x, y), counts, **given)
        return flat([g for g in gradients(strategy.network.module).values() if g is not None])

    alone = [gradient(counts * (torch.arange(8) == b)) / inclusion[b] for b in counts.nonzero()[:, 0]]
    torch.testing.assert_close(gradient(counts, inclusion=inclusion[None]), sum(alone))


@pytest.mark.statistical_heavy
@pytest.mark.timeout(1500)
def test_the_slope_is_one_and_the_variance_that_of_horvitz_and_thompson() -> None:
    strategy, x, y = problem()
    exact = autograd_gradient(strategy.network.module, squared_error, x, y)
    exact = flat([exact[name] for name in strategy.sites[0].parameters])
    sampled = drawn_estimates(strategy, x, y, EXPECTED, draws=32_000)
    slopes = sampled.draws @ exact / (exact @ exact)
    error = float(slopes.std()) / 32_000**0.5
    assert error <= 0.02
    assert abs(float(slopes.mean()) - 1) <= 4 * error
    # With each sample's own gradient and trace, from autograd and from many queries.
    own = [autograd_gradient(strategy.network.module, squared_error, x[i : i + 1], y[i : i + 1]) for i in range(8)]
    squares = torch.stack([sum(g.square().sum() for g in each.values() if g is not None) for each in own])
    seen = strategy.observe_traces(strategy.clean_pass(x, y), torch.full((8,), 20_000), first_query=10**6)
    inclusion = EXPECTED.clamp(max=1.0)
    queries = torch.tensor([1, 1, 1, 1, 4 / 3, 1, 2, 1])  # one or two for 1.5: 1 / A is 3/4 on average
    predicted = ((seen.trace[0] / queries + squares) / inclusion - squares).sum() / 64
    assert float(sampled.draws.var(0).sum()) == pytest.approx(float(predicted), rel=0.05)


def test_without_the_probability_it_is_biased() -> None:
    strategy, x, y = problem()
    exact = autograd_gradient(strategy.network.module, squared_error, x, y)
    exact = flat([exact[name] for name in strategy.sites[0].parameters])
    found = {}
    for given in (True, False):
        generator, slopes = torch.Generator().manual_seed(1), []
        for _ in range(400):
            counts, inclusion = draw_counts(EXPECTED / 4, generator, unit=1)
            weights = inclusion[None] if given else None
            strategy.estimate(strategy.clean_pass(x, y), counts, inclusion=weights)
            grads = gradients(strategy.network.module)
            present = [grads[n] for n in strategy.sites[0].parameters if grads[n] is not None]
            slopes.append(flat(present) @ exact / (exact @ exact) if present else torch.zeros(()).double())
        found[given] = torch.stack(slopes)
    error = {given: float(slopes.std()) / 20 for given, slopes in found.items()}
    assert abs(float(found[True].mean()) - 1) <= 4 * error[True]
    assert float(found[False].mean()) < 1 - 4 * error[False]


def test_one_query_is_enough_and_a_fraction_needs_an_allocator() -> None:
    def with_average(queries, **settings):
        strategy, x, y = problem(**settings)
        site = {**SITE[0], "queries_per_sample": queries}
        return bound(LikelihoodRatio, strategy.network.module, squared_error, [site], **settings), x, y

    single, x, y = with_average(1)
    assert single.estimate(single.clean_pass(x, y), traces=True).observation.trace.isfinite().all()
    half, x, y = with_average(0.5)
    assert half.budget == QueryBudget((0.5,), sites=("2",))
    clean = half.clean_pass(x, y)
    with pytest.raises(SettingError, match=r"queries_per_sample = 0.5.*QueryAllocatorCallback"):
        half.estimate(clean)
    allocation = EqualAllocator().allocate(SampleStatistics(loss=torch.ones(8)), half.budget)
    estimate = half.estimate(clean, allocation.counts, inclusion=allocation.inclusion)
    assert (estimate.queries, estimate.silent_samples) == (4, 0)
    for variant, message in (("leave_one_out", "no other query"), ("antithetic", "come in pairs")):
        with pytest.raises(SettingError, match=message):
            with_average(1, variant=variant)


def test_where_drawing_samples_makes_no_sense(tokens_net, tokens) -> None:
    ones = torch.ones(1, 8, dtype=torch.int64)
    reused, x, y = problem(pilots=PilotSpec(sites=["2"], queries=2))
    clean = reused.clean_pass(x, y)
    reused.pilot_traces(clean)
    with pytest.raises(SettingError, match="reuses pilots"):
        reused.estimate(clean, ones, inclusion=0.5 * ones)
    together = bound(LikelihoodRatio, tokens_net, squared_error, TOKEN_SITES["together"])
    with pytest.raises(SettingError, match="together"):
        together.estimate(together.clean_pass(*tokens), ones[0, :4], inclusion=0.5 * ones[:, :4])
