from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from experiments import quickstart
from experiments.quickstart import Cell

ROOT = Path(__file__).parents[2]


def write_summary(output: Path, cell: Cell, **values: object) -> None:
    usual = {
        "start_accuracy": 0.2,
        "test_accuracy": 0.9,
        "queries": 4000,
        "queries_per_sample": 40,
        "queries_by_site": {"top": 1000, "head": 3000},
        "forward_equivalents": 123.0,
        "lost_queries": 0,
        "train_seconds": 10.0,
    }
    folder = cell.folder(output) / "name" / "version_0"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({**usual, **values}))


def test_finished_cells_are_not_run_again_and_the_table_gives_median_and_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(quickstart.subprocess, "run", lambda *args, **kwargs: pytest.fail("ran a finished cell"))
    for seed, accuracy in enumerate((0.91, 0.95, 0.93)):
        for variant, overlays in quickstart.VARIANTS.items():
            write_summary(tmp_path, Cell(variant, overlays, seed), test_accuracy=accuracy)
    quickstart.main(["--output", str(tmp_path), "--seeds", "3"])
    table = (tmp_path / "quickstart.md").read_text().splitlines()
    assert len(table) == 2 + len(quickstart.VARIANTS)
    assert "| 93.0% (91.0% - 95.0%) | 20.0% | top 10, head 30 | 4,000 | 123 | 10 |" in table[2]
    with (tmp_path / "quickstart.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(quickstart.VARIANTS)
    assert {row["test_accuracy"] for row in rows} == {"0.91", "0.95", "0.93"}
    assert "[15/15]" in capsys.readouterr().out


def test_a_failing_run_says_where_its_output_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cell = Cell("broken", ("configs/digits/no_such_file.yaml",), 0)
    with pytest.raises(RuntimeError, match=r"broken, seed 0: exit code 2, see .*log.txt"):
        quickstart.run_cell(cell, tmp_path, [], threads=1)
    assert "there is no such file" in (cell.folder(tmp_path) / "log.txt").read_text()


def test_variants_have_folders_of_their_own(tmp_path: Path) -> None:
    folders = {Cell(variant, overlays, 0).folder(tmp_path) for variant, overlays in quickstart.VARIANTS.items()}
    assert len(folders) == len(quickstart.VARIANTS)
