"""The launcher of runs: what it repeats, refuses, and ends."""

import math
import os
import shlex
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from experiments import harness
from experiments.command_line import StudyParser, fit
from experiments.harness import Cell, RunFailedError, StudyStopped, claim, run_all
from flops_lightning.errors import SettingError


def writer(study: Path, name: str = "job", *, code: int = 0, says: str = "", **more: bool) -> Cell:
    """A run that notes in ``times`` that it ran, and leaves weights and a result unless it fails."""
    script = (
        f"import pathlib, sys; f = pathlib.Path({str(study / name)!r}); print({says!r})\n"
        f"(f.parent / 'times').open('a').write('x'); (f / 'model.safetensors').touch()\n"
        f"{code} or (f / 'summary.json').write_text('[3]'); sys.exit({code})"
    )
    return Cell(study, name, ("-c", script), **more)


def sleeper(study: Path, name: str, before: str = "", *, deaf: bool = False) -> Cell:
    """A run that notes its process and goes on for a minute."""
    script = (
        f"import os, pathlib, signal, time\n{'signal.signal(signal.SIGTERM, signal.SIG_IGN)' if deaf else ''}\n"
        f"pathlib.Path({str(study / 'pid')!r}).write_text(str(os.getpid()))\n{before}\ntime.sleep(60)"
    )
    return Cell(study, name, ("-c", script))


def times(folder: Path) -> int:
    return len((folder / "times").read_text()) if (folder / "times").exists() else 0


def ended(study: Path) -> bool:
    with suppress(ProcessLookupError):
        os.kill(int((study / "pid").read_text()), 0)
        return False
    return True


def test_a_finished_run_is_not_repeated_and_an_interrupted_one_starts_in_an_empty_folder(tmp_path: Path) -> None:
    cell = writer(tmp_path)
    (cell.folder / "version_0").mkdir(parents=True)
    (cell.folder / "events.out.tfevents.1").touch()  # left by an attempt that was interrupted
    (cell.folder / "version_0" / "summary.json").write_text('{"ste')  # cut short: it does not count
    assert not cell.finished
    for _ in range(2):
        assert run_all([cell, writer(tmp_path)], jobs=2)  # the same run twice
        assert times(tmp_path) == 1
    assert cell.summary == [3]
    assert {path.name for path in cell.folder.iterdir()} == {"summary.json", "command.json", "log.txt"}


def test_a_run_that_resumes_finds_its_checkpoint_and_another_keeps_its_weights(tmp_path: Path) -> None:
    for name, more in (("resumes", {"resumes": True}), ("keeps", {"keeps_weights": True})):
        cell = writer(tmp_path, name, **more)
        cell.folder.mkdir()
        (cell.folder / "left.txt").touch()
        run_all([cell])
        assert (cell.folder / "left.txt").exists() == cell.resumes
        assert (cell.folder / "model.safetensors").exists() == cell.keeps_weights


def test_curves_are_those_of_the_attempt_that_finished(tmp_path: Path) -> None:
    cell = Cell(tmp_path, "job", ())
    for version, losses in enumerate(([9.0], [4.0, 2.0, 1.0, 0.5])):
        with SummaryWriter(str(cell.folder / f"version_{version}")) as events:
            for step, loss in enumerate(losses):
                events.add_scalar("train/loss", loss, step)
    (cell.folder / "version_1" / "summary.json").write_text("{}")
    assert [(event.step, event.value) for event in cell.curve("train/loss")] == [(0, 4), (1, 2), (2, 1), (3, 0.5)]
    assert cell.late_loss == 0.5


def test_a_run_that_diverged_is_remembered_and_has_no_loss(tmp_path: Path) -> None:
    says = "11 steps in a row lost every query to non-finite losses (max_skipped_steps = 10)."
    cell = writer(tmp_path, code=2, says=says, may_diverge=True)
    for _ in range(2):
        run_all([cell])
        assert times(tmp_path) == 1
    assert (cell.diverged, cell.late_loss) == (True, math.inf)
    with pytest.raises(RunFailedError):  # elsewhere it is a failure
        run_all([writer(tmp_path, "other", code=2, says=says)])


