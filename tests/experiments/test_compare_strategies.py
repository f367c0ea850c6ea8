from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from experiments import compare_strategies, rates
from experiments.compare_strategies import METHODS, Study, command_line
from experiments.harness import Cell
from experiments.pictures import pareto
from experiments.rates import Choice
from experiments.strategies_table import Budget, Length, Reference, Row, length, strategies_table
from experiments.tables import read_csv
from flops_lightning.plan.cost import Cost
from tests.experiments.fakes import SUMMARY, entries, finish

# 12 epochs of 19 batches of 64 and one of 41, 80 queries a sample.
REFERENCE = Reference(240, 12 * 1257, 80.0 * 12 * 1257, 20.0 * 12 * 1257)
RATES = (3e-4, 1e-3, 3e-3)
LIMITS = {"max_steps_factor": 50.0, "max_minutes": 20.0}


def cost(queries: float, equivalents: float, once: float = 0.0, seconds: float = 0.1) -> Cost:
    return Cost(queries, equivalents, once, once, seconds, seconds_once=0.0)


EQUIVALENTS = Budget("forward_equivalents")
FREE = "no queries: the reference's steps"
SHORT, DEAR = {"max_steps_factor": 39, "max_minutes": 1e9}, "the first step alone costs more than the budget"


@pytest.mark.parametrize(
    ("costs", "limits", "by_queries", "by_equivalents"),
    [
        (cost(80, 20), LIMITS, Length(240), Length(240)),
        (cost(2, 2), LIMITS, Length(40 * 240), Length(10 * 240)),
        (cost(80, 80), LIMITS, Length(240), Length(60)),
        (cost(80, 40, 385.0 * 64), LIMITS, Length(235), Length(110)),  # spent once
        (cost(0, 3), LIMITS, Length(240, note=FREE), Length(1600)),
        (cost(2, 2), SHORT, Length(9600, "9,600 steps, 40 times those of the reference (limit 39)"), Length(2400)),
        (cost(80, 80, seconds=6.0), LIMITS, Length(240, "240 steps would take 24 minutes (limit 20)"), Length(60)),
        (cost(80, 20, once=1e9), LIMITS, Length(0, DEAR), Length(0, DEAR)),
    ],
)
def test_steps_that_a_budget_buys_or_why_it_is_infeasible(
    costs: Cost, limits: dict[str, float], by_queries: Length, by_equivalents: Length
) -> None:
    assert length(Budget("queries"), costs, REFERENCE, **limits) == by_queries
    assert length(EQUIVALENTS, costs, REFERENCE, **limits) == by_equivalents


