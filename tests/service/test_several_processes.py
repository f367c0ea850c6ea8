"""Two processes that ask one service: their rows are counted, limited, saved and resumed together."""

import json
from typing import Any

import pytest

from flops_lightning.service import ClipAnswers
from flops_lightning.tasks.clip_model import load_clip
from tests.clip_digits import MODEL
from tests.processes import run_module
from tests.reference.scoring_server import ScoringServer
from tests.service.two_processes import LIMIT, START, STEP

pytestmark = [pytest.mark.timeout(600), pytest.mark.slow]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What both processes found, by rank, and the summary of the whole run."""
    folder = tmp_path_factory.mktemp("ranks")
    clip, tokenizer = load_clip(MODEL["model_name"], "")
    with ScoringServer(ClipAnswers(clip, tokenizer=tokenizer, model="digits", max_rows=64)) as server:
        run_module(2, "tests.service.two_processes", "2", server.url, str(folder), seconds=500)
    found: dict[str, Any] = {str(rank): json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)}
    (summary,) = folder.rglob("summary.json")
    return {**found, "summary": json.loads(summary.read_text())}


def test_the_limit_is_that_of_both_together_and_stops_both_at_the_same_step(runs):
    for rank in "01":
        part = runs[rank]["part"]
        assert part["steps"] == 2
        assert f"max_queries = {LIMIT}: {START + 2 * STEP} are spent and the next step takes {STEP}" in part["stopped"]
    assert sum(runs[rank]["part"]["rows"] for rank in "01") == START + 2 * STEP <= LIMIT


def test_checkpoints_logs_and_the_summary_hold_the_count_of_both(runs):
    spent = START + 4 * STEP
    tests = 2 * 360 + 2  # of the summary, before and after; the text prompts have moved
    assert runs["0"]["saved"]["rows"] == runs["1"]["saved"]["rows"] == START + 2 * STEP
    assert runs["summary"]["service"]["rows"] == sum(runs[rank]["whole"]["rows"] for rank in "01")
    assert sum(runs[rank]["later"]["rows"] for rank in "01") == spent
    assert runs["0"]["later"]["logged"] == runs["1"]["later"]["logged"] == spent
    assert runs["summary"]["service"]["rows"] == spent + tests


def test_a_stopped_run_goes_on_and_ends_as_one_that_was_not(runs):
    for rank in "01":
        assert runs[rank]["later"]["stopped"] == runs[rank]["whole"]["stopped"] == ""
        assert runs[rank]["later"]["steps"] == 4
        assert runs[rank]["later"]["numbers"] == runs["0"]["whole"]["numbers"]
