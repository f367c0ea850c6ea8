from __future__ import annotations

import pytest
import torch

from flops_lightning.allocators import EqualAllocator, QueryBudget, SampleStatistics


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
