import math

import pytest
import torch
from torch import Tensor
from torchmetrics.functional import spearman_corrcoef

from flops_lightning.allocators.held_back import held_back_ratios, rank_correlation
from flops_lightning.allocators.objective import equal_objective, objective, optimal_shares
from flops_lightning.allocators.rounding import largest_remainder, water_fill
from flops_lightning.protocol import TraceObservation
from tests.allocators.draws import estimates, normal, traces

EXACTLY = {"rtol": 1e-12, "atol": 0.0}


def exact(trace: Tensor) -> TraceObservation:
    return TraceObservation(trace, torch.full_like(trace, 1e7))


def test_known_traces_give_the_ratios_of_the_objectives() -> None:
    trace, counts = traces(2, 6), torch.tensor([[1, 2, 3, 4, 5, 9], [7, 1, 1, 1, 1, 1]])
    ratios = held_back_ratios(exact(trace), counts)
    for i in range(2):
        total = int(counts[i].sum())
        used, equal = objective(trace[i], counts[i]), equal_objective(trace[i], total)
        least = objective(trace[i], water_fill(optimal_shares(trace[i]), total))
        torch.testing.assert_close(ratios.over_equal[i], used / equal, **EXACTLY)
        torch.testing.assert_close(ratios.over_optimal[i], used / least, rtol=1e-6, atol=0.0)


def test_held_back_traces_tell_the_truth_where_those_that_made_the_counts_flatter() -> None:
    batch, batches = 200, 200
    trace = traces(batches, batch)
    guess = estimates(trace, 3, seed=1)
    counts = torch.stack([largest_remainder(g.sqrt(), 20 * batch, minimum=2, multiple=1) for g in guess])
    seen = TraceObservation(estimates(trace, counts - 1, seed=2), counts)
    ratios = held_back_ratios(seen, counts)
    truth = held_back_ratios(exact(trace), counts)

    def off(estimate: Tensor, reference: Tensor) -> tuple[float, float]:
        difference = estimate - reference
        return float(difference.mean()), float(difference.std()) / math.sqrt(batches)

    error, standard_error = off(ratios.over_equal, truth.over_equal)
    assert abs(error) < 4 * standard_error
    assert standard_error < 0.004
    # Corrected to first order only: right to a percent.
    error, standard_error = off(ratios.over_optimal, truth.over_optimal)
    assert abs(error) < 0.01 * float(truth.over_optimal.mean()) + 4 * standard_error
    by_their_own = held_back_ratios(exact(guess), counts)
    assert float(by_their_own.over_equal.mean()) < float(truth.over_equal.mean()) - 0.1


def test_reused_pilots_count_with_their_weight() -> None:
    trace, counts = traces(2, 4), torch.tensor([[2, 4, 6, 4], [8, 8, 8, 8]])
    pilots = torch.tensor([[4.0, 4.0, 4.0, 0.0], [0.0, 0.0, 0.0, 0.0]])  # the fourth sample lost its own
    weight = torch.tensor([[0.1, 0.5, 0.3, 0.7], [0.0, 0.2, math.nan, 1.0]]).double()
    ratios = held_back_ratios(exact(trace), counts, pilots=pilots, pilot_weight=weight)
    w, n, a = weight[0, :3], 4.0, counts[0, :3]
    variance = trace[0, :3] * (w**2 / n + (1 - w) ** 2 / a)
    used = variance.sum() + trace[0, 3] / 4
    torch.testing.assert_close(ratios.over_equal[0], used / (trace[0].sum() / (4.0 + n)), **EXACTLY)
    torch.testing.assert_close(ratios.over_equal[1], torch.tensor(1.0).double(), **EXACTLY)


def test_pilots_that_are_thrown_away_are_paid_all_the_same() -> None:
    trace, counts, pilots = traces(1, 4), torch.tensor([[3, 3, 3, 3]]), torch.full((1, 4), 1.0)
    ratios = held_back_ratios(exact(trace), counts, pilots=pilots, pilots_reused=False)
    torch.testing.assert_close(ratios.over_equal, torch.full((1,), 4 / 3, dtype=torch.float64), **EXACTLY)
    # Reused without a weight, they have their share of the budget.
    counts = torch.tensor([[1, 5, 5, 1]])
    share, given = (held_back_ratios(exact(trace), counts, pilots=pilots, pilot_weight=w) for w in (None, pilots / 4))
    torch.testing.assert_close(share.over_equal, given.over_equal, **EXACTLY)


