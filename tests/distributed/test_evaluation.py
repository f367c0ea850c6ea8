"""What two processes test and predict together is what one does alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.evaluation_worker import run

pytestmark = pytest.mark.timeout(300)  # the first test waits for all processes
ROOT = Path(__file__).parents[2]
IMAGES = [13, 12, 1]  # uneven shares, whose sampler repeats an image; even ones; a process without an image of its own


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {
        **os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    for images in IMAGES:
        (folder / str(images)).mkdir()
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.evaluation_worker", "2", str(folder)]
    processes = [
        subprocess.Popen(
            [*command, *map(str, IMAGES)], env={**common, "RANK": rank, "LOCAL_RANK": rank}, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in "01"
    ]  # fmt: skip
    outputs = [process.communicate(timeout=250)[0].decode() for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(outputs)
    return folder


@pytest.mark.parametrize("images", IMAGES)
def test_two_processes_report_what_one_does(together: Path, tmp_path: Path, images: int) -> None:
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
def test_they_write_the_predictions_of_every_image_once(together: Path, tmp_path: Path, images: int) -> None:
    run(tmp_path, images)
    found, expected = (
        [line.split(",") for line in (folder / "predictions.csv").read_text().splitlines()]
        for folder in (together / str(images), tmp_path)
    )
    assert [line[:4] for line in found] == [line[:4] for line in expected]
    assert [line[1] for line in found[1:]] == [f"{i}.jpg" for i in range(images)]
    probabilities = [float(line[4]) for line in expected[1:]]
    assert [float(line[4]) for line in found[1:]] == pytest.approx(probabilities, rel=1e-5)
