import math
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import own_images
from experiments.harness import Cell
from experiments.own_images import FIRST, PROBLEMS
from experiments.tables import read_csv
from tests.datamodules.photo_folders import photo, write
from tests.experiments.fakes import entries, finish


def test_every_file_is_there() -> None:
    files = {file for problem in PROBLEMS.values() for file in problem.files}
    assert [file for file in files if not Path(file).is_file()] == []


def test_each_method_has_the_rate_that_is_best_on_validation_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_all(cells: Iterable[Cell], **_: Any) -> bool:
        for cell in cells:
            method, lr, seed = cell.name.split("/")
            finish(cell.folder, queries=float(lr[3:]), test_accuracy=0.5 + 0.1 * int(seed[5:]) * (method == "bp"))
        return True

    def curve(cell: Cell, tag: str) -> list[Any]:
        assert (tag, cell.name.rpartition("_")[2]) == ("val/accuracy", "1000")
        return [SimpleNamespace(value=-abs(math.log(cell.summary["queries"] / 3e-2)))]

    monkeypatch.setattr(own_images, "run_all", run_all)
    monkeypatch.setattr(Cell, "curve", curve)
    arguments = ["--problem", "ucmerced_vit", "--seeds", "2", "--output", str(tmp_path)]
    own_images.main([*arguments, "--methods", "bp", "head"])
    assert [(row["method"], row["lr"], row["seed"]) for row in read_csv(tmp_path / "own_images.csv")] == [
        (method, "0.03", seed) for method in ("bp", "head") for seed in ("0", "1")
    ]
    rows = entries((tmp_path / "own_images.md").read_text())[1:]
    assert [row[:3] for row in rows] == [
        ["bp", "0.03", "55.0% (50.0% - 60.0%)"],
        ["head", "0.03", "50.0% (50.0% - 50.0%)"],
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("forked_runs")
def test_a_short_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for label, number in ((label, number) for label in range(3) for number in range(10)):
        write(tmp_path / "images" / f"class{label}" / f"{number}.jpg", photo(label, number))
    monkeypatch.setattr(own_images, "FIRST", dict.fromkeys(FIRST, (1e-2,)))
    arguments = ["--problem", "ucmerced_convnext", "--seeds", "1", "--output", str(tmp_path / "study")]
    own_images.main([*arguments, "--", "--data.init_args.root", str(tmp_path / "images")])
    rows = {row["method"]: row for row in read_csv(tmp_path / "study" / "own_images.csv")}
    # 3 epochs of 15 images in one batch; three sites and the exact head.
    assert {method: float(row["queries"]) for method, row in rows.items()} == {
        "ops_lr": 3 * 15 * 3 * 4, "bp": 0, "head": 0, "mezo": 3 * 15 * 2,
    }  # fmt: skip
