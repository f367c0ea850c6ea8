from __future__ import annotations

import pytest
import torch

from flops_lightning.allocators import EqualAllocator, QueryBudget, SampleStatistics
from flops_lightning.errors import SettingError


def test_every_sample_gets_the_average_at_every_site() -> None:
    statistics = SampleStatistics(loss=torch.tensor([0.1, float("nan"), 9.0]))
    allocation = EqualAllocator().allocate(statistics, QueryBudget((20, 4), multiple=2))
    assert allocation.counts.tolist() == [[20, 20, 20], [4, 4, 4]]
    assert allocation.counts.dtype == torch.int64


def test_state_of_another_allocator_is_refused() -> None:
    allocator = EqualAllocator()
    allocator.load_state_dict(allocator.state_dict())
    with pytest.raises(ValueError, match="beta0"):
        allocator.load_state_dict({"beta0": 1.0})


@pytest.mark.parametrize(("queries", "multiple"), [((), 1), ((0,), 1), ((20, 3), 2), ((4,), 0)])
def test_impossible_budgets_are_refused(queries: tuple[int, ...], multiple: int) -> None:
    with pytest.raises(SettingError, match=r"queries_per_sample|multiple"):
        QueryBudget(queries, multiple)


@pytest.mark.parametrize(
    ("name", "shape"), [("loss", ()), ("loss", (3, 2)), ("embedding", (3,)), ("embedding", (2, 5)), ("trace", (2,))]
)
def test_statistics_that_are_not_per_sample_are_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(SettingError, match=name):
        SampleStatistics(**{"loss": torch.zeros(3), name: torch.zeros(shape)})


def test_statistics_on_the_cpu_keep_their_values() -> None:
    embedding = torch.randn(3, 2, dtype=torch.bfloat16, requires_grad=True)
    trace = torch.tensor([1e300, 0.0, -1.0], dtype=torch.float64)
    given = SampleStatistics(loss=torch.tensor([0.5, float("inf"), 2.0]), embedding=embedding, trace=trace)
    moved = given.on_cpu()
    assert moved.trace is not None
    assert moved.embedding is not None
    assert moved.loss.tolist() == [0.5, float("inf"), 2.0]
    assert torch.equal(moved.trace, trace)
    assert torch.equal(moved.embedding, embedding.detach().double())
    assert {moved.loss.dtype, moved.embedding.dtype} == {torch.float64}
    assert not moved.embedding.requires_grad
