from __future__ import annotations

import csv
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import allocation
from experiments.allocation_cases import CASES, Case
from experiments.allocation_scores import HeldOut, interval
from flops_lightning.allocators import GaussianAllocator, TraceObservation, gain_optimal
from flops_lightning.errors import SettingError

ROOT = Path(__file__).parent.parent.parent
SMALL = ["--checkpoints", "0", "3", "--budgets", "4", "20", "--batches", "2", "--directions", "6", "--window", "2"]
DATA = ["--", "--data.init_args.batch_size=12", "--trainer.max_epochs=1"]


@pytest.fixture
def few_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    kept = ("equal", "gaussian", "best linear", "optimal", "optimal, both", "cost-aware")
    cases = [case for case in CASES if case.name in kept]
    monkeypatch.setattr(allocation, "CASES", cases)
    monkeypatch.setattr(allocation, "proxy_rows", lambda *_: [])


def study(output: Path, *more: str) -> dict[str, list[dict[str, str]]]:
    allocation.main(["--config", "configs/vit_tiny_digits.yaml", "--output", str(output), *SMALL, *more, *DATA])
    tables = {}
    for name in ("allocation", "allocation_sites", "traces"):
        with (output / f"{name}.csv").open() as file:
            tables[name] = list(csv.DictReader(file))
    return tables


def held_out(sites: int = 2, batch: int = 5) -> HeldOut:
    trace = torch.rand(sites, batch, dtype=torch.float64) + 0.1
    return HeldOut(trace, torch.full_like(trace, 1e5), torch.tensor([2.0, 0.5], dtype=torch.float64))


def test_equal_counts_score_one() -> None:
    held = held_out()
    counts, none = torch.full((2, 5), 20), torch.zeros(2, 5)
    torch.testing.assert_close(held.of_counts(counts, none, None, 20), held.equal(20))


def test_scores_are_the_variance_of_what_was_allocated() -> None:
    held = held_out()
    counts, none = torch.tensor([[1, 2, 3, 4, 90], [20, 20, 20, 20, 20]]), torch.zeros(2, 5)
    by_hand = [sum(2.0 * float(t) / int(a) for t, a in zip(held.trace[0], counts[0], strict=True))]
    assert float(held.of_counts(counts, none, None, 20)[0]) == pytest.approx(by_hand[0])


def test_reused_pilots_count_with_the_square_of_their_weight() -> None:
    held = held_out()
    counts, pilots, weight = torch.full((2, 5), 16), torch.full((2, 5), 4), torch.full((2, 5), 0.3, dtype=torch.float64)
    factor = 0.3**2 / 4 + 0.7**2 / 16
    expected = held.scale * held.trace.sum(dim=1) * factor
    torch.testing.assert_close(held.of_counts(counts, pilots, weight, 20), expected)
    # Their share of the budget makes every query count alike.
    torch.testing.assert_close(held.of_counts(counts, pilots, None, 20), held.equal(20))


def test_the_least_variance_is_that_of_exact_traces() -> None:
    held = held_out()
    expected = torch.stack([e / gain_optimal(t) for e, t in zip(held.equal(20), held.trace, strict=True)])
    torch.testing.assert_close(held.optimal(20), expected, rtol=1e-4, atol=0.0)


def test_lost_samples_count_as_without_variance() -> None:
    seen = TraceObservation(torch.tensor([[1.0, torch.nan]]), torch.tensor([[5.0, 0.0]]))
    held = HeldOut.of(seen, torch.ones(1))
    assert held.trace.tolist() == [[1.0, 0.0]]
    assert held.freedom.tolist() == [[4.0, 0.0]]


def test_the_interval_is_students() -> None:
    mean, low, high = interval([1.0, 2.0, 4.0])
    half = 4.303 * math.log(2) / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((2.0, 2 * math.exp(-half), 2 * math.exp(half)), rel=2e-3)
    assert interval([3.0])[0] == pytest.approx(3.0)
    assert math.isnan(interval([3.0])[1])


@pytest.mark.parametrize(
    ("budget", "unit", "minimum", "expected"), [(20, 1, 0, 4), (4, 1, 0, 3), (2, 1, 0, 0), (20, 2, 0, 8), (4, 2, 0, 0)]
)
def test_small_budgets_pay_for_fewer_pilots(budget: int, unit: int, minimum: int, expected: int) -> None:
    case = Case("", GaussianAllocator, pilots="lowest")
    assert case.pilot_queries(budget, unit=unit, minimum=minimum) == expected


def test_every_case_names_one_that_is_there() -> None:
    names = {case.name for case in CASES}
    assert len(names) == len(CASES)
    assert {case.best_linear for case in CASES} <= names


def test_tables_of_a_short_run(tmp_path: Path, few_cases: None) -> None:
    tables = study(tmp_path)
    rows = tables["allocation"]
    assert tuple(rows[0]) == allocation.COLUMNS
    assert {(row["checkpoint"], row["budget"]) for row in rows} == {(c, b) for c in "03" for b in ("4", "20")}
    for row in rows:
        assert float(row["gain_low"]) <= float(row["gain"]) <= float(row["gain_high"])
        if row["allocator"] == "equal":
            assert float(row["gain"]) == pytest.approx(1.0)
        elif row["allocator"] != "cost-aware":  # at equal queries of each site nothing beats exact traces, noise apart
            assert float(row["gain"]) < 1.5 * float(row["gain_optimal"])
    assert {row["site"] for row in tables["allocation_sites"]} == {"lower", "middle", "top", "head"}


def test_the_plot(tmp_path: Path, few_cases: None) -> None:
    pytest.importorskip("matplotlib")
    study(tmp_path)
    assert (tmp_path / "allocation.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "allocation.png").stat().st_size > 10_000


def test_without_matplotlib_the_tables_are_there(
    tmp_path: Path, few_cases: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert study(tmp_path)["allocation"]
    assert 'no plot: matplotlib = None: is not installed; the tables are written. Run pip install "matplotlib' in (
        capsys.readouterr().out
    )


def test_an_interrupted_study_goes_on_and_ends_the_same(
    tmp_path: Path, few_cases: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = study(tmp_path / "whole")
    measured = allocation.measure

    def stop_at_three(run: Any, plan: Any, step: int, *rest: Any) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return measured(run, plan, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(allocation, "measure", stop_at_three)
        with pytest.raises(KeyboardInterrupt):
            study(tmp_path / "parts")
    assert study(tmp_path / "parts") == whole


def test_another_study_in_the_same_folder_is_refused(tmp_path: Path, few_cases: None) -> None:
    study(tmp_path)
    with pytest.raises(SettingError, match="holds another study"):
        study(tmp_path, "--batches", "1")


def test_configurations_without_queries_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SettingError, match="trains with Backprop"):
        allocation.main(["--config", "configs/vit_tiny_digits_upright.yaml", "--output", str(tmp_path)])
