"""Sites whose queries are made once for all samples keep the module's budget, whatever the allocator."""

import pytest
import torch

from flops_lightning.allocators import (
    BernoulliAllocator,
    CostAwareAllocator,
    EqualAllocator,
    GaussianAllocator,
    OptimalAllocator,
    TraceSettings,
)
from flops_lightning.allocators.budget import BudgetRule, BudgetSettings
from flops_lightning.allocators.cost_aware import cheapest_counts
from flops_lightning.errors import SettingError
from flops_lightning.protocol import GradientObservation, QueryBudget, SampleStatistics, TraceObservation

PILOTS = TraceSettings(source="pilots")
TRACES = torch.tensor([[1.0, 4.0, 9.0, 16.0], [5.0, 5.0, 5.0, 5.0]])
SHARED = QueryBudget((10, 6), shared=(False, True), sites=("image", "text"))
ALLOCATORS = {
    "equal": EqualAllocator(),
    "optimal": OptimalAllocator(traces=PILOTS),
    "gaussian": GaussianAllocator(traces=PILOTS, covariance="diagonal"),
    "bernoulli": BernoulliAllocator(traces=PILOTS),
}


def statistics(trace: torch.Tensor = TRACES) -> SampleStatistics:
    return SampleStatistics(loss=torch.tensor([0.1, 0.5, 1.5, 2.0]), trace=trace)


@pytest.mark.parametrize("name", ALLOCATORS)
def test_a_shared_line_keeps_its_budget_and_the_others_are_split_as_if_alone(name):
    found = ALLOCATORS[name].allocate(statistics(), SHARED).counts
    assert found[1].tolist() == [6] * 4
    assert int(found[0].sum()) == 40
    if name in ("equal", "optimal"):  # the others draw once a batch
        alone = ALLOCATORS[name].allocate(statistics(TRACES[:1]), QueryBudget((10,))).counts
        assert torch.equal(found[:1], alone)


def test_a_budget_of_shared_lines_alone_is_spent_as_it_is():
    found = OptimalAllocator(traces=PILOTS).allocate(statistics(TRACES[1:]), QueryBudget((6,), shared=(True,)))
    assert found.counts.tolist() == [[6] * 4]


def test_a_prediction_learns_from_the_other_lines_alone():
    learner, alone = (OptimalAllocator(traces=TraceSettings(source="prediction")) for _ in range(2))
    known = SampleStatistics(loss=torch.tensor([0.1, 0.5, 1.5, 2.0]), predictors={"output_gradient": TRACES[0]})
    for _ in range(3):
        both = learner.allocate(known, SHARED).counts
        assert torch.equal(both[:1], alone.allocate(known, QueryBudget((10,))).counts)
        learner.observe(TraceObservation(TRACES, both.double()))
        alone.observe(TraceObservation(TRACES[:1], both[:1].double()))
    assert not torch.equal(both[0], torch.full((4,), 10))


def test_samples_that_are_drawn_are_not_drawn_at_a_shared_line():
    allocator = OptimalAllocator(traces=PILOTS, min_queries=0.25)
    found = allocator.allocate(statistics(), QueryBudget((0.5, 6), shared=(False, True)))
    assert found.counts[1].tolist() == found.expected[1].tolist() == [6] * 4
    assert found.inclusion[1].tolist() == [1.0] * 4
    assert int(found.counts[0].sum()) == 2


def cost_aware(costs: list[float], trace: torch.Tensor = TRACES) -> torch.Tensor:
    known = SampleStatistics(
        loss=torch.ones(4), trace=trace, scale=torch.ones(2), counted_costs=torch.tensor(costs, dtype=torch.float64)
    )
    return CostAwareAllocator(traces=PILOTS).allocate(known, SHARED).counts


def test_compute_is_split_with_a_shared_line_as_one_item():
    found = cost_aware([1.0, 4.0])
    assert len(set(found[1].tolist())) == 1
    assert float((found.double().sum(dim=1) * torch.tensor([1.0, 4.0])).sum()) <= 4 * (10 + 4 * 6)
    dearer = cost_aware([1.0, 16.0])
    assert float(dearer[1, 0] / dearer[0].sum()) < 0.6 * float(found[1, 0] / found[0].sum())


def test_the_continuous_optimum_is_neymans_over_both():
    costs, most = torch.tensor([1.0, 4.0], dtype=torch.float64), torch.full((2,), 1e3, dtype=torch.float64)
    image, text = cheapest_counts(TRACES.double(), costs, 136.0, least=0, most=most, multiple=0, shared=(False, True))
    # K_b ~ sqrt(V_b / c_I) and M ~ sqrt(sum_b V_b / (B c_T)), where B c_T is the price of a draw
    torch.testing.assert_close(text / image, (20.0 / 16.0) ** 0.5 / TRACES[0].double().sqrt())
    assert float(image.sum() + 16.0 * text[0]) == pytest.approx(136.0)
    assert torch.equal(text, text[:1].expand(4))


def test_a_shared_item_is_as_good_as_any_count():
    variance = torch.tensor([[2.0, 8.0], [3.0, 7.0]], dtype=torch.float64)
    costs, total = torch.tensor([1.0, 2.0], dtype=torch.float64), 24.0
    most = torch.tensor([50.0, 50.0], dtype=torch.float64)
    found = cheapest_counts(variance, costs, total, least=1, most=most, multiple=1, shared=(False, True))

    def spread(a: int, b: int, m: int) -> float:
        return 2.0 / a + 8.0 / b + 10.0 / m

    affordable = [(a, b, m) for a in range(1, 20) for b in range(1, 20) for m in range(1, 6) if a + b + 4 * m <= total]
    (a, b), (m, same) = found.tolist()
    assert m == same
    assert a + b + 4 * m <= total
    assert spread(a, b, m) <= 1.05 * min(spread(*counts) for counts in affordable)


def test_shared_lines_have_whole_numbers_and_one_entry_a_site():
    with pytest.raises(
        SettingError, match=r"2\.5: is not a whole number, but all samples of a batch get the same number"
    ):
        QueryBudget((4, 2.5), shared=(False, True))
    with pytest.raises(SettingError, match=r"budget\.shared = \(True,\): must have one entry for each of 2 sites"):
        QueryBudget((4, 2), shared=(True,))


def test_a_budget_chosen_at_every_step_is_a_whole_number_at_a_shared_line():
    rule = BudgetRule(BudgetSettings(rule="improvement", price="queries"))
    rule.observe(GradientObservation(2.0, torch.tensor([4.0, 9.0])), torch.tensor([4.0, 4.0]))
    known = SampleStatistics(loss=torch.ones(4))
    free = rule.choose(QueryBudget((4, 4)), known).queries_per_sample
    image, text = rule.choose(QueryBudget((4, 4), shared=(False, True)), known).queries_per_sample
    assert image == free[0]
    assert isinstance(text, int)
    assert text == max(1, round(free[1]))
