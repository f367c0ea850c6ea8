from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import precision


def cells(text: str) -> list[tuple[float, float]]:
    """Cosine with the gradient and with exact derivatives, row by row."""
    return [(float(a), float(b)) for a, b in re.findall(r"(-?\d+\.\d+) ± nan \((-?\d+\.\d+)\)", text)]


@pytest.mark.parametrize("method", precision.METHODS)
def test_float32_resolves_what_bfloat16_does_not(
    method: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    small = ["--seeds", "1", "--batch", "4", "--queries", "4", "--sigmas", "1e-3", "1e-5"]
    precision.main(["--methods", method, "--precisions", "float32", "bfloat16", *small])
    text = capsys.readouterr().out
    assert text.startswith(f"{method}:")
    float32, _, finer, rounded = cells(text)
    assert float32[1] > 0.98
    assert finer[1] > 0.98
    assert rounded[1] < 0.9
