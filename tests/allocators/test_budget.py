import itertools
import math

import pytest
import torch

from flops_lightning.allocators.budget import BudgetRule, BudgetSettings, best_averages
from flops_lightning.errors import SettingError
from flops_lightning.protocol import GradientObservation, QueryBudget, SampleStatistics

OWN = QueryBudget((4, 8), sites=("lower", "upper"))
COSTS = torch.tensor([0.9, 0.3])
TOLD = SampleStatistics(loss=torch.ones(16), counted_costs=COSTS, fixed_costs=torch.tensor([2.5, 1.5]))
IMPROVEMENT = {"rule": "improvement"}


def seen(noise: torch.Tensor, signal: float, averages: torch.Tensor, *, scale: float = 1.0) -> GradientObservation:
    """The expectation of what a step with these averages shows: ``noise`` is that of one query a sample."""
    squares = noise / averages
    share = squares / squares.sum()  # the signal is split like the noise
    return GradientObservation(scale * signal, scale * (squares + share * signal))


def test_the_averages_maximise_the_guaranteed_decrease_for_its_cost() -> None:
    noise, signal, fixed = torch.tensor([130.0, 50.0]).double(), 3.0, 4.0

    def decrease(averages: torch.Tensor) -> torch.Tensor:
        """Eq. 8 over the cost, with ``S = V + B |g|^2 = signal``, up to a factor."""
        return 1 / (signal + (noise / averages).sum()) / (fixed + (COSTS.double() * averages).sum())

    best = best_averages(noise, signal, COSTS, fixed).requires_grad_(True)
    (slope,) = torch.autograd.grad(decrease(best), best)
    torch.testing.assert_close(slope, torch.zeros(2).double(), rtol=0, atol=1e-12)
    grid = torch.cartesian_prod(*(torch.linspace(0.2, 3.0, 29).double() * n.item() for n in best))
    assert max(decrease(each) for each in grid) <= decrease(best) * (1 + 1e-9)
    # At the optimum noise is to signal as the cost of queries is to the cost without them.
    balance = (noise / best).sum() / signal, (COSTS.double() * best).sum() / fixed
    torch.testing.assert_close(*balance, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("price", "costs", "fixed", "curvature"), [("compute", COSTS, 4.0, 0.25), ("queries", torch.ones(2), 1.0, 1.0)]
)
def test_the_rule_finds_them_from_gradients_of_any_scale_and_budget(price, costs, fixed, curvature) -> None:
    noise, signal = torch.tensor([130.0, 50.0]), 3.0
    rule = BudgetRule({**IMPROVEMENT, "price": price, "least": 0.01, "noise_curvature": curvature})
    assert rule.choose(OWN, TOLD) is OWN
    for averages, scale in (([4.0, 8.0], 1.0), ([20.0, 2.0], 1e-6), ([1.0, 1.0], 1e3)):
        # Of such a scale that one query's mean square is the same.
        rule.observe(seen(noise, signal, torch.tensor(averages), scale=scale), torch.tensor(averages))
    chosen = rule.choose(OWN, TOLD)
    expected = best_averages(curvature * noise, signal, costs, fixed)
    torch.testing.assert_close(torch.tensor(chosen.queries_per_sample), expected.float(), rtol=1e-5, atol=0)
    assert chosen.site_names == OWN.site_names
    figures = rule.figures(chosen)
    assert figures["A"] == pytest.approx(sum(chosen.queries_per_sample) / 2)
    assert figures["T_over_S"] == pytest.approx(60, rel=1e-5)


def test_bounds_hold_where_signal_or_noise_is_missing_and_exact_sites_are_no_noise() -> None:
    averages = torch.tensor([4.0, 8.0])
    for along, expected in ((-1.0, 32.0), (2.0, 0.5)):
        rule = BudgetRule({**IMPROVEMENT, "least": 0.5, "most": 32.0})
        rule.observe(GradientObservation(along, torch.tensor([1.0, 1.0])), averages)
        assert rule.choose(OWN, TOLD).queries_per_sample == (expected,) * 2
    alone, beside = (BudgetRule(IMPROVEMENT) for _ in range(2))
    alone.observe(GradientObservation(1.0, torch.tensor([3.0, 1.0])), averages)
    beside.observe(GradientObservation(1.0, torch.tensor([3.0, 0.5]), exact_sq_norm=0.5), averages)
    assert float(alone._noise.sum() / alone._signal) > float(beside._noise.sum() / beside._signal) > 0
    for useless in (math.nan, math.inf):
        alone.observe(GradientObservation(useless, torch.tensor([1.0, 1.0])), averages)
    assert alone._weight == 1.0


def test_measurements_are_dense_at_first_and_their_mean_follows_the_run() -> None:
    rule = BudgetRule({**IMPROVEMENT, "every": 10, "window": 4})
    due = [step for step in range(400) if rule.due()]
    assert due[:10] == list(range(10))
    gaps = [b - a for a, b in itertools.pairwise(due)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == 10
    averages = torch.tensor([4.0, 8.0])
    for signal in [2.0] * 20 + [1.0] * 20:
        rule.observe(seen(torch.tensor([40.0, 40.0]), signal, averages), averages)
    assert rule.figures(OWN)["T_over_S"] == pytest.approx(40 * 2, rel=0.01)


def test_a_resumed_rule_goes_on_alike() -> None:
    averages, rule = torch.tensor([4.0, 8.0]), BudgetRule(IMPROVEMENT)
    for step in range(5):
        rule.due()
        rule.observe(seen(torch.tensor([40.0, 20.0]) * (step + 1), 1.0, averages), averages)
    again = BudgetRule(IMPROVEMENT)
    again.load_state_dict(rule.state_dict())
    for _ in range(30):
        assert rule.due() == again.due()
        assert rule.choose(OWN, TOLD) == again.choose(OWN, TOLD)
        for each in (rule, again):
            each.observe(seen(torch.tensor([30.0, 20.0]), 2.0, averages), averages)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "best"}, "budget.rule = 'best'"),
        ({"most": 32.0}, "budget.most = 32.0: has no effect with rule: fixed"),
        ({**IMPROVEMENT, "least": 0}, "budget.least = 0: must be a number above 0"),
        ({**IMPROVEMENT, "most": 0.5}, "is below least"),
        ({**IMPROVEMENT, "every": 0}, "budget.every = 0"),
        ({**IMPROVEMENT, "given_costs": [1.0]}, "does not go with price: compute"),
        ({**IMPROVEMENT, "price": "given"}, "does not go with price: given"),
        ({**IMPROVEMENT, "noise_curvature": 0}, "budget.noise_curvature = 0"),
        ({**IMPROVEMENT, "metric": "adam"}, "budget.metric = 'adam'"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(settings, message) -> None:
    with pytest.raises(SettingError, match=message):
        BudgetSettings(**settings).check()


def test_costs_that_do_not_fit_the_sites() -> None:
    observation, averages = GradientObservation(1.0, torch.tensor([3.0, 1.0])), torch.tensor([4.0, 8.0])
    given = BudgetRule({**IMPROVEMENT, "price": "given", "given_costs": [1.0], "given_fixed": 2.0})
    counted = BudgetRule(IMPROVEMENT)
    for rule, message in ((given, "there are 2 sites"), (counted, "needs `counted_costs`")):
        rule.observe(observation, averages)
        with pytest.raises(SettingError, match=message):
            rule.choose(OWN, SampleStatistics(loss=torch.ones(4)))
