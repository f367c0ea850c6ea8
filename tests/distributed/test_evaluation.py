"""What two processes test and predict together is what one does alone."""

import json
from itertools import product

import pytest

from tests.distributed import robustness_worker
from tests.distributed.evaluation_worker import run
from tests.processes import run_module

pytestmark = pytest.mark.slow
IMAGES = [13, 12, 1]  # uneven shares, whose sampler repeats an image; even ones; a process without an image of its own


def test_two_processes_report_and_predict_what_one_does(tmp_path):
    for kind, images in product(("together", "alone"), IMAGES):
        (tmp_path / kind / str(images)).mkdir(parents=True)
    folders = str(tmp_path / "together"), *map(str, IMAGES)
    run_module(2, "tests.distributed.evaluation_worker", "2", *folders, seconds=250)
    for images in IMAGES:
        together, alone = (tmp_path / kind / str(images) for kind in ("together", "alone"))
        run(alone, images)
        expected = json.loads((alone / "metrics-0.json").read_text())
        for rank in (0, 1):
            found = json.loads((together / f"metrics-{rank}.json").read_text())
            assert found == [pytest.approx(each, rel=1e-5, abs=1e-6) for each in expected]
        assert len(expected[0]) == 5
        assert expected[0] == expected[1]
        assert (together / "class_accuracy.csv").read_text() == (alone / "class_accuracy.csv").read_text()
        if images == 1:
            continue
        (_, *lines), (_, *others) = (
            [line.split(",") for line in (folder / "predictions.csv").read_text().splitlines()]
            for folder in (together, alone)
        )
        assert [line[:4] for line in lines] == [line[:4] for line in others]
        assert [line[1] for line in lines] == [f"{i}.jpg" for i in range(images)]
        probabilities = [float(line[4]) for line in others]
        assert [float(line[4]) for line in lines] == pytest.approx(probabilities, rel=1e-5)


def test_two_processes_test_under_noise_and_attack_what_one_does_bit_for_bit(tmp_path):
    together, alone = tmp_path / "together", tmp_path / "alone"
    run_module(2, "tests.distributed.robustness_worker", "2", str(together), seconds=250)
    robustness_worker.run(alone)
    for name in ("robustness.csv", "robustness.json"):  # 37 images: the sampler repeats one
        assert (together / name).read_text() == (alone / name).read_text()
    assert json.loads((alone / "robustness.json").read_text())["images"] == 37
