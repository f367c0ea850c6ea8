from __future__ import annotations

import csv
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from experiments import compare_strategies
from experiments.compare_strategies import METHODS, Study, check_output, run_all
from experiments.running import RUNNING, StudyStopped
from experiments.strategies_budget import Cell, Reference, cell, steps_for
from experiments.strategies_plot import draw
from experiments.strategies_runs import Job, fit
from experiments.strategies_table import Row, Run, mean_cosine, report, table, write_cosines, write_csv
from flops_lightning.errors import SettingError
from flops_lightning.plan.cost import Cost, typical_seconds

ROOT = Path(__file__).parent.parent.parent
# 12 epochs of 19 batches of 64 and one of 41, 80 queries a sample.
REFERENCE = Reference(240, 12 * 1257, 80.0 * 12 * 1257, 20.0 * 12 * 1257)
LIMITS = {"max_steps_factor": 50.0, "max_minutes": 20.0}


def cost(queries: float, equivalents: float, once: float = 0.0, seconds: float = 0.1) -> Cost:
    return Cost(queries, equivalents, once, once, seconds, seconds_once=0.0)


# -- budgets and steps -------------------------------------------------------------------------------------------------


def test_the_reference_buys_its_own_steps_with_the_last_smaller_batches_counted() -> None:
    assert steps_for("queries", cost(80, 20), REFERENCE) == 240
    assert steps_for("forward_equivalents", cost(80, 20), REFERENCE) == 240


def test_a_cheaper_step_buys_more_of_them() -> None:
    assert steps_for("queries", cost(2, 2), REFERENCE) == 40 * 240
    assert steps_for("forward_equivalents", cost(2, 2), REFERENCE) == 10 * 240
    assert steps_for("forward_equivalents", cost(80, 80), REFERENCE) == 60


def test_what_is_spent_once_comes_off_the_budget() -> None:
    once = 385.0 * 64
    steps = steps_for("queries", cost(80, 40, once), REFERENCE)
    spent = once + steps * 80 * REFERENCE.samples_per_step
    assert abs(spent - REFERENCE.queries) <= 80 * REFERENCE.samples_per_step / 2  # to the nearest step
    assert steps == 235


def test_without_queries_a_method_makes_the_steps_of_the_reference_and_the_table_says_so() -> None:
    backprop = cost(0, 3)
    assert cell("queries", backprop, REFERENCE, **LIMITS) == Cell(
        240, note="no queries: as many steps as the reference"
    )
    assert cell("forward_equivalents", backprop, REFERENCE, **LIMITS) == Cell(1600)


def test_a_cell_is_infeasible_beyond_the_limits_with_the_reason() -> None:
    mezo = cost(2, 2)
    assert cell("queries", mezo, REFERENCE, **LIMITS).reason == ""
    assert cell("queries", mezo, REFERENCE, max_steps_factor=39, max_minutes=1e9).reason == (
        "9,600 steps, 40 times those of the reference (limit 39)"
    )
    slow = cost(80, 20, seconds=6.0)
    assert cell("queries", slow, REFERENCE, **LIMITS).reason == "240 steps would take 24 minutes (limit 20)"
    assert "first step alone" in cell("queries", cost(80, 20, once=1e9), REFERENCE, **LIMITS).reason


def test_a_cost_is_read_from_the_difference_of_steps() -> None:
    spent = [1000.0 + 160.0 * (i + 1) for i in range(4)]
    curves = {"queries": spent, "forward_equivalents": [q / 4 for q in spent]}
    seconds = typical_seconds([0.5, 3.5, 0.5])
    read = Cost.of(curves, [2, 2, 2, 2], seconds=seconds, seconds_once=3.0)
    assert (read.queries, read.queries_once) == (80.0, 1000.0)
    assert (read.forward_equivalents, read.forward_equivalents_once) == (20.0, 250.0)
    assert (read.seconds, read.seconds_once) == (0.5, 3.0)  # one slow step is not the rule


# -- runs --------------------------------------------------------------------------------------------------------------


def writer(folder: Path, *, text: str = "{}", code: int = 0, said: str = "") -> Job:
    """A job that writes its result and notes that it was run."""
    script = (
        f"import pathlib, sys; f = pathlib.Path({str(folder)!r}); print({said!r})\n"
        f"(f.parent / 'times').open('a').write('x')\n"
        f"{code} or (f / 'summary.json').write_text({text!r}); (f / 'model.safetensors').touch(); sys.exit({code})"
    )
    return Job(folder, (sys.executable, "-c", script))


def times(folder: Path) -> int:
    return len((folder / "times").read_text())


