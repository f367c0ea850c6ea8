"""The study of captions, in small: it learns, and what is there is not made again."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="adapters need the extra llm")

from experiments import language


@pytest.fixture
def given(shared_data: Any, tmp_path: Path) -> list[str]:
    model, captions = shared_data("models/stories260k"), shared_data("data/captions/lcs_format.json")
    return ["--model", str(model), "--captions", str(captions), "--output", str(tmp_path), "--seeds", "1"]


def test_backprop_learns_and_a_result_that_is_there_is_not_made_again(given, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(language, "STEPS", 4)
    names = ["--names", "full: start", "full: backprop"]
    language.main(["targets", *given, *names])
    lines = [json.loads(line) for line in (tmp_path / "targets.jsonl").read_text().splitlines()]
    start, backprop = (line["found"] for line in lines)
    assert backprop["loss"] < start["loss"] - 0.5
    assert (backprop["steps"], backprop["passes"]) == (4, 3)
    monkeypatch.setattr(language, "Problem", None)
    language.main(["targets", *given, *names])
    assert capsys.readouterr().out.count("full: backprop") == 3  # as it is made, and in two tables


def test_photos_to_choose_on_are_no_photos_held_out(given):
    options = language.argparse.Namespace(captions=Path(given[3]), model=Path(given[1]))
    problem = language.Problem(options, "prompt", 0)
    train, held = problem.captions
    chosen_on = language.Problem(options, "prompt", 0, choosing=True).captions
    assert (len(train), len(held), len(chosen_on[1])) == (1200, 300, 200)
    texts = [{tuple(t.candidates[0]) for t in part} for part in (held, chosen_on[0], chosen_on[1])]
    assert not texts[0] & (texts[1] | texts[2])
    sizes = [inputs["input_ids"].shape for inputs, _ in problem.batches(4)]
    assert [rows for rows, _ in sizes] == [16] * 4
