import json
from pathlib import Path

import pytest

from experiments.quantized import TORCH, cell, main
from tests.aligned import llm_folder, photo_folder


def test_a_row_of_each_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("torch.ao.quantization")
    llm, photos = llm_folder(tmp_path / "llm"), photo_folder(tmp_path / "photos")
    given = ["--llm", llm, "--captions", str(photos / "captions.json"), "--output", str(tmp_path / "out")]
    rows = ["--number", "20", "--draws", "3", "--seeds", "1", "--names", "float32", "bfloat16", TORCH]
    main(["losses", *given, *rows])
    lines = (tmp_path / "out" / "losses.jsonl").read_text().splitlines()
    whole, half, eight = (json.loads(line)["found"] for line in lines)
    assert [row["backprop"] for row in (whole, half, eight)] == [1, 1, 0]
    assert whole["rms difference"] == 0 < 20 * whole["rounding"] < min(half["rounding"], eight["rounding"])
    assert [row["autograd's cosine"] for row in (whole, eight)] == [pytest.approx(1), 0]
    assert whole["MiB"] > max(half["MiB"], eight["MiB"])
    assert abs(whole["slope"] - 1) < 3 * whole["standard error of the slope"]
    assert "| float32 " in capsys.readouterr().out


def test_a_cell_says_the_mean_and_between_what_it_lies():
    assert [cell([0.5, 0.25]), cell([])] == ["0.375 (0.25 - 0.5)", ""]
