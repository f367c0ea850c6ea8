"""What two processes test and predict together is what one does alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.evaluation_worker import run
from tests.processes import run_module

pytestmark = pytest.mark.slow
IMAGES = [13, 12, 1]  # uneven shares, whose sampler repeats an image; even ones; a process without an image of its own


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    for images in IMAGES:
        (folder / str(images)).mkdir()
    run_module(2, "tests.distributed.evaluation_worker", "2", str(folder), *map(str, IMAGES), seconds=250)
    return folder


@pytest.mark.parametrize("images", IMAGES)
def test_two_processes_report_what_one_does(together, tmp_path, images):
    run(tmp_path, images)
    alone = json.loads((tmp_path / "metrics-0.json").read_text())
    for rank in (0, 1):
        found = json.loads((together / str(images) / f"metrics-{rank}.json").read_text())
        assert found == [pytest.approx(each, rel=1e-5, abs=1e-6) for each in alone]
    assert len(alone[0]) == 5
    assert alone[0] == alone[1]
    table = (together / str(images) / "class_accuracy.csv").read_text()
    assert table == (tmp_path / "class_accuracy.csv").read_text()


@pytest.mark.parametrize("images", [n for n in IMAGES if n > 1])
def test_they_write_the_predictions_of_every_image_once(together, tmp_path, images):
    run(tmp_path, images)
    found, expected = (
        [line.split(",") for line in (folder / "predictions.csv").read_text().splitlines()]
        for folder in (together / str(images), tmp_path)
    )
    assert [line[:4] for line in found] == [line[:4] for line in expected]
    assert [line[1] for line in found[1:]] == [f"{i}.jpg" for i in range(images)]
    probabilities = [float(line[4]) for line in expected[1:]]
    assert [float(line[4]) for line in found[1:]] == pytest.approx(probabilities, rel=1e-5)