def test_after_a_failing_run_the_rest_is_not_begun_unless_the_study_keeps_going(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [writer(tmp_path, "bad/job", code=3), *(writer(tmp_path, f"{i}/job") for i in range(20))]
    with pytest.raises(RunFailedError, match=r"bad/job: exit code 3, see log.txt there"):
        run_all(cells)
    assert times(tmp_path / "19") == 0
    capsys.readouterr()
    cells = [cells[0], writer(tmp_path, "good/job")]
    for _ in range(2):
        assert not run_all(cells, keep_going=True, outcome=lambda cell: f"{len(cell.name)} letters")
    assert (times(tmp_path / "bad"), times(tmp_path / "good")) == (3, 1)
    failed = f"FAILED: {tmp_path}/bad/job: exit code 3, see log.txt there"
    said = [f"[1/2] {failed}", "[2/2] good/job: 8 letters", f"[2/2] {failed}"]
    assert capsys.readouterr().out.splitlines() == said


def test_runs_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    for name, threads in (("shared", 0), ("own", 3)):
        script = f"import os, pathlib; pathlib.Path({str(tmp_path / name / 'summary.json')!r}).write_text("
        cell = Cell(tmp_path, name, ("-c", script + "'[' + os.environ['OMP_NUM_THREADS'] + ']')"))
        run_all([cell], jobs=2, threads=threads)
        assert cell.summary == [threads or 4]


def test_a_dry_run_prints_what_is_left_as_a_shell_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = [writer(tmp_path, "a b"), fit(tmp_path, "with space", ["x.yaml"], ["--model={a: 1}"], {})]
    run_all(cells[:1])
    capsys.readouterr()
    assert not run_all(cells, dry_run=True)
    assert shlex.split(capsys.readouterr().out) == cells[1].command
    assert not cells[1].folder.exists()
    assert run_all(cells[:1], dry_run=True)


def test_what_the_study_sets_overrules_the_users_arguments_and_these_the_files(tmp_path: Path) -> None:
    cell = fit(tmp_path, "a", ["base.yaml", "method.yaml"], ["--x", "7"], {"x": 3, "sites": [{"stages": None}]})
    assert cell.command == [
        sys.executable, "main.py", "fit", "--config", "base.yaml", "--config", "method.yaml", "--x", "7",
        "--trainer.default_root_dir", str(tmp_path / "a"), "--trainer.enable_progress_bar", "false", "--x", "3",
        "--sites", '[{"stages": null}]',
    ]  # fmt: skip


def test_a_run_with_other_settings_is_refused_wherever_its_folder_was_moved_to(tmp_path: Path) -> None:
    def cell(study: Path, value: str) -> Cell:
        return Cell(study, "job", ("-c", f"open({str(tmp_path / 'old/job/summary.json')!r}, 'w').write('{{}}')",
                                   str(study / "job"), value))  # fmt: skip

    run_all([cell(tmp_path / "old", "a")])
    (tmp_path / "old").rename(tmp_path / "new")
    run_all([cell(tmp_path / "new", "a")])
    assert not (tmp_path / "old").exists()
    for dry_run in (False, True):
        with pytest.raises(SettingError, match=r"--output = .*: holds job with other settings \(see command.json in"):
            run_all([cell(tmp_path / "new", "b")], dry_run=dry_run)


def test_a_folder_serves_one_study(tmp_path: Path) -> None:
    for _ in range(2):
        claim(tmp_path / "study", {"config": ["a.yaml"], "steps": (1, 2)})
    with pytest.raises(SettingError, match="holds a study with other settings"):
        claim(tmp_path / "study", {"config": ["b.yaml"], "steps": (1, 2)})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--jobs", "0"], "--jobs = 0: must be 1 or more."),
        (["--seeds", "0"], "--seeds = 0: must be 1 or more."),
        (["--seeds", "3"], "Run from the repository's root."),
    ],
)
def test_mistakes_end_with_a_message(
    given: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    parser = StudyParser("``python -m experiments.name --output DIR``: what it is.", seeds=(5, "seeds"))
    with pytest.raises(SystemExit, match="2"):
        parser.run(lambda _: pytest.fail("ran"), ["--output", "out", *given])
    said = capsys.readouterr().err
    assert "python -m experiments.name: error: " in said
    assert message in said


TERMINATE = "os.kill(os.getppid(), signal.SIGTERM)"


@pytest.mark.parametrize(
    ("before", "deaf"),
    [(TERMINATE, False), (f"{TERMINATE}; time.sleep(1); {TERMINATE}", True)],
    ids=["first", "second"],
)
def test_a_signal_ends_the_runs_and_begins_no_other(before: str, deaf: bool, tmp_path: Path) -> None:
    handler, start = signal.getsignal(signal.SIGTERM), time.monotonic()
    cells = [sleeper(tmp_path, "long", before, deaf=deaf), writer(tmp_path, "next/job")]
    with pytest.raises(StudyStopped, match="the same command continues"):
        run_all(cells)
    assert time.monotonic() - start < 30
    assert ended(tmp_path)
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not (tmp_path / "next").exists()
    run_all(cells[1:])  # the next study is another
    assert times(tmp_path / "next") == 1


def beside(study: Path, name: str, then: str) -> Cell:
    """A run that waits for the sleeper."""
    wait = f"import os, sys, time\nwhile not os.path.exists({str(study / 'pid')!r}): time.sleep(0.01)\n"
    return Cell(study, name, ("-c", wait + then))


@pytest.mark.parametrize("deaf", [False, True])
def test_a_failure_ends_the_runs_beside_it(deaf: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "GRACE", 0.2)  # after which a run that ignores the signal is killed
    start = time.monotonic()
    with pytest.raises(RunFailedError, match="failing: exit code 3"):
        run_all([sleeper(tmp_path, "long", deaf=deaf), beside(tmp_path, "failing", "sys.exit(3)")], jobs=2)
    assert time.monotonic() - start < 30
    assert ended(tmp_path)


def test_an_exception_of_the_study_ends_the_runs(tmp_path: Path) -> None:
    def fails(cell: Cell) -> str:
        raise OSError(f"no space for the table of {cell.name}")

    quick = beside(tmp_path, "quick", f"open({str(tmp_path / 'quick/summary.json')!r}, 'w').write('1')")
    with pytest.raises(OSError, match="no space for the table of quick"):
        run_all([sleeper(tmp_path, "long"), quick], jobs=2, outcome=fails)
    assert ended(tmp_path)
