import math

import numpy as np
import pytest
from scipy import stats

from experiments.tables import geometric_interval, mean_interval, paired_difference, paired_ratio


@pytest.mark.parametrize(("number", "point"), [(2, 12.706), (17, 2.120), (200, 1.972)])
def test_the_interval_is_students_for_any_number(number: int, point: float) -> None:
    values = np.random.default_rng(number).normal(2.0, size=number)
    half = point * values.std(ddof=1) / math.sqrt(number)
    found = mean_interval(list(values))
    assert found == pytest.approx((values.mean(), values.mean() - half, values.mean() + half), rel=1e-3)
    assert found[1:] == pytest.approx(stats.ttest_1samp(values, 0).confidence_interval(), rel=1e-9)
    assert geometric_interval(np.exp(values)) == pytest.approx(tuple(map(math.exp, found)))
    assert geometric_interval([3.0]) == pytest.approx((3.0, math.nan, math.nan), nan_ok=True)


def test_pairs_are_compared_one_by_one() -> None:
    assert paired_ratio([50.0, 100.0], [100.0, 200.0]) == "0.50 (0.50 - 0.50)"
    assert paired_ratio([1.0, 4.0], [1.0, 2.0], ", but") == "1.41 (0.02 - 115.61, but)"
    assert paired_difference([0.92, 0.83, 0.74], [0.91, 0.81, 0.71]) == "+2.0 (-0.5 to +4.5)"
    assert paired_difference([0.9], [0.8]) == "+10.0"