def test_a_share_of_the_budget_buys_its_share_of_the_steps() -> None:
    half = Budget("queries", 50)
    assert length(half, cost(80, 20), REFERENCE, **LIMITS) == Length(120)
    assert length(half, cost(0, 3), REFERENCE, **LIMITS) == Length(120, note=FREE)
    assert length(half, cost(80, 40, 385.0 * 64), REFERENCE, **LIMITS) == Length(115)  # what is spent once, wholly
    assert half.title == "equal total queries, 50 % of the reference's"


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_runs: None) -> Study:
    """`lr` and `mezo`, all runs in place."""
    costs = {"lr": cost(80, 20), "mezo": cost(2, 2)}
    losses = {"lr_0.0003": 0.5, "lr_0.001": 0.3, "lr_0.003": 0.4, "lr_0.01": 0.4}
    late_loss = property(lambda c: float("inf") if c.diverged else losses[c.folder.parts[-3]])
    monkeypatch.setattr(Study, "costs", costs)
    monkeypatch.setattr(Cell, "late_loss", late_loss)
    given = ["--config", "configs/vit_tiny_digits.yaml", "--output", str(tmp_path), "--methods", *costs]
    study = Study(command_line().parse([*given, "--seeds", "3", "--max-steps-factor", "30"]))
    finish(study.reference_run.folder)
    for method in costs:
        for cell in (study.probe(method), *(study.tuning(method, rate) for rate in RATES)):
            finish(cell.folder)
        for where in ("start", "end"):
            finish(study.cosine(method, where).folder, file="cosines.json", cosines=[[0.1, 0.3], [0.2, 0.2]])
    assert study.tune()
    for i, cell in enumerate(study.finals()):
        finish(cell.folder, test_accuracy=0.90 + 0.01 * (i // 3))
    return study


def test_a_run_of_so_many_steps_ends_there_and_cosines_of_other_numbers_are_measured_anew(finished: Study) -> None:
    command = finished.training("lr", 1e-3, 400, 3).command
    settings = dict(zip(command[3::2], command[4::2], strict=True))
    names = ("trainer.max_epochs", "trainer.max_steps", "trainer.log_every_n_steps", "seed_everything")
    assert [settings[f"--{name}"] for name in names] == ["-1", "400", "2", "3"]
    assert finished.cosine("lr", "start").finished
    for name in ("batches", "draws"):
        setattr(finished.options, name, getattr(finished.options, name) + 1)
        assert not finished.cosine("lr", "start").finished


def test_a_finished_study_only_writes_its_tables(finished: Study, capsys: pytest.CaptureFixture[str]) -> None:
    (finished.finals()[-1].folder / "diverged").touch()  # of mezo, with seed 2
    finished.run()
    text = (finished.output / "strategies.md").read_text()
    assert "## Equal total queries: 1,206,720 queries" in text
    lines = [row[:4] for row in entries(text)]
    assert ["mezo", "-", "-", "infeasible: 9,600 steps, 40 times those of the reference (limit 30)"] in lines
    assert ["mezo", "0.001", "2,400", "90.5% (90.0% - 91.0%), 1 of 3 diverged"] in lines
    # lr makes the same steps under both budgets, and its runs serve twice.
    rows = read_csv(finished.output / "strategies.csv")
    table = [("lr", "queries"), ("lr", "forward_equivalents"), ("mezo", "forward_equivalents")]
    assert [(row["method"], row["budget"], row["seed"]) for row in rows] == [(*r, s) for r in table for s in "012"]
    assert rows[-1]["accuracy"] == ""
    assert {row["cosine"] for row in rows} == {"0.2"}
    assert "of the whole process" in text
    assert "max_memory_allocated" not in text
    if find_spec("matplotlib"):
        assert all((finished.output / f"{name}.png").stat().st_size > 10_000 for name in ("strategies", "pareto"))
    assert "training: about" in capsys.readouterr().out


def test_rates_are_tried_at_a_part_of_the_steps_of_the_first_feasible_budget(finished: Study) -> None:
    assert (finished.tuning_steps("lr"), finished.tuning_steps("mezo")) == (60, 600)
    assert {method: choice.rate for method, choice in finished.choices.items()} == {"lr": 1e-3, "mezo": 1e-3}
    assert finished.tuning("lr", 1e-3).name == "runs/lr/lr_0.001/steps_60/seed_1000"
    assert "seed_1000" not in {cell.folder.name for cell in finished.finals()}


def test_budgets_are_chosen_by_kind_and_share(finished: Study) -> None:
    finished.options.budgets, finished.options.shares = ["queries"], [25.0, 100.0]
    study = Study(finished.options)
    assert study.budgets == [Budget("queries"), Budget("queries", 25.0)]
    assert study.tuning_steps("lr") == 60  # of the largest
    assert study.length(study.budgets[1], "mezo").steps == 2400


def test_one_rate_needs_no_tuning_and_a_method_that_diverges_at_every_rate_is_infeasible(
    finished: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "EXTENSIONS", 0)
    for rate in RATES:
        (finished.tuning("mezo", rate).folder / "diverged").touch()
    study = Study(finished.options)
    assert study.tune()
    assert study.row(EQUIVALENTS, "mezo", {}).length.reason == "it diverged at every learning rate"
    assert all("mezo" not in cell.folder.parts for cell in study.finals())
    finished.options.rates = [2e-3]
    study = Study(finished.options)
    assert study.tune()
    assert study.choices == {"lr": Choice(2e-3), "mezo": Choice(2e-3)}


def summaries(*accuracies: float | None) -> dict[int, dict[str, Any] | None]:
    rising = ("queries", "train_seconds", "peak_memory_mb")
    return {
        seed: None if a is None else {**SUMMARY, "test_accuracy": a, **{name: SUMMARY[name] + seed for name in rising}}
        for seed, a in enumerate(accuracies)
    }


COSINES = {"start": [[0.1, 0.3], [0.2, 0.2]], "end": [[0.5]]}


def line(row: Row) -> list[str]:
    return entries(strategies_table([row]))[1]


def test_a_line_gives_mean_and_range_what_it_cost_and_its_marks() -> None:
    row = Row("lr", Length(240), 1e-3, edge=False, summaries=summaries(0.9, 0.95, 0.94), cosines=COSINES)
    spent = ["1,206,721", "301,680", "25", "902"]
    assert line(row) == ["lr", "0.001", "240", "93.0% (90.0% - 95.0%)", *spent, "0.2 ± 0.08", "0.5 ± 0"]
    assert row.mean_cosine == pytest.approx((0.2 + 0.5) / 2)
    noted = Row("bp", Length(240, note="no queries"), 3e-3, edge=True, summaries=summaries(0.9))
    assert line(noted)[:2] == ["bp (no queries)", r"0.003 \*"]
    assert line(Row("es", Length(9), 1e-3, summaries=summaries(None, None)))[3] == "diverged (2 of 2)"
    slow = Row("mezo", Length(9, "too slow"), cosines=COSINES)
    assert line(slow)[3:] == ["infeasible: too slow", *"----", "0.2 ± 0.08", "0.5 ± 0"]


def test_the_pareto_front_holds_what_nothing_cheaper_equals() -> None:
    points = {"a": (1.0, 50.0), "b": (2.0, 50.0), "c": (3.0, 80.0), "d": (3.0, 70.0), "e": (9.0, 79.0)}
    assert pareto(points) == ["a", "c"]
    assert pareto({**points, "f": (9.0, 90.0)}) == ["a", "c", "f"]


def test_every_method_has_its_overlay() -> None:
    assert {path.stem for path in Path("configs/method").glob("*.yaml")} == set(METHODS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--methods", "lr", "nothing"], "--methods = 'nothing': has no configs/method/nothing.yaml."),
        (["--shares", "100", "-1"], "--shares = -1.0: must be a number above 0."),
        (["--tuning-fraction", "0"], "--tuning-fraction = 0.0: must be above 0 and at most 1."),
    ],
)
def test_wrong_settings_are_refused(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        compare_strategies.main(["--config", "x.yaml", "--output", str(tmp_path / "out"), *given])
    assert message in capsys.readouterr().err


@pytest.mark.study
@pytest.mark.timeout(1200)  # a dozen processes, each of which imports everything
@pytest.mark.usefixtures("forked_runs")
def test_a_short_study(tmp_path: Path) -> None:
    study = ["--config", "configs/vit_tiny_digits.yaml", "--output", str(tmp_path), "--methods", "bp", "lr"]
    few = ["--seeds", "1", "--jobs", "2", "--rates", "1e-3", "--batches", "1", "--draws", "2"]
    short = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=6", "--data.init_args.batch_size=16"]
    compare_strategies.main([*study, *few, "--", *short])
    rows = {(row["method"], row["budget"]): row for row in read_csv(tmp_path / "strategies.csv")}
    assert float(rows["lr", "queries"]["queries"]) == 6 * 16 * 80
    assert rows["lr", "queries"]["steps"] == rows["bp", "queries"]["steps"] == "6"
    lr, bp = (float(rows[name, "forward_equivalents"]["forward_equivalents"]) for name in ("lr", "bp"))
    assert bp == pytest.approx(lr, abs=0.5 * 3 * 16)  # to the nearest step
    cosines = [(row["method"], float(row["cosine"])) for row in read_csv(tmp_path / "cosines.csv")]
    assert [value for name, value in cosines if name == "bp"] == pytest.approx([1.0] * 4, abs=1e-5)
    estimates = {value for name, value in cosines if name == "lr"}  # other at each draw and at the end
    assert len(estimates) == 4
    assert all(0.1 < value < 0.95 for value in estimates)
