"""A run that is stopped and resumed sees the batches of the uninterrupted one, wherever it was stopped."""

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint

from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.resume.loop_progress import settle_progress

BATCHES, STEPS = 5, 17  # 1257 images in batches of 300; the run ends within the fourth epoch


class StoppedError(Exception):
    pass


class Recorder(LightningModule):
    """Keeps epoch, number and content of every batch that it learns from."""

    automatic_optimization = False

    def __init__(self, *, stop: int = 0, estimate: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.stop, self.estimate = stop, estimate
        self.seen: list[Any] = []
        self.epoch_ends: list[int] = []
        self.validations: list[tuple[int, int, int]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.estimate:  # as schedules do; Lightning then prepares the loader before it restores the loops
            assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if self.stop and self.global_step >= self.stop:
            raise StoppedError
        torch.rand(self.global_step + 1)  # what a step draws is no concern of the data's
        self.seen.append((self.current_epoch, batch_idx, batch[0].numpy().tobytes(), batch[1].numpy().tobytes()))
        self.optimizers().step()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", batch[0].mean())
        self.validations.append((self.current_epoch, self.global_step, batch_idx))

    def on_train_epoch_end(self) -> None:
        self.epoch_ends.append(self.current_epoch)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        settle_progress(checkpoint)


class SaveAt(Callback):
    """Saves at a hook, once a certain number of steps is done, and stops the run."""

    def __init__(self, hook: str, step: int, path: str) -> None:
        def save(trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == step and not trainer.sanity_checking:
                trainer.save_checkpoint(path)
                raise StoppedError

        setattr(self, hook, save)


def run(folder, *callbacks, resume=None, workers=0, estimate=True, stop=0, by_steps=False, data=None, **settings):
    seed_everything(5)
    length = {"max_steps": STEPS, "max_epochs": -1} if by_steps else {"max_epochs": 3}
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[*callbacks],
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        default_root_dir=folder, num_sanity_val_steps=0, **{"limit_val_batches": 0, **length, **settings},
    )  # fmt: skip
    module = Recorder(stop=stop, estimate=estimate)
    data = DigitsDataModule(batch_size=300, num_workers=workers, mixup_alpha=0.2, **(data or {}))
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume)
    except StoppedError:
        assert stop or callbacks
    return module


def steps(module: Recorder) -> list[tuple[int, int]]:
    return [(epoch, i) for epoch, i, *_ in module.seen]


@pytest.mark.parametrize(("workers", "then"), [(0, 0), (2, 2), (2, 0)])
def test_a_checkpoint_within_an_epoch_goes_on_with_the_next_batch(workers, then, tmp_path):
    whole = run(tmp_path)
    assert steps(whole) == [(epoch, i) for epoch in range(3) for i in range(BATCHES)]
    assert len({batch for *_, batch, _ in whole.seen}) == len(whole.seen)

    saving = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=4, save_top_k=-1, filename="{step}")
    run(tmp_path, saving, workers=workers, stop=9)  # saved after steps 4 and 8, and dies in the tenth
    rest = run(tmp_path, resume=tmp_path / "saved" / "step=8.ckpt", workers=then)
    assert rest.seen == whole.seen[8:]


HOOKS = {
    "before the first epoch": ("on_train_start", 0),
    "after a batch": ("on_train_batch_end", 7),
    "after the last batch": ("on_train_batch_end", 5),
    "within a step": ("on_train_batch_start", 7),
    "at the end of an epoch": ("on_train_epoch_end", 5),
    "before an epoch": ("on_train_epoch_start", 5),
    "after a validation within an epoch": ("on_validation_end", 8),
    "after a validation at its end": ("on_validation_end", 5),
}


@pytest.mark.parametrize(("by_steps", "estimate"), [(True, True), (False, True), (False, False)])
@pytest.mark.parametrize("where", HOOKS)
def test_wherever_a_run_was_stopped_it_goes_on_exactly(where, by_steps, estimate, tmp_path):
    hook, step = HOOKS[where]
    settings: dict[str, Any] = {"by_steps": by_steps, "estimate": estimate}
    if "validation" in where:
        settings |= {"limit_val_batches": 1, "val_check_interval": 3 if "within" in where else 1.0}
    whole = run(tmp_path, **settings)
    first = run(tmp_path, SaveAt(hook, step, f"{tmp_path}/1.ckpt"), **settings)
    # Stopped once more, within the next epoch.
    then = run(tmp_path, SaveAt("on_train_batch_end", 9, f"{tmp_path}/2.ckpt"), resume=f"{tmp_path}/1.ckpt", **settings)
    rest = run(tmp_path, resume=f"{tmp_path}/2.ckpt", **settings)
    assert first.seen + then.seen + rest.seen == whole.seen
    assert rest.epoch_ends == [epoch for epoch in whole.epoch_ends if epoch >= 1]


def test_an_epoch_left_after_its_last_batch_is_ended_when_the_run_goes_on(tmp_path):
    run(tmp_path, SaveAt("on_train_batch_end", 5, f"{tmp_path}/1.ckpt"))
    rest = run(tmp_path, resume=f"{tmp_path}/1.ckpt")
    assert rest.epoch_ends == [0, 1, 2]
    assert steps(rest) == [(epoch, i) for epoch in (1, 2) for i in range(BATCHES)]


