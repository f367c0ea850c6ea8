import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import allocation
from experiments.allocation import CASES, Case
from experiments.allocation_scores import HeldOut
from experiments.tables import read_csv
from flops_lightning.allocators import GaussianAllocator, TraceObservation, gain_optimal
from tests.experiments.fakes import ROOT

SMALL = ["--checkpoints", "0", "3", "--budgets", "4", "20", "--batches", "2", "--directions", "6", "--window", "2"]
DATA = ["--", "--data.init_args.batch_size=12", "--trainer.max_epochs=1"]


@pytest.fixture(autouse=True, scope="module")
def few_cases() -> Iterator[None]:
    kept = ("equal", "gaussian", "best linear", "optimal", "optimal, both", "cost-aware")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(allocation, "CASES", [case for case in CASES if case.name in kept])
        patch.setattr(allocation, "proxy_rows", lambda *_: [])
        yield


Tables = dict[str, list[dict[str, str]]]


def study(output: Path) -> Tables:
    allocation.main(["--config", "configs/vit_tiny_digits.yaml", "--output", str(output), *SMALL, *DATA])
    return {name: read_csv(output / f"{name}.csv") for name in allocation.TABLES}


@pytest.fixture(scope="module")
def whole(few_cases: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tables]:
    """A short study: its folder and its tables."""
    output = tmp_path_factory.mktemp("whole")
    return output, study(output)


def test_scores_are_the_variance_of_what_was_allocated_with_pilots_by_the_square_of_their_weight() -> None:
    trace = torch.rand(2, 5, dtype=torch.float64) + 0.1
    held = HeldOut(trace, torch.full_like(trace, 1e5), torch.tensor([2.0, 0.5], dtype=torch.float64))
    counts, none = torch.tensor([[1, 2, 3, 4, 90], [20, 20, 20, 20, 20]]), torch.zeros(2, 5)
    lower, upper = held.of_counts(counts, none, None, 20)
    by_hand = sum(2.0 * float(t) / int(a) for t, a in zip(trace[0], counts[0], strict=True))
    assert (float(lower), float(upper)) == pytest.approx((by_hand, float(held.equal(20)[1])))
    counts, pilots, weight = torch.full((2, 5), 16), torch.full((2, 5), 4), torch.full((2, 5), 0.3, dtype=torch.float64)
    expected = held.scale * trace.sum(dim=1) * (0.3**2 / 4 + 0.7**2 / 16)
    torch.testing.assert_close(held.of_counts(counts, pilots, weight, 20), expected)
    # Their share of the budget makes every query count alike.
    torch.testing.assert_close(held.of_counts(counts, pilots, None, 20), held.equal(20))
    least = torch.stack([e / gain_optimal(t) for e, t in zip(held.equal(20), trace, strict=True)])
    torch.testing.assert_close(held.optimal(20), least, rtol=1e-4, atol=0.0)


def test_lost_samples_count_as_without_variance() -> None:
    seen = TraceObservation(torch.tensor([[1.0, torch.nan]]), torch.tensor([[5.0, 0.0]]))
    found = HeldOut.of(seen, torch.ones(1))
    assert (found.trace.tolist(), found.freedom.tolist()) == ([[1.0, 0.0]], [[4.0, 0.0]])


def test_small_budgets_pay_for_fewer_pilots_and_every_case_names_one_that_is_there() -> None:
    case = Case("", GaussianAllocator, pilots="lowest")
    for budget, multiple, expected in ((20, 1, 4), (4, 1, 3), (2, 1, 0), (20, 2, 8), (4, 2, 0)):
        assert case.pilot_queries(budget, multiple=multiple, minimum=0) == expected
    names = {case.name for case in CASES}
    assert len(names) == len(CASES)
    assert {case.best_linear for case in CASES} <= names


@pytest.mark.slow
def test_tables_of_a_short_run(whole: tuple[Path, Tables]) -> None:
    output, tables = whole
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
    if find_spec("matplotlib"):
        assert (output / "allocation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_interrupted_and_without_matplotlib_it_ends_with_the_same_tables(
    whole: tuple[Path, Tables], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = allocation.measure

    def stop_at_three(run: Any, plan: Any, step: int, *rest: Any) -> Any:
        if step == 3:
            raise KeyboardInterrupt
        return measured(run, plan, step, *rest)

    monkeypatch.setattr(allocation, "measure", stop_at_three)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path)
    monkeypatch.setattr(allocation, "measure", measured)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert study(tmp_path) == whole[1]
    said = capsys.readouterr().out
    assert "no picture: pictures = 'matplotlib': needs the package matplotlib" in said
    assert 'Run pip install -e ".[plots]"' in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["configs/vit_tiny_digits.yaml", *SMALL, "--batches", "1"], "holds a study with other settings"),
        (["configs/vit_tiny_digits_upright.yaml"], "trains with Backprop"),
    ],
)
def test_another_study_and_configurations_without_queries_are_refused(
    given: list[str], message: str, whole: tuple[Path, Tables], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        allocation.main(["--output", str(whole[0]), "--config", *given, *DATA])
    assert message in capsys.readouterr().err
