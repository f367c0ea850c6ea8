import math
from dataclasses import dataclass

import pytest

from experiments import rates
from experiments.harness import RunFailedError
from experiments.rates import Choice, choose_rates, extended


@dataclass(frozen=True)
class Fake:
    late_loss: float


def near(best: float):
    """Runs by rate, with the least loss at ``best``, and the rates that were tried."""
    tried: list[float] = []
    return tried, lambda rate: tried.append(rate) or Fake(abs(math.log(rate / best)))


def everything(cells):
    return True


@pytest.mark.parametrize(
    ("grid", "below", "above"),
    [
        ([1e-3, 2e-3, 4e-3], 5e-4, 8e-3), ([3e-4, 1e-3, 3e-3], 1e-4, 1e-2), ([1e-3, 3e-3, 1e-2], 3e-4, 3e-2),
        ([1e-4, 3e-4, 1e-3, 3e-3], 3e-5, 1e-2), ([1.0, 5.0], 0.2, 25.0),
    ],
)  # fmt: skip
def test_a_grid_goes_on_as_it_began(grid, below, above):
    assert extended(grid, grid[0]) == [below, *grid]
    assert extended(grid, grid[-1]) == [*grid, above]
    assert len(grid) < 3 or extended(grid, grid[1]) == grid


@pytest.mark.parametrize(("best", "number"), [(2.0, 3), (4.0, 4), (16.0, 6), (0.2, 6)])
def test_the_best_rate_is_inside_of_the_grid(best, number):
    tried, cell = near(best)
    found = choose_rates({"a": cell}, {"a": (4.0, 1.0, 2.0)}, everything)
    assert found == {"a": Choice(min(tried, key=lambda rate: abs(math.log(rate / best))))}
    assert len(set(tried)) == number


def test_arms_are_tried_together_each_until_its_own_best_is_inside():
    rounds = []
    arms = {"near": near(2.0)[1], "far": near(8.0)[1], "single": near(1.0)[1]}
    grids = {"near": (1.0, 2.0, 4.0), "far": (1.0, 2.0, 4.0), "single": (7.0,)}
    found = choose_rates(arms, grids, lambda cells: rounds.append(len(cells)) or True)
    assert found == {"near": Choice(2.0), "far": Choice(8.0), "single": Choice(7.0)}
    assert rounds == [6, 1, 1]
    assert choose_rates(arms, grids, lambda cells: False) is None


def test_a_rate_at_the_edge_says_so_and_one_that_diverged_is_none(monkeypatch):
    monkeypatch.setattr(rates, "EXTENSIONS", 2)
    assert choose_rates({"a": near(1e9)[1]}, {"a": (1.0, 2.0)}, everything) == {"a": Choice(8.0, edge=True)}
    lost = {"a": lambda rate: Fake(math.inf if rate > 0.3 else rate)}
    assert choose_rates(lost, {"a": (1.0, 2.0)}, everything) == {"a": Choice(0.25, edge=True)}
    nothing = {"a": lambda rate: Fake(math.inf)}
    (choice,) = choose_rates(nothing, {"a": (1.0, 2.0)}, everything, required=False).values()
    assert math.isnan(choice.rate)
    with pytest.raises(RunFailedError, match=r"a diverged at every learning rate: 0\.25, 0\.5, 1, 2"):
        choose_rates(nothing, {"a": (1.0, 2.0)}, everything)
