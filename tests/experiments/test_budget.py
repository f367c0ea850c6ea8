import math
from pathlib import Path

import numpy as np
import pytest

from experiments import budget, budget_rule
from experiments.budget import ALLOCATORS, PROBLEMS, sites_with, splitting
from experiments.budget_rule import relative
from experiments.budget_tables import lower_bound
from experiments.tables import read_csv
from flops_lightning import allocators


def test_bounds_and_ratios() -> None:
    # Student's t with two degrees of freedom: 2.92.
    assert lower_bound([-1.0, 0.0, 1.0]) == pytest.approx(-2.92 / 3**0.5, abs=1e-3)
    assert lower_bound([0.3]) == -math.inf
    tables = {"rule": np.array([[1.0, 3.0]] * 4), "2": np.array([[4.0, 1.0]] * 4), "8": np.array([[0.0, 2.0]] * 4)}
    found = relative(tables, "rule", np.random.default_rng(0))
    assert (found["ratio"], found["low"], found["high"], found["best"]) == (0.75, 0.75, 0.75, "2")


def test_every_file_and_class_is_there() -> None:
    assert [each.config for each in PROBLEMS.values() if not Path(each.config).is_file()] == []
    assert all(hasattr(allocators, name) for name in ALLOCATORS.values())
    assert splitting("equal", "queries")[0]["init_args"]["allocator"]["init_args"] == {}
    sites = sites_with(PROBLEMS["digits"].config, 3)
    assert [(site["name"], site["queries_per_sample"]) for site in sites[:2]] == [("lower", 3), ("middle", 3)]


@pytest.mark.study
@pytest.mark.usefixtures("forked_runs")
def test_short_studies(tmp_path: Path) -> None:
    short = ["--", "--data.init_args.batch_size=8", "--trainer.limit_train_batches=3", "--trainer.limit_val_batches=1"]
    arguments = [
        "--problem",
        "digits",
        "--seeds",
        "1",
        "--jobs",
        "2",
        "--arms",
        "queries_muon",
        "2_equal",
        "--queries",
        "30",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PROBLEMS, "digits", budget.Problem(PROBLEMS["digits"].config, (1e-3,), {}))
        budget.main([*arguments, "--output", str(tmp_path / "budget"), *short, "--trainer.max_epochs=1"])
    fixed, chosen, pairs = read_csv(tmp_path / "budget" / "budget.csv")
    assert float(fixed["queries_and_clean"]) == 3 * 8 * 81
    assert float(chosen["queries_and_clean"]) >= 0.3 * 3 * 8 * 81
    # Two queries at each of three sites, and a clean pass.
    assert float(pairs["queries_and_clean"]) == int(pairs["steps"]) * 8 * 7
    files = ["configs/vit_tiny_digits.yaml", "configs/allocators/least_compute.yaml"]
    few = ["--batches", "2", "--steps", "2", "3", "--output", str(tmp_path / "rule")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget_rule, "SEEN", 20)
        budget_rule.main(["--config", *files, *few, "--", "--data.init_args.batch_size=8"])
    rows = read_csv(tmp_path / "rule" / "budget_rule.csv")
    assert [row["step"] for row in rows] == ["2", "3"]
    assert all(float(row["exact_total"]) > 0 for row in rows)
