"""What is fixed when the allocation of all ranks' samples is split over the ranks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flops_lightning.allocators import Allocation, QueryBudget, SampleStatistics, TraceObservation
from flops_lightning.allocators.ranks import (
    GatheredStatistics,
    gather_observation,
    gather_statistics,
    with_fixed_totals,
)  # fmt: skip
from flops_lightning.distributed import Communicator


class TenTimes:
    """Two ranks; the other has as many samples as this one, and ten times its numbers."""

    rank, size, sent = 0, 2, 0

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor, tensor * (1 if tensor.dtype == torch.int64 else 10)]

    def sum(self, tensor: Tensor) -> Tensor:
        return torch.stack(self.gather(tensor)).sum(0)


@given(st.data(), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.sampled_from([1, 2]), st.integers(0, 2))
def test_totals_are_in_proportion_to_samples_and_floors_stay(
    data: st.DataObject, sizes: list[int], multiple: int, least: int
) -> None:
    counts = st.lists(st.integers(least, 30), min_size=sum(sizes), max_size=sum(sizes))
    table = torch.tensor([data.draw(counts), data.draw(counts)]) * multiple
    fixed = with_fixed_totals(Allocation(table), sizes, multiple=multiple).counts
    assert torch.equal(fixed.sum(1), table.sum(1))
    assert (fixed % multiple == 0).all()
    assert (fixed.amin(1) >= table.amin(1)).all()
    for part, size in zip(fixed.split(sizes, dim=1), sizes, strict=True):
        share = table.sum(1) * size / sum(sizes)
        assert ((part.sum(1) - share).abs() < multiple).all()


def test_statistics_of_all_ranks_stand_rank_by_rank() -> None:
    own = SampleStatistics(
        loss=torch.tensor([1.0, 2.0]), embedding=torch.tensor([[1.0, 2.0], [3.0, 4.0]]),
        trace=torch.tensor([[1.0, torch.nan], [3.0, 4.0]]), trace_queries=torch.tensor([2, 2]),
        predictors={"one_minus_p": torch.tensor([0.5, 0.25])}, measured_costs=torch.tensor([1.0, 3.0]),
        budget=QueryBudget((4, 4)),
    )  # fmt: skip
    gathered = gather_statistics(TenTimes(), own)
    assert gathered.sizes == (2, 2)
    assert gathered.statistics.budget == own.budget
    found = {name: value.nan_to_num(-1).tolist() for name, value in gathered.statistics.tensors().items()}
    assert found == {
        "loss": [1, 2, 10, 20],
        "embedding": [[1, 2], [3, 4], [10, 20], [30, 40]],
        "trace": [[1, -1, 10, -1], [3, 4, 30, 40]],
        "trace_queries": [2, 2, 20, 20],
        "predictors.one_minus_p": [0.5, 0.25, 5, 2.5],
        "measured_costs": [5.5, 16.5],  # the mean of 1 and 10, of 3 and 30
    }


def test_observations_of_all_ranks_stand_rank_by_rank() -> None:
    own = TraceObservation(torch.tensor([[1.0, torch.nan], [3.0, 4.0]]), torch.tensor([[2, 1], [5, 6]]), unit=2)
    found = gather_observation(TenTimes(), own)
    assert torch.equal(found.trace.nan_to_num(-1), torch.tensor([[1.0, -1, 10, -1], [3, 4, 30, 40]]))
    assert torch.equal(found.queries, torch.tensor([[2.0, 1, 20, 10], [5, 6, 50, 60]]))
    assert found.unit == 2


def test_a_rank_cuts_out_its_own_and_one_rank_keeps_what_it_has() -> None:
    statistics, table = SampleStatistics(loss=torch.ones(5)), torch.arange(10).view(2, 5)
    gathered = gather_statistics(Communicator(), statistics)
    assert gathered.statistics is statistics
    assert torch.equal(gathered.own(table), table)
    for rank, part in enumerate((table[:, :2], table[:, 2:])):
        assert torch.equal(GatheredStatistics(statistics, (2, 3), rank).own(table), part)


@pytest.mark.parametrize(
    ("counts", "most", "expected"),
    [
        ([10, 20, 40, 30, 60, 80], None, [17, 34, 69, 21, 42, 57]),  # 70 and 170 of 240: each rank gets 120
        ([10, 1, 1, 10, 10, 10], 10, [10, 6, 5, 7, 7, 7]),  # 21 of 42; 10 is the most
        ([2, 2, 2, 4, 4, 4], 4, [3] * 6),
        ([9, 9], 5, [5, 5]),
    ],
)
def test_within_a_rank_shares_stay_what_they_were_up_to_the_most(
    counts: list[int], most: int | None, expected: list[int]
) -> None:
    allocation = Allocation(torch.tensor([counts]), most=None if most is None else torch.tensor([most]))
    sizes = [len(counts) // 2] * 2
    assert with_fixed_totals(allocation, sizes, multiple=1).counts.tolist() == [expected]
