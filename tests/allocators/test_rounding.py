import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flops_lightning.allocators.rounding import largest_remainder, water_fill

SHARE = st.one_of(
    st.floats(0.0, 1.0), st.floats(-10.0, 1e308, allow_subnormal=True), st.sampled_from([0.0, 1.0, 1e308, 5e-324])
)


@st.composite
def budgets(draw: st.DrawFn) -> tuple[Tensor, int, int, int]:
    """Shares of 1 to 30 samples, and a total, floor and multiple that fit together."""
    shares = torch.tensor(draw(st.lists(SHARE, min_size=1, max_size=30)), dtype=torch.float64)
    multiple = draw(st.sampled_from([1, 2, 3]))
    minimum = draw(st.integers(0, 7))
    least = -(-minimum // multiple) * multiple
    return shares, len(shares) * (least + multiple * draw(st.integers(0, 40))), minimum, multiple


def bisected_water_fill(shares: Tensor, total: float, floor: float) -> Tensor:
    """Slow reference: the scale found by bisection on the sum, which grows with the scale."""
    positive = shares.clamp_min(0.0)
    positive = positive / positive.max() if positive.max() > 0 else torch.ones_like(positive)
    low, high = 0.0, 1.0
    while (high * positive).clamp_min(floor).sum() < total:
        high *= 2.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * positive).clamp_min(floor).sum() < total else (low, middle)
    return (high * positive).clamp_min(floor)


@given(budgets())
@settings(deadline=None, max_examples=100)
def test_counts_meet_the_budget_close_to_the_continuous_allocation(case: tuple[Tensor, int, int, int]) -> None:
    shares, total, minimum, multiple = case
    counts = largest_remainder(shares, total, minimum=minimum, multiple=multiple)
    assert counts.dtype == torch.int64
    assert int(counts.sum()) == total
    assert int(counts.min()) >= minimum
    assert bool((counts % multiple == 0).all())
    floor = -(-minimum // multiple) * multiple
    parts = water_fill(shares, total, floor=floor)
    assert bool(((counts - parts).abs() < multiple * (1 + 1e-9)).all())
    # A larger share never gets fewer queries, and of equal ones the first gets no fewer.
    ordered = counts[shares.clamp_min(0.0).argsort(descending=True, stable=True)]
    assert bool((ordered.diff() <= 0).all())


@given(budgets())
@settings(deadline=None, max_examples=100)
def test_water_filling_equals_bisection(case: tuple[Tensor, int, int, int]) -> None:
    shares, total, floor, _ = case
    total = max(total, len(shares) * floor)
    parts = water_fill(shares, total, floor=floor)
    torch.testing.assert_close(parts, bisected_water_fill(shares, total, floor), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(parts.sum(), torch.tensor(float(total), dtype=torch.float64), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize(
    ("shares", "total", "minimum", "multiple", "expected"),
    [
        ([0.3], 7, 1, 1, [7]),
        ([47000, 16000, 15900, 12000, 6000, 3100], 10, 0, 1, [5, 2, 1, 1, 1, 0]),  # a textbook election
        ([1.0, 1.0, 1.0], 10, 1, 1, [4, 3, 3]),  # ties go to the lower index
        ([1.0, 1.0, 1.0], 10, 1, 2, [4, 4, 2]),
        ([0.0, 0.0], 6, 1, 1, [3, 3]),  # nothing known: equal
        ([-1.0, 1.0, 3.0], 9, 1, 1, [1, 2, 6]),  # 1 at the floor, 8 left in the ratio 1 : 3
        ([1e308, 1.0, 1e-308], 12, 2, 2, [8, 2, 2]),
        ([1.0, 2.0], 2, 1, 1, [1, 1]),  # no more than the floor
        ([1.0, 100.0], 8, 1, 2, [2, 6]),  # the floor of 1 is raised to 2
    ],
)
def test_counts_by_hand(shares: list[float], total: int, minimum: int, multiple: int, expected: list[int]) -> None:
    counts = largest_remainder(torch.tensor(shares, dtype=torch.float64), total, minimum=minimum, multiple=multiple)
    assert counts.tolist() == expected


def test_water_filling_is_scale_free_and_batched() -> None:
    shares = torch.rand(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    together = water_fill(shares, 30.0, floor=2.0)
    torch.testing.assert_close(together, torch.stack([water_fill(row, 30.0, floor=2.0) for row in shares]))
    torch.testing.assert_close(together, water_fill(1e-200 * shares, 30.0, floor=2.0))


@pytest.mark.parametrize(
    ("shares", "total", "minimum", "multiple", "message"),
    [
        *(([1.0, bad], 4, 1, 1, "finite") for bad in (float("nan"), float("inf"), -float("inf"))),
        ([], 0, 1, 1, "at least one"),
        ([1.0] * 4, 12, 3, 2, r"^min_queries = 3: .* raise `queries_per_sample` to 4"),
        ([1.0] * 3, 9, 1, 2, r"^queries_per_sample = 3\.0: .* multiple of 2"),
    ],
)
def test_what_cannot_be_split_is_refused(
    shares: list[float], total: int, minimum: int, multiple: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):  # of settings the subclass SettingError
        largest_remainder(torch.tensor(shares), total, minimum=minimum, multiple=multiple)
