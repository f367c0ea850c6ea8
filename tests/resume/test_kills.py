"""Killed again and again, also while it writes, a run ends with the weights of the one that was left alone."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
import torch

from tests.resume.runs import BATCHES, EPOCHS, files, finish, outcome, start, wait_until, write_config


def killed_until_done(folder: Path, *, kills: int, seed: int) -> dict[str, int]:
    """Kill and resume; tells how many kills came when, as seen by what they left."""
    moments = random.Random(seed)
    seen = {"kills": 0, "while_writing": 0}
    while seen["kills"] < kills:
        before = files(folder, "*.ckpt")
        process = start(folder, "--ckpt_path", "last")
        moved = wait_until(lambda known=before: bool(files(folder, "*.ckpt") - known), process)
        if not moved:
            break  # it was done before there was anything to kill
        if seen["kills"] % 2 == 0:  # every other one while it writes, which is too rare to be left to chance
            wait_until(lambda: bool(files(folder, ".*.partial")), process)
        time.sleep(moments.uniform(0.0, 0.15 if seen["kills"] % 2 == 0 else 0.5))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
        seen["kills"] += 1
        seen["while_writing"] += bool(files(folder, ".*.partial"))
        assert all(torch.load(f, weights_only=True)["state_dict"] for f in files(folder, "*.ckpt"))
    if not list(folder.glob("runs/*/*/summary.json")):
        finish(start(folder, "--ckpt_path", "last"), folder)
    return seen


def check(folder: Path, *, kills: int, epochs: int, seed: int) -> dict[str, int]:
    slow = [{"class_path": "tests.resume.runs.SlowCheckpointIO"}]
    (folder / "whole").mkdir()
    (folder / "killed").mkdir()
    write_config(folder / "whole", max_epochs=epochs)
    write_config(folder / "killed", max_epochs=epochs, plugins=slow)
    finish(start(folder / "whole"), folder / "whole")
    seen = killed_until_done(folder / "killed", kills=kills, seed=seed)
    weights, summary = outcome(folder / "whole")
    resumed, its_summary = outcome(folder / "killed")
    assert its_summary == summary
    assert summary["steps"] == epochs * BATCHES
    assert weights.keys() == resumed.keys()
    assert all(torch.equal(weights[name], resumed[name]) for name in weights)
    return seen


def test_a_run_killed_at_random_moments_ends_where_it_would_have_without(tmp_path):
    seen = check(tmp_path, kills=3, epochs=EPOCHS, seed=0)
    assert seen["kills"] == 3
    assert seen["while_writing"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills(tmp_path):
    seen = check(tmp_path, kills=20, epochs=15, seed=1)
    assert seen["kills"] == 20
    assert seen["while_writing"] > 5
