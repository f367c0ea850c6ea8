import json
import os
import zipfile
from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

from flops_lightning.callbacks import SaveOnSignal
from flops_lightning.cli.command import main
from flops_lightning.resume.checkpoint_files import AtomicCheckpointIO
from flops_lightning.resume.last import (
    job_version,
    last_checkpoint,
    runs_of_logger,
    started_again,
    with_checkpoint_io,
    with_savers,
    written_to,
)
from tests.resume.runs import NAME, SETTINGS, write_config


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


def test_below_folders_of_ones_own_files_are_looked_for_as_deep_as_their_names_have_slashes(tmp_path):
    settings = {"dirpath": str(tmp_path), "filename": "{epoch}-{val/loss:.2f}"}
    folders = [tmp_path / "epoch=0-val", tmp_path / "name", tmp_path / "name" / "version_0"]
    folders[-1].mkdir(parents=True)
    folders[0].mkdir()
    found = written_to({"class_path": "ModelCheckpoint", "init_args": settings})
    assert sorted(found) == [tmp_path, *folders[:2]]


@pytest.mark.parametrize("name", ["TensorBoardLogger", "CSVLogger", "WandbLogger"])
def test_local_loggers_say_where_their_runs_lie(name):
    logger = {"class_path": f"lightning.pytorch.loggers.{name}", "init_args": {"save_dir": "logs", "name": "mine"}}
    expected = None if name == "WandbLogger" else Path("logs/mine")
    assert runs_of_logger(logger) == runs_of_logger([logger, {"class_path": "CSVLogger"}]) == expected


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


SLASHES = {
    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
    "init_args": {"filename": "{epoch}-{val/accuracy:.3f}-{step}", "monitor": "val/accuracy", "mode": "max"},
}
LOCAL = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "tables", "name": "mine"}}


@pytest.mark.parametrize(
    ("settings", "folder"),
    [
        ({}, f"runs/{NAME}/version_0/checkpoints"),
        ({"logger": False}, "runs/checkpoints"),
        ({"logger": LOCAL}, "tables/mine/version_0/checkpoints"),
        ({"dirpath": "mine"}, "mine"),
    ],
)
def test_last_finds_checkpoints_whose_names_have_slashes(settings, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saver = {**SLASHES, "init_args": {**SLASHES["init_args"], "dirpath": settings.pop("dirpath", None)}}
    write_config(tmp_path, num_sanity_val_steps=0, callbacks=[*SETTINGS["trainer"]["callbacks"][:2], saver], **settings)
    for epochs in ("1", "2"):
        main(["fit", "--config", f"{NAME}.yaml", "--ckpt_path", "last", "--trainer.max_epochs", epochs])
    written = [*Path(folder).glob("epoch=0-val/accuracy=0.*-step=4.ckpt")]
    assert len(written) == 1
    newest = max(tmp_path.rglob("summary.json"), key=lambda file: file.stat().st_mtime_ns)
    assert json.loads(newest.read_text())["samples"] == 2 * 4 * 16  # of both runs


@pytest.mark.parametrize("where", ["version_0/checkpoints/last.ckpt", "version_0/epoch=1.ckpt", "version_0/x/y/z.ckpt"])
def test_a_run_is_not_started_over_where_its_checkpoints_do_not_fit(where, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, num_sanity_val_steps=0)
    stray = Path(f"runs/{NAME}") / where
    stray.parent.mkdir(parents=True)
    stray.write_bytes(b"half")
    for command in ("fit", "test"):
        message = refused(command, "--config", f"{NAME}.yaml", "--ckpt_path", "last")
        assert message == (
            f"ckpt_path = 'last': {stray} is not a complete checkpoint in a folder `checkpoints`, and there is no "
            "other. Give the path of one, or move it away to start over."
        )


def test_a_logger_that_alone_knows_its_folder_needs_a_path(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    write_config(tmp_path, logger={"class_path": f"{__name__}.Elsewhere"})
    message = refused("fit", "--config", f"{NAME}.yaml", "--ckpt_path", "last")
    assert message == "ckpt_path = 'last': the logger alone knows where its runs lie. Give the path of a checkpoint."


class Elsewhere(CSVLogger):
    def __init__(self) -> None:
        super().__init__("elsewhere")