def test_a_finished_run_is_not_repeated_and_an_interrupted_one_is(tmp_path: Path) -> None:
    job = writer(tmp_path / "job", text='{"steps": 3}')
    job.folder.mkdir()
    (job.folder / "log.txt").write_text("interrupted")
    for _ in range(2):
        run_all(
            [job, writer(tmp_path / "job", text='{"steps": 3}')], "test", 2, threads=1
        )  # two budgets may share a run
        assert times(tmp_path) == 1
    assert job.output == {"steps": 3}
    assert not (job.folder / "model.safetensors").exists()


def test_a_run_that_diverged_is_remembered_and_has_no_loss(tmp_path: Path) -> None:
    said = "11 steps in a row lost every query to non-finite losses (max_skipped_steps = 10)."
    job = writer(tmp_path / "job", code=2, said=said)
    for _ in range(2):
        run_all([job], "test", 1, threads=1)
    assert times(tmp_path) == 1
    assert job.diverged
    assert job.late_loss == math.inf


def test_a_failing_run_says_where_its_output_is_and_the_rest_is_not_begun(tmp_path: Path) -> None:
    jobs = [writer(tmp_path / "bad" / "job", code=3), *(writer(tmp_path / str(i) / "job") for i in range(20))]
    with pytest.raises(RuntimeError, match=r"bad/job: exit code 3, see log.txt there"):
        run_all(jobs, "test", 1, threads=1)
    assert not (tmp_path / "19" / "times").exists()


def test_a_signal_ends_the_runs_and_begins_no_other(tmp_path: Path) -> None:
    script = (
        f"import os, pathlib, signal, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        "os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    )
    jobs = [Job(tmp_path / "long", (sys.executable, "-c", script)), writer(tmp_path / "next" / "job")]
    before, start = signal.getsignal(signal.SIGTERM), time.monotonic()
    with pytest.raises(StudyStopped, match="the same command goes on"), RUNNING.ended_by_signals():
        run_all(jobs, "test", 1, threads=1)
    assert time.monotonic() - start < 30
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) == before
    assert not (tmp_path / "next").exists()
    run_all(jobs[1:], "test", 1, threads=1)  # the next study is another
    assert times(tmp_path / "next") == 1


def test_lines_are_written_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_all([writer(tmp_path / str(i)) for i in range(2)], "training", 1, threads=1)
    assert capsys.readouterr().out.splitlines() == [f"[{i + 1}/2] training: {tmp_path / str(i)}" for i in range(2)]


def test_what_the_study_sets_rules_over_the_users_arguments_and_these_over_the_files(tmp_path: Path) -> None:
    job = fit(tmp_path, ["base.yaml", "method.yaml"], ["--trainer.max_epochs", "7"], {"seed_everything": 3}, steps=400)
    command = list(job.command)
    assert command[1:7] == ["main.py", "fit", "--config", "base.yaml", "--config", "method.yaml"]
    assert command.index("7") < command.index("-1")
    pairs = dict(zip(command[7::2], command[8::2], strict=True))
    assert pairs["--trainer.max_epochs"] == "-1"
    assert pairs["--trainer.max_steps"] == "400"
    assert pairs["--trainer.log_every_n_steps"] == "2"
    assert pairs["--seed_everything"] == "3"


def test_a_folder_serves_one_configuration(tmp_path: Path) -> None:
    for _ in range(2):
        check_output(tmp_path / "study", {"config": ["a.yaml"], "extra": []})
    with pytest.raises(SettingError, match="holds runs of another configuration"):
        check_output(tmp_path / "study", {"config": ["b.yaml"], "extra": []})


# -- a study whose runs are finished -----------------------------------------------------------------------------------


def finish(job: Job, **values: Any) -> None:
    usual = {
        "start_accuracy": 0.14, "test_accuracy": 0.9, "steps": 240, "samples": 15084, "queries": 1206720,
        "forward_equivalents": 301680.0, "train_seconds": 24.0, "peak_memory_mb": 900.0, "peak_memory_of": "process",
    }  # fmt: skip
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "summary.json").write_text(json.dumps({**usual, **values}))
    (job.folder / "model.safetensors").touch()


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """`lr` and `mezo`, all runs in place."""
    monkeypatch.chdir(ROOT)
    costs = {"lr": cost(80, 20), "mezo": cost(2, 2)}
    curves: dict[str, float] = {"lr_0.0003": 0.5, "lr_0.001": 0.3, "lr_0.003": 0.4}
    monkeypatch.setattr(Study, "costs", costs)
    monkeypatch.setattr(
        Job, "curve", lambda job, _: ([curves[next(p for p in job.folder.parts if p in curves)]] * 8, [0.0] * 8)
    )
    monkeypatch.setattr(compare_strategies.Job, "run", lambda job, _: pytest.fail(f"ran {job.folder}"))
    arguments = ["--config", "configs/vit_tiny_digits.yaml", "--output", str(tmp_path), "--methods", *costs]
    options = compare_strategies._parser().parse_args([*arguments, "--seeds", "3", "--max-steps-factor", "30"])
    study = Study(options)
    finish(study.reference_job)
    for method in costs:
        finish(study.probe(method))
        for job in study.tuning(method).values():
            finish(job)
    for i, job in enumerate(study.finals()):
        finish(job, test_accuracy=0.90 + 0.01 * (i % 3))
    for method in costs:
        for where in ("start", "end"):
            job = study.cosine(method, where)
            job.folder.mkdir(parents=True)
            (job.folder / "cosines.json").write_text(json.dumps({"cosines": [[0.1, 0.3], [0.2, 0.2]]}))
    return study


