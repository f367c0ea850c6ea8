"""The study of few-shot choices, in small and with invented sentences."""

import json
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="adapters need the extra llm")

from experiments import few_shot
from flops_lightning.language.models import load_tokenizer

WORDS = {-2.1: ("bad", "sad", "cold", "flat", "slow"), 2.3: ("good", "fun", "warm", "kind", "rich")}
THINGS = ("film", "song", "cat", "dog", "tale")


@pytest.fixture
def given(shared_data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    for name, value in {"TESTED": 8, "JUDGED": 6, "SET_ASIDE": 5, "SHOTS": 4, "STEPS": 3, "GRID": (1.0,)}.items():
        monkeypatch.setattr(few_shot, name, value)
    rows = [(rating, f"{word} {thing}") for rating, words in WORDS.items() for word, thing in product(words, THINGS)]
    rows += [(0.9, "a film"), (-2.1, "bad film"), (3.0, "so long that it is " * 5)]  # unclear, twice, too long
    file = tmp_path / "ratings.txt"
    file.write_text("\n".join(f"{number}\t{rating}\t{text}" for number, (rating, text) in enumerate(rows)))
    model = str(shared_data("models/stories260k"))
    return ["--model", model, "--sentences", str(file), "--output", str(tmp_path), "--seeds", "1"]


def test_parts_are_balanced_and_share_no_sentence(given):
    found = few_shot.parts(Path(given[3]), load_tokenizer(given[1], setting="--model"))
    assert {name: len(part) for name, part in found.items()} == {"test": 16, "judge": 12, "choose": 10, "learn": 12}
    for part in found.values():
        assert sum(entry["label"] for entry in part) == len(part) / 2
        assert all((entry["text"].split()[0] in WORDS[2.3]) == entry["label"] for entry in part)
    texts = [{entry["text"] for entry in part} for part in found.values()]
    assert not any(a & b for a, b in combinations(texts, 2))
    assert found == few_shot.parts(Path(given[3]), load_tokenizer(given[1], setting="--model"))


def test_methods_are_tested_with_what_they_cost(given, tmp_path: Path):
    names = ["top: start", "top: backprop", "top: lr", "top: mezo x4"]
    few_shot.main(["methods", *given, "--names", *names])
    lines = [json.loads(line) for line in (tmp_path / "methods.jsonl").read_text().splitlines()]
    start, backprop, lr, mezo = (line["found"] for line in lines)
    assert start.keys() == {"accuracy", "loss", "steps"}
    assert [each["steps"] for each in (start, backprop, lr, mezo)] == [0, 3, 3, 12]
    assert backprop["passes"] == pytest.approx(3)
    assert 1 < mezo["passes"] < 2 < lr["passes"]  # what is frozen below runs once, and queries start above it
    assert len({each["loss"] for each in (start, backprop, lr, mezo)}) == 4


def test_cosines_are_of_each_third_and_a_row_of_rates_has_its_own(given, tmp_path: Path):
    few_shot.main(["cosines", *given, "--names", "all: lr"])
    few_shot.main(["rates", *given, "--names", "top: mezo, 0.001"])
    found = [json.loads((tmp_path / f"{name}.jsonl").read_text())["found"] for name in ("cosines", "rates")]
    assert list(found[0]) == ["layers 0 to 0", "layers 1 to 2", "layers 3 to 4", "all", "passes"]
    assert all(-1 <= cosine <= 1 for cosine in list(found[0].values())[:-1])
    assert list(found[1]) == ["loss"]