def test_a_run_of_so_many_steps_can_be_made_longer(tmp_path):
    whole = run(tmp_path, max_steps=13, max_epochs=-1)
    saving = ModelCheckpoint(tmp_path / "saved", filename="end")
    first = run(tmp_path, saving, max_steps=7, max_epochs=-1)  # saved where it ends, which is within an epoch
    rest = run(tmp_path, resume=tmp_path / "saved" / "end.ckpt", max_steps=13, max_epochs=-1)
    assert first.seen + rest.seen == whole.seen


def test_epochs_cut_short_by_the_trainer_go_on_as_well(tmp_path):
    whole = run(tmp_path, limit_train_batches=3)
    for step in (2, 3, 7):
        first = run(tmp_path, SaveAt("on_train_batch_end", step, f"{tmp_path}/{step}.ckpt"), limit_train_batches=3)
        rest = run(tmp_path, resume=f"{tmp_path}/{step}.ckpt", limit_train_batches=3)
        assert first.seen + rest.seen == whole.seen


def test_a_loop_of_ones_own_saves_and_loads_the_loaders_state():
    data = DigitsDataModule(batch_size=300)
    data.setup("fit")
    whole = [labels.tolist() for _, labels in data.train_dataloader()]
    loader = data.train_dataloader()
    loader.batches_done = None
    batches = iter(loader)
    begun = [next(batches)[1].tolist() for _ in range(2)]
    state = loader.state_dict()
    other = data.train_dataloader()
    other.batches_done = None
    other.load_state_dict(state)
    assert begun + [labels.tolist() for _, labels in other] == whole


MOMENTS = [("on_train_start", 0), ("on_train_epoch_start", 0), ("on_train_epoch_start", BATCHES)]
MOMENTS += [("on_train_batch_start", 1), ("on_train_batch_end", 1), ("on_train_batch_end", BATCHES)]
MOMENTS += [("on_train_epoch_end", BATCHES), ("on_train_end", BATCHES)]


@pytest.mark.parametrize(("hook", "step"), MOMENTS)
def test_progress_that_is_settled_stays_as_it_is(tmp_path, hook, step):
    run(tmp_path, SaveAt(hook, step, str(tmp_path / "c.ckpt")), max_epochs=1 if hook == "on_train_end" else 3)
    checkpoint = torch.load(tmp_path / "c.ckpt", weights_only=False)
    settle_progress(checkpoint)
    once = copy.deepcopy(checkpoint["loops"])
    settle_progress(checkpoint)
    assert checkpoint["loops"] == once
    progress = once["fit_loop"]["epoch_progress"]
    assert progress["current"]["processed"] == (step == BATCHES and hook != "on_train_batch_end")


WITH_VALIDATION = [
    ({}, "on_train_batch_end", BATCHES),
    ({}, "on_train_batch_end", BATCHES - 1),
    ({}, "on_validation_start", BATCHES),
    ({}, "on_validation_batch_end", 2 * BATCHES),
    ({}, "on_validation_end", BATCHES),
    ({}, "on_train_epoch_end", BATCHES),
    ({}, "on_train_epoch_start", BATCHES),
    ({}, "on_train_batch_start", BATCHES),
    ({"val_check_interval": 2}, "on_train_batch_end", 2),
    ({"val_check_interval": 2}, "on_train_batch_end", 3),
    ({"val_check_interval": 2}, "on_validation_batch_end", 4),
    ({"val_check_interval": 2}, "on_validation_end", 7),
    ({"val_check_interval": 2}, "on_train_batch_start", 4),
    ({"val_check_interval": 2}, "on_train_batch_end", BATCHES),
    ({"check_val_every_n_epoch": 2}, "on_train_batch_end", BATCHES),
    ({"check_val_every_n_epoch": 2}, "on_train_batch_end", 2 * BATCHES),
]


@pytest.mark.parametrize(("settings", "hook", "step"), WITH_VALIDATION)
def test_a_validation_that_was_due_or_under_way_is_run_and_none_twice(tmp_path, settings, hook, step):
    def saver(name: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / name, monitor="val", save_top_k=-1)

    settings, path = {"limit_val_batches": 2, **settings}, tmp_path / "c.ckpt"
    whole = run(tmp_path, saver("whole"), **settings)
    first = run(tmp_path, saver("resumed"), SaveAt(hook, step, str(path)), **settings)
    # What else runs in the hooks of these two moments comes too late for the checkpoint, and is over when it is used.
    at_the_end = hook in ("on_validation_end", "on_train_epoch_end")
    stopping = [] if at_the_end else [EarlyStopping("val", patience=99)]  # wants a validation in every epoch
    rest = run(tmp_path, saver("resumed"), *stopping, resume=path, **settings)
    steps = torch.load(path, weights_only=False)["global_step"]
    assert first.seen[:steps] + rest.seen == whole.seen
    if hook == "on_validation_batch_end":
        assert first.validations.pop() == rest.validations[0]  # it begins anew
    assert first.validations + rest.validations == whole.validations
    if not at_the_end:
        names = [sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("whole", "resumed")]
        assert names[0] == names[1]
