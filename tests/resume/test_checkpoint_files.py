import os
import resource
import socket
import subprocess
import sys
import time

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader

from flops_lightning.callbacks import SaveOnSignal
from flops_lightning.errors import CheckpointError
from flops_lightning.resume.checkpoint_files import AtomicCheckpointIO, newest_checkpoint
from tests.digits import quiet_trainer

SMALL, LARGE = {"a": torch.ones(10)}, {"a": torch.ones(100_000)}


def names_in(folder):
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def full_disk():
    """No file of this process may grow beyond 20 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_earlier_file_and_says_how_to_go_on(tmp_path, full_disk):
    writer = AtomicCheckpointIO()
    writer.save_checkpoint(SMALL, tmp_path / "x.ckpt")
    with pytest.raises(CheckpointError) as refusal:
        writer.save_checkpoint(LARGE, tmp_path / "x.ckpt")
    assert str(refusal.value) == (
        f"x.ckpt could not be written to {tmp_path}: File too large. The last good checkpoint is {tmp_path}/x.ckpt. "
        "Make room there or choose another folder (trainer.default_root_dir), then go on with --ckpt_path "
        f"{tmp_path}/x.ckpt."
    )
    assert names_in(tmp_path) == ["x.ckpt"]
    assert torch.equal(torch.load(tmp_path / "x.ckpt")["a"], SMALL["a"])


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "last.ckpt").symlink_to("gone.ckpt")
    assert newest_checkpoint([tmp_path]) is None
    (tmp_path / "taken").write_text("")
    with pytest.raises(CheckpointError, match=r"x.ckpt could not be written to .*/taken: .*There is no earlier"):
        AtomicCheckpointIO().save_checkpoint(SMALL, tmp_path / "taken" / "x.ckpt")


def test_the_file_gets_its_name_only_when_it_is_whole(tmp_path):
    class Looking(AtomicCheckpointIO):
        def write(self, checkpoint, partial):
            super().write(checkpoint, partial)
            seen.append((partial.parent, partial.suffix, torch.load(tmp_path / "x.ckpt")["a"].numel()))

    seen = []
    AtomicCheckpointIO().save_checkpoint(SMALL, tmp_path / "x.ckpt")
    with pytest.raises((AttributeError, TypeError, RuntimeError)):  # what cannot be pickled leaves nothing behind
        AtomicCheckpointIO().save_checkpoint({"a": lambda: None}, tmp_path / "x.ckpt")
    assert names_in(tmp_path) == ["x.ckpt"]
    Looking().save_checkpoint(LARGE, tmp_path / "x.ckpt")
    assert seen == [(tmp_path, ".partial", 10)]
    assert torch.load(tmp_path / "x.ckpt")["a"].numel() == 100_000


def test_saving_through_a_link_replaces_the_link(tmp_path):
    AtomicCheckpointIO().save_checkpoint(SMALL, tmp_path / "best.ckpt")
    (tmp_path / "last.ckpt").symlink_to("best.ckpt")
    AtomicCheckpointIO().save_checkpoint(LARGE, tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "best.ckpt")["a"].numel() == 10


@pytest.mark.parametrize("way", ["save", "load"])
def test_files_left_by_killed_runs_are_removed_and_those_of_living_ones_are_not(tmp_path, way):
    gone = subprocess.run(  # a number that was a process
        [sys.executable, "-c", "import os; print(os.getpid())"], check=True, capture_output=True
    )
    here = socket.gethostname()
    AtomicCheckpointIO().save_checkpoint(SMALL, tmp_path / "x.ckpt")
    names = {
        "killed": f".{here}-{int(gone.stdout)}.partial",
        "alive": f".{here}-{os.getppid()}.partial",
        "elsewhere": ".another-machine-7.partial",
        "elsewhere, long ago": ".another-machine-8.partial",
    }
    for name in names.values():
        (tmp_path / name).write_bytes(b"half")
    os.utime(tmp_path / names["elsewhere, long ago"], (time.time() - 1e6,) * 2)
    if way == "save":
        AtomicCheckpointIO().save_checkpoint(SMALL, tmp_path / "y.ckpt")
    else:
        AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt", weights_only=True)
    assert {p.name for p in tmp_path.glob(".*")} == {names["alive"], names["elsewhere"]}


class Line(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch):
        return self.layer(batch).sum()

    def validation_step(self, batch):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder, *callbacks, **settings):
    own = {"default_root_dir": folder, "enable_checkpointing": True, "plugins": [AtomicCheckpointIO()]}
    return quiet_trainer(*callbacks, **{**own, "max_epochs": 2, **settings})


DATA = DataLoader(torch.ones(3, 1))


def test_an_exception_in_a_step_does_not_write_its_half(tmp_path):
    class Fails(Callback):
        def on_before_optimizer_step(self, trainer, *_):
            if trainer.global_step == 4:
                raise ValueError("a bug")

    saver = ModelCheckpoint(tmp_path, filename="only", save_on_exception=True, enable_version_counter=False)
    with pytest.raises(ValueError, match="a bug"), pytest.warns(UserWarning, match="in the middle of a step"):
        trainer(tmp_path, saver, Fails()).fit(Line(), DATA)
    assert torch.load(tmp_path / "only.ckpt", weights_only=False)["global_step"] == 3


def test_the_old_best_goes_only_after_the_new_one_is_there(tmp_path):
    class Fills(AtomicCheckpointIO):
        saved = 0

        def write(self, checkpoint, partial):
            self.saved += 1
            if self.saved > 1:
                raise OSError(28, "No space left on device")
            super().write(checkpoint, partial)

    run = trainer(tmp_path, ModelCheckpoint(tmp_path / "c"), plugins=[Fills()])
    with pytest.raises(CheckpointError, match=r"No space left on device.*epoch=0-step=3.ckpt"):
        run.fit(Line(), DATA)
    assert names_in(tmp_path / "c") == ["epoch=0-step=3.ckpt"]
    resumed = trainer(tmp_path)
    resumed.fit(Line(), DATA, ckpt_path=tmp_path / "c" / "epoch=0-step=3.ckpt", weights_only=False)
    assert resumed.global_step == 6


class Stops(Callback):
    """Ends a run like a kill, and notes the (epoch, batch) that it saw."""

    def __init__(self, after):
        self.after, self.seen = after, []

    def on_train_batch_start(self, trainer, _, batch, batch_idx):
        if trainer.global_step == self.after:
            raise ValueError("stopped")
        self.seen.append((trainer.current_epoch, batch_idx))


@pytest.mark.parametrize("kills", [(3, 4, 5), (1, 3), (2, 3, 6, 7), (3, 6, 8)])
def test_runs_left_at_the_end_of_an_epoch_and_again_within_the_next_repeat_no_step(tmp_path, kills):
    path, seen = None, []
    for after in (*kills, -1):
        stops = Stops(after)
        saver = ModelCheckpoint(tmp_path, filename="only", every_n_train_steps=1, enable_version_counter=False)
        run = trainer(tmp_path, stops, saver, SaveOnSignal(), max_epochs=3, num_sanity_val_steps=0)
        try:
            run.fit(Line(), DATA, DATA, ckpt_path=path, weights_only=False)
        except ValueError:
            path = tmp_path / "only.ckpt"
        seen += stops.seen
    assert seen == [(epoch, batch) for epoch in range(3) for batch in range(3)]
    assert run.global_step == 9