def test_a_sample_left_with_its_pilots_is_worth_those() -> None:
    trace, counts, pilots = traces(1, 3), torch.tensor([[0, 5, 7]]), torch.full((1, 3), 4.0)
    ratios = held_back_ratios(exact(trace), counts, pilots=pilots, pilot_weight=torch.full((1, 3), 0.5))
    used = trace[0, 0] / 4 + trace[0, 1] * (0.25 / 4 + 0.25 / 5) + trace[0, 2] * (0.25 / 4 + 0.25 / 7)
    torch.testing.assert_close(ratios.over_equal[0], used / (trace[0].sum() / 8), **EXACTLY)


def test_samples_that_show_no_trace_are_left_out() -> None:
    trace, counts = traces(1, 5), torch.tensor([[1, 9, 12, 17, 1]])
    hidden = trace.clone()
    hidden[0, [0, 4]] = math.nan
    ratios = held_back_ratios(exact(hidden), counts)
    middle = trace[0, 1:4]
    used = (middle / counts[0, 1:4]).sum()
    # Against what they would have had in equal parts of everything, and against the best use of what they had.
    torch.testing.assert_close(ratios.over_equal[0], used / (middle.sum() / 8.0), **EXACTLY)
    torch.testing.assert_close(
        ratios.over_optimal[0], used / objective(middle, water_fill(optimal_shares(middle), 38.0)), rtol=1e-6, atol=0
    )


def test_antithetic_pairs_are_one_degree_of_freedom_each() -> None:
    counts = torch.full((400, 60), 8)
    seen = estimates(torch.ones(400, 60, dtype=torch.float64), 3, seed=3)
    of_pairs = held_back_ratios(TraceObservation(seen, counts, unit=2), counts).over_optimal
    # Equal traces: there is nothing to gain, whatever the noise shows. The floor of the gain at 1 keeps it above.
    assert abs(float(of_pairs.mean()) - 1.0) < 0.02
    taken_for_singles = held_back_ratios(TraceObservation(seen, counts), counts).over_optimal
    assert float(taken_for_singles.mean()) > 1.08


def test_sites_with_nothing_to_compare_have_no_ratio() -> None:
    trace = torch.stack([torch.zeros(3), torch.full((3,), math.nan), torch.ones(3)]).double()
    ratios = held_back_ratios(exact(trace), torch.tensor([[2, 3, 4]]))
    assert ratios.over_equal.isnan().tolist() == [True, True, False]
    assert ratios.over_optimal.isnan().tolist() == [True, True, False]
    # A noisy sample without queries makes J infinite.
    assert held_back_ratios(exact(traces(1, 3)), torch.tensor([[0, 4, 5]])).over_equal.tolist() == [math.inf]


# Rank correlation


@pytest.mark.parametrize("levels", [0, 2])
def test_every_line_agrees_with_torchmetrics(levels: int) -> None:
    a = (normal(5, 40) * levels).round() if levels else normal(5, 40)
    b = (a + 2 * normal(5, 40, seed=1)).round() if levels else a + normal(5, 40, seed=1)
    expected = torch.stack([spearman_corrcoef(x, y) for x, y in zip(a, b, strict=True)]).double()
    torch.testing.assert_close(rank_correlation(a, b), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(rank_correlation(a, b[0]), torch.stack([rank_correlation(line, b[0]) for line in a]))
    assert float(expected.std()) > 0.01


def test_pairs_that_are_not_finite_are_left_out() -> None:
    a, b = (2 * normal(2, 20)).round(), normal(2, 20, seed=1)
    kept = torch.ones(20, dtype=torch.bool)
    kept[[0, 3, 4, 11]] = False
    a[:, 0], a[:, 3], b[:, 4], b[:, 11] = math.inf, math.nan, -math.inf, math.nan
    expected = rank_correlation(a[:, kept], b[:, kept])
    assert torch.equal(rank_correlation(a, b), expected)
    assert bool((expected.abs() < 1).all())


def test_there_is_none_of_two_pairs_or_of_constants() -> None:
    for a, b in (
        ([1.0, 2.0], [1.0, 2.0]),
        ([1.0, 2.0, math.nan, 4.0], [1.0, 2.0, 3.0, math.inf]),
        ([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, math.nan]),
    ):
        assert math.isnan(rank_correlation(torch.tensor(a), torch.tensor(b)))
