from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments import harness, quickstart
from experiments.command_line import fit
from experiments.harness import RunFailedError, run_all
from experiments.quickstart import VARIANTS, cells
from experiments.tables import read_csv

ROOT = Path(__file__).parents[2]
SUMMARY = {
    "start_accuracy": 0.2, "queries": 4000, "queries_per_sample": 40, "queries_by_site": {"top": 1000, "head": 3000},
    "forward_equivalents": 123.0, "lost_queries": 0, "train_seconds": 10.0,
}  # fmt: skip


def test_finished_runs_are_not_repeated_and_the_table_gives_median_and_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(harness.Children, "run", lambda _, command, **__: pytest.fail(f"ran {command}"))
    found = cells(tmp_path, 3)
    assert len({cell.folder for cell in found.values()}) == len(found) == 3 * len(VARIANTS)
    for (_, seed), cell in found.items():
        (cell.folder / "name" / "version_0").mkdir(parents=True)
        summary = {**SUMMARY, "test_accuracy": (0.91, 0.95, 0.93)[seed]}
        (cell.folder / "name" / "version_0" / "summary.json").write_text(json.dumps(summary))
    quickstart.main(["--output", str(tmp_path), "--seeds", "3"])
    table = (tmp_path / "quickstart.md").read_text().splitlines()
    assert len(table) == 2 + len(VARIANTS)
    assert [entry.strip() for entry in table[2].strip("|").split("|")] == [
        "OPS-LR (GaussianAllocator)", "93.0% (91.0% - 95.0%)", "20.0%", "top 10, head 30", "4,000", "123", "10",
    ]  # fmt: skip
    rows = read_csv(tmp_path / "quickstart.csv")
    assert len(rows) == 3 * len(VARIANTS)
    assert {row["test_accuracy"] for row in rows} == {"0.91", "0.95", "0.93"}


def test_a_failing_run_says_where_its_output_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cell = fit(tmp_path, "broken/seed_0", [quickstart.BASE, "configs/digits/no_such_file.yaml"], (), {})
    with pytest.raises(RunFailedError, match=r"broken/seed_0: exit code 2, see log.txt there"):
        run_all([cell])
    assert "there is no such file" in (cell.folder / "log.txt").read_text()
