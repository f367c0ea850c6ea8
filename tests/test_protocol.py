import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flops_lightning.allocators import QueryBudget, SampleStatistics, TraceObservation
from flops_lightning.errors import SettingError

ONE_EACH = "with one entry for each sample as in `loss`. Return what belongs to each sample, not reduced"


def full(batch_size: int = 5, sites: int = 3) -> dict[str, Any]:
    """Every statistic there is, in the types in which modules have them."""
    return {
        "loss": torch.rand(batch_size),
        "embedding": torch.rand(batch_size, 7, dtype=torch.bfloat16),
        "trace": torch.rand(sites, batch_size, dtype=torch.float64),
        "trace_queries": torch.randint(2, 9, (sites, batch_size)),
        "predictors": {"top_gradient": torch.rand(batch_size), "loss": torch.rand(sites, batch_size)},
        "counted_costs": torch.rand(sites),
        "measured_costs": torch.rand(sites, dtype=torch.float64),
        "scale": torch.rand(sites),
        "preconditioned_scale": torch.rand(sites),
    }


def test_on_cpu_changes_the_type_and_nothing_else() -> None:
    given = full()
    given["loss"] = given["loss"].requires_grad_(True)
    given["trace"][1, 2] = math.nan
    before = SampleStatistics(**given, pilots_reused=False, budget=QueryBudget((4, 6, 8)))
    after = before.on_cpu()
    pairs = {name: (value, getattr(after, name)) for name, value in given.items() if name != "predictors"}
    assert before.predictors is not None
    assert after.predictors is not None
    assert list(after.predictors) == ["top_gradient", "loss"]  # a predictor may share its name with a statistic
    pairs |= {f"predictors {name}": (value, after.predictors[name]) for name, value in before.predictors.items()}
    for one, other in pairs.values():
        assert isinstance(one, Tensor)
        torch.testing.assert_close(other, one.detach().double(), rtol=0.0, atol=0.0, equal_nan=True)
        assert not other.requires_grad
    assert after.pilots_reused is False
    assert after.budget == QueryBudget((4, 6, 8))


def test_the_loss_alone_is_enough_and_no_predictor_is_not_none() -> None:
    alone = SampleStatistics(loss=torch.tensor([1.0, 2.0])).on_cpu()
    assert alone.loss.tolist() == [1.0, 2.0]
    assert {name for name in full() if getattr(alone, name) is not None} == {"loss"}
    assert SampleStatistics(loss=torch.ones(2), predictors={}).on_cpu().predictors == {}


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("loss", (), r"sample_statistics.loss = \(\): must have the shape \(b,\)"),
        ("loss", (5, 1), r"sample_statistics.loss = \(5, 1\): must have the shape \(b,\)"),
        ("embedding", (5,), rf"sample_statistics.embedding = \(5,\): must have the shape \(b, d\), {ONE_EACH}"),
        ("embedding", (4, 7), r"sample_statistics.embedding = \(4, 7\): must have"),
        ("trace", (), rf"sample_statistics.trace = \(\): must have the shape \(b,\) or \(s, b\), {ONE_EACH}"),
        ("trace", (5, 3), r"sample_statistics.trace = \(5, 3\): must have"),
        ("trace", (2, 3, 5), r"sample_statistics.trace = \(2, 3, 5\): must have"),
        ("trace_queries", (1,), r"sample_statistics.trace_queries = \(1,\): must have"),
        ("counted_costs", (), r"sample_statistics.counted_costs = \(\): must have the shape \(s,\). Return one"),
        ("measured_costs", (3, 5), r"sample_statistics.measured_costs = \(3, 5\): must have the shape \(s,\)"),
        ("scale", (3, 1), r"sample_statistics.scale = \(3, 1\): must have the shape \(s,\)"),
        ("preconditioned_scale", (1, 1), r"sample_statistics.preconditioned_scale = \(1, 1\): must have"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        SampleStatistics(**({"loss": torch.ones(5)} | {name: torch.ones(shape)}))
    assert caught.value.setting == f"sample_statistics.{name}"
    with pytest.raises(SettingError, match=rf"sample_statistics.predictors.norm = \(3,\): must have .* {ONE_EACH}"):
        SampleStatistics(loss=torch.ones(5), predictors={"fine": torch.ones(5), "norm": torch.ones(3)})


def test_observation_on_cpu_changes_the_type_and_nothing_else() -> None:
    trace = torch.tensor([[1.5, math.nan], [0.25, 3.0]], requires_grad=True)
    observation = TraceObservation(trace, torch.tensor([[4, 0], [6, 8]]), unit=2).on_cpu()
    assert observation.trace.dtype == observation.queries.dtype == torch.float64
    torch.testing.assert_close(observation.trace, trace.detach().double(), rtol=0.0, atol=0.0, equal_nan=True)
    assert observation.queries.tolist() == [[4.0, 0.0], [6.0, 8.0]]
    assert not observation.trace.requires_grad
    assert observation.unit == 2


@pytest.mark.parametrize(
    ("arguments", "setting", "message"),
    [
        ({"queries_per_sample": (4,), "multiple": 0}, "multiple", "0: must be 1 or more. Write 2 for antithetic"),
        ({"queries_per_sample": ()}, "queries_per_sample", r"\(\): no site has a budget. Give at least one"),
        ({"queries_per_sample": (4, 0)}, "queries_per_sample", "0: must be a positive multiple of 1"),
        ({"queries_per_sample": (4, 5), "multiple": 2}, "queries_per_sample", "5: must be a positive multiple of 2"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(arguments: dict[str, Any], setting: str, message: str) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        QueryBudget(**arguments)
    assert caught.value.setting == setting
