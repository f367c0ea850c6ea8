import json
import os
import zipfile
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO

from flops_lightning.callbacks import SaveOnSignal
from flops_lightning.cli.command import main
from flops_lightning.resume.checkpoint_files import AtomicCheckpointIO
from flops_lightning.resume.last import (
    job_version,
    last_checkpoint,
    started_again,
    with_checkpoint_io,
    with_savers,
    written_to,
)
from tests.resume.runs import NAME, write_config


@pytest.fixture(autouse=True)
def outside_slurm(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)


@pytest.fixture
def job(monkeypatch):
    for name, value in {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "9"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "8")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")


def checkpoint(path: Path, age: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x", "x")
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_whole_checkpoints_are_added_unless_somebody_else_writes_them():
    assert [type(each) for each in with_checkpoint_io(None)] == [AtomicCheckpointIO]
    own = TorchCheckpointIO()
    assert with_checkpoint_io(own) == [own]
    assert [type(each) for each in with_checkpoint_io(["precision"])] == [str, AtomicCheckpointIO]


def test_savers_are_added_where_there_are_none():
    assert [type(each) for each in with_savers(None)] == [ModelCheckpoint, SaveOnSignal]
    own, signals = ModelCheckpoint(), SaveOnSignal()
    assert with_savers([signals, own]) == [signals, own]
    assert [type(each) for each in with_savers(own)] == [ModelCheckpoint, SaveOnSignal]


def test_last_is_the_newest_whole_file_of_any_run_of_the_name(tmp_path):
    assert last_checkpoint(tmp_path, [tmp_path / "none"]) is None
    checkpoint(tmp_path / "version_0" / "checkpoints" / "epoch=3.ckpt", age=50)
    newest = checkpoint(tmp_path / "version_1" / "checkpoints" / "epoch=1.ckpt", age=10)
    damaged = tmp_path / "version_2" / "checkpoints" / "epoch=2.ckpt"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"half")
    (tmp_path / "version_1" / "checkpoints" / "last.ckpt").symlink_to("gone.ckpt")
    assert last_checkpoint(tmp_path, []) == newest
    elsewhere = checkpoint(tmp_path / "elsewhere" / "x.ckpt", age=5)
    assert last_checkpoint(tmp_path, [tmp_path / "elsewhere"]) == elsewhere


def test_under_slurm_the_runs_of_a_job_are_told_from_others(tmp_path, job):
    own = checkpoint(tmp_path / "job_8_2.0" / "checkpoints" / "x.ckpt", age=10)
    checkpoint(tmp_path / "job_8_21.0" / "checkpoints" / "x.ckpt", age=5)
    checkpoint(tmp_path / "version_0" / "checkpoints" / "x.ckpt", age=1)
    assert last_checkpoint(tmp_path, []) == own
    assert job_version(tmp_path) == "job_8_2.1"


def test_a_job_knows_whether_it_was_requeued(monkeypatch, job):
    assert not started_again()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert started_again()
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    assert not started_again()
    assert job_version(Path()) is None


def test_folders_are_read_from_the_settings_of_callbacks():
    given = [{"class_path": "x.RunSummary"}, {"class_path": "x.ModelCheckpoint", "init_args": {"dirpath": "here"}}]
    assert written_to(given) == [Path("here")]
    assert written_to(None) == []


def test_a_checkpoint_that_cannot_be_written_ends_the_command_with_the_reason(tmp_path, monkeypatch, refused):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AtomicCheckpointIO, "write", full)
    write_config(tmp_path, num_sanity_val_steps=0)
    line = refused("fit", "--config", f"{NAME}.yaml")
    assert line.startswith("epoch=0-step=1.ckpt could not be written to runs/run/version_0/checkpoints: No space")
    assert "There is no earlier checkpoint in it." in line


def test_last_goes_on_from_the_newest_run_or_begins_one(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, num_sanity_val_steps=0)
    for steps in ("2", "3"):
        main(["fit", "--config", f"{NAME}.yaml", "--ckpt_path", "last", "--trainer.max_steps", steps])
    (written,) = Path(f"runs/{NAME}/version_1/checkpoints").iterdir()
    assert written.name == "epoch=0-step=3.ckpt"
    assert json.loads(Path(f"runs/{NAME}/version_1/summary.json").read_text())["samples"] == 3 * 16
    elsewhere = ("--ckpt_path", "last", "--trainer.default_root_dir", "elsewhere")
    message = refused("test", "--config", f"{NAME}.yaml", *elsewhere)
    assert "ckpt_path = 'last': there is no checkpoint under elsewhere/run." in message