def test_cosines_of_other_numbers_are_measured_anew(finished: Study) -> None:
    """The report says over how many batches and draws they are."""
    assert finished.cosine("lr", "start").finished
    for name in ("batches", "draws"):
        setattr(finished.options, name, getattr(finished.options, name) + 1)
        assert not finished.cosine("lr", "start").finished


def test_a_finished_study_only_writes_its_tables(finished: Study, capsys: pytest.CaptureFixture[str]) -> None:
    finished.run()
    text = (finished.output / "strategies.md").read_text()
    assert "## Equal total queries: 1,206,720 queries" in text
    assert "| mezo | - | - | infeasible: 9,600 steps, 40 times those of the reference (limit 30) |" in text
    assert "| mezo | 0.001 | 2,400 |" in text
    with (finished.output / "strategies.csv").open() as file:
        rows = list(csv.DictReader(file))
    # lr makes the same steps under both budgets, and its runs serve twice.
    assert [(row["method"], row["budget"], row["seed"]) for row in rows] == [
        *(("lr", "queries", str(seed)) for seed in range(3)),
        *(("lr", "forward_equivalents", str(seed)) for seed in range(3)),
        *(("mezo", "forward_equivalents", str(seed)) for seed in range(3)),
    ]
    assert {row["cosine"] for row in rows} == {"0.2"}
    if find_spec("matplotlib"):
        assert (finished.output / "strategies.png").stat().st_size > 10_000
    assert "training: about" in capsys.readouterr().out


def test_rates_are_tried_at_a_part_of_the_steps_of_the_first_feasible_budget(finished: Study) -> None:
    assert finished.tuning_steps("lr") == 60
    assert finished.tuning_steps("mezo") == 600
    assert finished.rates == {"lr": 1e-3, "mezo": 1e-3}
    seeds = {job.folder.name for job in finished.tuning("lr").values()}
    assert seeds == {"seed_1000"}
    assert not seeds & {job.folder.name for job in finished.finals()}


def test_one_rate_needs_no_tuning(finished: Study) -> None:
    finished.options.rates = [2e-3]
    study = Study(finished.options)
    assert study.tuning("lr") == {}
    assert study.rates == {"lr": 2e-3, "mezo": 2e-3}


def test_a_method_that_diverges_at_every_rate_is_infeasible(finished: Study) -> None:
    for job in finished.tuning("mezo").values():
        (job.folder / "diverged").touch()
    study = Study(finished.options)
    assert study.row("forward_equivalents", "mezo", {}).cell.reason == "it diverged at every learning rate"
    assert all("mezo" not in job.folder.parts for job in study.finals())


