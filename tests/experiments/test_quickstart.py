from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments import pictures, quickstart
from experiments.harness import Cell
from experiments.quickstart import VARIANTS, cells
from experiments.tables import read_csv
from tests.experiments.fakes import entries, finish


@pytest.mark.usefixtures("no_runs")
def test_finished_runs_are_not_repeated_and_the_table_gives_median_and_range(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Cell, "curve", lambda *_: [SimpleNamespace(step=step, value=0.5) for step in range(3)])
    monkeypatch.setattr(pictures, "extreme_digits", lambda *_, shown: (torch.ones(12, 8, 8), *[torch.ones(12)] * 2))
    found = cells(tmp_path, 3)
    assert len({cell.folder for cell in found.values()}) == len(found) == 3 * len(VARIANTS)
    for (_, seed), cell in found.items():
        finish(cell.folder / "name" / "version_0", test_accuracy=(0.91, 0.95, 0.93)[seed])
        (cell.folder / "last.ckpt").touch()
    quickstart.main(["--output", str(tmp_path), "--seeds", "3"])
    rows = entries((tmp_path / "quickstart.md").read_text())[1:]
    assert [row[0] for row in rows] == list(VARIANTS)
    assert rows[0][1:] == ["93.0% (91.0% - 95.0%)", "20.0%", "top 20, head 60", "1,206,720", "301,680", "24"]
    accuracies = [row["test_accuracy"] for row in read_csv(tmp_path / "quickstart.csv")]
    assert sorted(accuracies) == sorted(["0.91", "0.95", "0.93"] * len(VARIANTS))
    if find_spec("matplotlib"):
        assert (tmp_path / "quickstart.png").stat().st_size > 1000
