import math
from dataclasses import replace

import pytest

from benchmarks import memory, mezo, replay
from benchmarks.cases import DIGITS
from benchmarks.harness import CPU


def test_the_table_is_of_medians_over_that_of_inference() -> None:
    records = [
        {"step": memory.INFERENCE, "batch": 64, "mebibytes": [100.0, 90.0, 110.0]},
        {"step": "MeZO", "batch": 64, "mebibytes": [105.0, 120.0, 110.0]},
    ]
    line = memory.report(records).splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["MeZO", "110 (105 - 120)", "1.10"]


@pytest.mark.study
def test_shared_directions_stay_near_the_memory_of_inference(capsys: pytest.CaptureFixture[str]) -> None:
    """Weights, batch and gradients counted on both sides; the bar is 1.2."""
    names = ["MeZO", "SPSA shared, whole network"]
    memory.main(["--batch", "32", "--rounds", "1", "--names", *names])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:] if line.startswith("|")]
    found = {row[1].strip(): float(row[3]) for row in rows}
    assert max(found[name] for name in names) < 1.2


@pytest.mark.slow
def test_the_overhead_of_a_step_is_a_ratio_of_times() -> None:
    ratio = mezo.overhead(replace(DIGITS, batch=4), rounds=1, device=CPU)
    assert math.isfinite(ratio.median)
    assert ratio.median > 0.5, "a step makes two passes"


@pytest.mark.slow
def test_replay_is_timed_beside_whole_passes_and_a_vits_own_stages() -> None:
    record = replay.measure("ViT-Tiny/16, 224 px", rows=1, rounds=1, device=CPU)
    assert record["sites"] == 3  # the head's noise enters the output, above which nothing runs
    assert record["counted"] == pytest.approx(3 / (8 / 12 + 4 / 12 + 0 / 12), rel=0.1)
    assert record["of_counted"] == pytest.approx(record["speed_up"].median / record["counted"])
    assert record["staged"] is not None