def test_without_matplotlib_the_study_ends_with_its_tables(
    finished: Study, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    finished.run()
    assert "no plot: matplotlib = None: is not installed" in capsys.readouterr().out
    assert (finished.output / "strategies.md").exists()


# -- tables ------------------------------------------------------------------------------------------------------------


def runs(accuracies: Sequence[float | None]) -> list[Run]:
    return [
        Run(seed, None if a is None else {
            "test_accuracy": a, "queries": 1000 + seed, "forward_equivalents": 50.4, "train_seconds": 10.0 + seed,
            "peak_memory_mb": 900.0 + seed, "peak_memory_of": "process",
        })
        for seed, a in enumerate(accuracies)
    ]  # fmt: skip


COSINES = {"start": [[0.1, 0.3], [0.2, 0.2]], "end": [[0.5]]}


def line(row: Row) -> list[str]:
    return [entry.strip() for entry in table([row]).splitlines()[2].strip("|").split("|")]


def test_a_line_gives_mean_and_range_and_what_it_cost() -> None:
    row = Row("lr", Cell(240), 1e-3, edge=False, runs=runs([0.9, 0.95, 0.94]), cosines=COSINES)
    assert line(row) == [
        "lr", "0.001", "240", "93.0% (90.0% - 95.0%)", "1,001", "50", "11", "902", "0.2 ± 0.08", "0.5 ± 0",
    ]  # fmt: skip
    assert mean_cosine(COSINES) == pytest.approx((0.2 + 0.5) / 2)


def test_marks_for_edges_notes_divergence_and_what_is_infeasible() -> None:
    assert line(Row("bp", Cell(240, note="no queries"), 3e-3, edge=True, runs=runs([0.9])))[:2] == [
        "bp (no queries)", r"0.003 \*",
    ]  # fmt: skip
    assert line(Row("es", Cell(9), 1e-3, runs=runs([0.9, None])))[3] == "90.0% (90.0% - 90.0%), 1 of 2 diverged"
    assert line(Row("es", Cell(9), 1e-3, runs=runs([None, None])))[3] == "diverged (2 of 2)"
    assert line(Row("mezo", Cell(9, "too slow"), cosines=COSINES))[3:] == [
        "infeasible: too slow", "-", "-", "-", "-", "0.2 ± 0.08", "0.5 ± 0",
    ]  # fmt: skip


def test_the_report_says_where_time_and_memory_come_from() -> None:
    rows = {"queries": [Row("lr", Cell(240), 1e-3, runs=runs([0.9]))]}
    about = dict.fromkeys(("configs", "start_accuracy", "rates", "tuning", "cosines", "processes"), "@")
    text = report(rows, REFERENCE, about)
    assert "of the whole process" in text
    assert "max_memory_allocated" not in text
    assert f"{REFERENCE.queries:,.0f} queries" in text


def test_the_plot_is_drawn_from_the_tables_with_runs_missing(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [Row("lr", Cell(9), 1e-3, runs=runs([0.9, None]), cosines=COSINES), Row("mezo", Cell(9, "slow"))]
    write_csv(tmp_path / "strategies.csv", {"queries": rows, "forward_equivalents": rows[1:]})
    write_cosines(tmp_path / "cosines.csv", {"lr": COSINES, "mezo": COSINES})
    with (tmp_path / "strategies.csv").open() as file:
        assert [row["accuracy"] for row in csv.DictReader(file)] == ["0.9", ""]
    draw(tmp_path)
    assert (tmp_path / "strategies.png").stat().st_size > 10_000


# -- settings and the real thing ---------------------------------------------------------------------------------------


def test_every_method_has_its_overlay() -> None:
    assert {path.stem for path in (ROOT / "configs" / "method").glob("*.yaml")} == set(METHODS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "lr", "nothing"], "configs/method/nothing.yaml is not here"),
        (["--tuning-fraction", "0"], "--tuning-fraction 0 is not in"),
        (["--seeds", "0"], "--seeds 0 is below 1"),
    ],
)
def test_wrong_settings_are_refused(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        compare_strategies.main(["--config", "x.yaml", "--output", str(tmp_path / "out"), *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a dozen processes, each of which imports everything
def test_a_short_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    study = ["--config", "configs/vit_tiny_digits.yaml", "--output", str(tmp_path), "--methods", "bp", "lr"]
    few = [
        "--seeds",
        "1",
        "--jobs",
        "2",
        "--rates",
        "1e-3",
        "--batches",
        "1",
        "--draws",
        "2",
        "--",
        "--trainer.max_epochs=1",
    ]
    compare_strategies.main([*study, *few, "--trainer.limit_train_batches=6"])
    with (tmp_path / "strategies.csv").open() as file:
        rows = {(row["method"], row["budget"]): row for row in csv.DictReader(file)}
    assert float(rows["lr", "queries"]["queries"]) == 6 * 64 * 80
    assert rows["lr", "queries"]["steps"] == rows["bp", "queries"]["steps"] == "6"
    lr, bp = (float(rows[name, "forward_equivalents"]["forward_equivalents"]) for name in ("lr", "bp"))
    assert bp == pytest.approx(lr, abs=0.5 * 3 * 64)  # to the nearest step
    with (tmp_path / "cosines.csv").open() as file:
        cosines = {(row["method"], row["weights"], row["draw"]): float(row["cosine"]) for row in csv.DictReader(file)}
    assert all(value == pytest.approx(1.0, abs=1e-5) for (name, *_), value in cosines.items() if name == "bp")
    assert 0.1 < cosines["lr", "start", "0"] < 0.95
    assert cosines["lr", "start", "0"] != cosines["lr", "start", "1"]
    assert cosines["lr", "start", "0"] != cosines["lr", "end", "0"]
