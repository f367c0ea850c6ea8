import math
from pathlib import Path

import pytest

from experiments import fewer_queries, rates
from experiments.fewer_queries import ALLOCATORS, PROBLEMS, Curve, compare
from experiments.harness import late_mean
from experiments.tables import read_csv


def falling(rate: float) -> Curve:
    loss = [math.exp(-rate * i) for i in range(40)]
    spent = [100.0 * (i + 1) for i in range(40)]
    return Curve(list(range(40)), loss, spent, [q / 10 for q in spent], [(9, 0.4), (19, 0.6), (29, 0.7)], 0.7)


def test_what_was_spent_until_the_loss_fell_and_the_accuracy_was_reached() -> None:
    curve = falling(0.1)
    first = next(i for i in range(9, 40) if sum(curve.loss[i - 9 : i + 1]) / 10 <= 0.3)
    assert curve.to_loss(0.3) == 100.0 * (first + 1)
    assert curve.to_loss(0.3, curve.forward_equivalents) == 10.0 * (first + 1)
    assert curve.to_accuracy(0.6) == 2000.0
    assert math.isnan(curve.to_loss(1e-9))
    assert math.isnan(curve.to_accuracy(0.9))
    lucky = falling(0.0)
    lucky.loss[0] = 0.0  # a lucky batch at the start is not yet a loss reached
    assert math.isnan(lucky.to_loss(0.5))
    assert late_mean(curve.loss) == pytest.approx(sum(curve.loss[30:]) / 10)
    assert late_mean([3.0, math.nan]) == math.inf


def test_misses_are_told() -> None:
    assert compare([50.0, 100.0], [100.0, 200.0]) == "0.50 (0.50 - 0.50)"
    assert compare([50.0, math.nan], [100.0, 200.0]).endswith("1 of 2 never)")
    assert compare([math.nan], [1.0]) == "not reached (1 of 1)"


def test_every_file_is_there() -> None:
    files = [*(f"configs/allocators/{name}.yaml" for name in ALLOCATORS), *(each.config for each in PROBLEMS.values())]
    assert [file for file in files if not Path(file).is_file()] == []


@pytest.mark.study
@pytest.mark.usefixtures("forked_runs")
def test_a_short_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "EXTENSIONS", 0)
    short = ["--", "--trainer.max_epochs=1", "--trainer.limit_train_batches=12", "--trainer.val_check_interval=6"]
    short += ["--data.init_args.batch_size=8"]
    arguments = ["--problem", "digits", "--output", str(tmp_path), "--seeds", "1", "--allocators", "cost_aware"]
    arguments += ["--jobs", "2"]  # each on one thread: two would wait for each other beside other tests
    fewer_queries.main([*arguments, *short])
    rows = read_csv(tmp_path / "fewer_queries.csv")
    assert [(row["allocator"], row["seed"]) for row in rows] == [("equal", "0"), ("cost_aware", "0")]
    assert all(float(row["queries"]) == 12 * 8 * 80 for row in rows if row["allocator"] == "equal")
    assert "| cost_aware " in (tmp_path / "fewer_queries.md").read_text()
