"""Mistakes that used to end in a traceback, or in nothing at all: one line, before the first step."""

import copy
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from flops_lightning.callbacks import RunSummary
from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.errors import SettingError
from flops_lightning.strategies import Backprop
from flops_lightning.tasks import ForwardImageClassifier
from tests.digits import MODEL, TINY, two_sites

IMAGES, LABELS = torch.zeros(12, 1, 8, 8), torch.arange(12) % 10
COMMAND = {
    "trainer": {
        "max_epochs": 1, "limit_train_batches": 2, "accelerator": "cpu", "logger": False, "num_sanity_val_steps": 0,
        "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False,
    },
    "model": {
        "class_path": "flops_lightning.tasks.ForwardImageClassifier",
        "init_args": {
            "model_name": "vit_tiny_patch16_224", "model_kwargs": TINY,
            "strategy": {"class_path": "flops_lightning.strategies.Backprop"},
        },
    },
    "data": {"class_path": "flops_lightning.datamodules.DigitsDataModule"},
}  # fmt: skip


class Given(LightningDataModule):
    """Batches and loaders of any kind."""

    num_classes = 10

    def __init__(self, batch: Any = (IMAGES, LABELS), loaders: int = 1) -> None:
        super().__init__()
        self.batch, self.loaders = batch, loaders

    def train_dataloader(self) -> Any:
        return DataLoader([self.batch] * 3, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> Any:
        loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=12)
        return [loader] * self.loaders if self.loaders > 1 else loader

    test_dataloader = val_dataloader


@pytest.fixture
def steps(monkeypatch):
    """Steps that an optimiser has made."""
    made: list[int] = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self, closure=None: made.append(1))
    return made


@pytest.mark.parametrize(
    "name", ["drop_path_rate", "proj_drop_rate", "attn_drop_rate", "drop_rate", "pos_drop_rate", "patch_drop_rate"]
)
def test_rates_of_dropout_are_refused_and_zero_is_accepted(name):
    def make(rate: float) -> ForwardImageClassifier:
        return ForwardImageClassifier(**{**MODEL, "model_kwargs": {**TINY, name: rate}})

    with pytest.raises(SettingError) as caught:
        make(0.1)
    assert str(caught.value) == (
        f"model_kwargs.{name} = 0.1: has no effect: queries run in eval mode and differ from the clean pass by their "
        "noise alone. Write 0 or leave it out."
    )
    make(0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_pool": ""}, r"model_kwargs = \(2, 5, 10\): is what the model returns for two images; a classifier "
         r"returns \(2, 10\). Leave out what changes it in model_kwargs, such as global_pool"),
        ({"features_only": True}, "model_kwargs.features_only = True: gives features, no logits. Remove"),
    ],
)  # fmt: skip
def test_a_model_that_returns_something_else_than_logits_is_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        ForwardImageClassifier(**{**MODEL, "model_kwargs": {**TINY, **settings}})


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": IMAGES, "label": LABELS}, r"data = 'dict': a batch must be a pair \(inputs, targets\)"),
        ((IMAGES, LABELS, LABELS), "data = 'list': a batch must be a pair"),
        ((IMAGES[0], LABELS), r"data = 'images of \(1, 8, 8\)': images must be a tensor \(b, channels, h"),
        (([IMAGES], LABELS), "data = 'list': images must be a tensor"),
        ((IMAGES.byte(), LABELS), "images must be floats"),
        ((IMAGES, LABELS.float()), r"data = 'targets of torch.float32 \(12,\)': for 12 images a classifier of 10 "
         r"classes takes integers \(12,\) or probabilities \(12, 10\). Return such targets from the data set"),
        ((IMAGES, LABELS[:, None]), r"targets of torch.int64 \(12, 1\)"),
        ((IMAGES, LABELS[:5]), r"targets of torch.int64 \(5,\)"),
        ((IMAGES, torch.zeros(12, 7)), r"targets of torch.float32 \(12, 7\)"),
        ((IMAGES, torch.nn.functional.one_hot(LABELS)), r"targets of torch.int64 \(12, 10\)"),
        ((IMAGES, torch.tensor(3)), r"targets of torch.int64 \(\)"),
        ((IMAGES, [*LABELS]), "data = 'targets of list'"),
        ((IMAGES, LABELS + 1), "data = 'labels from 1 to 10': the model has 10 classes, 0 to 9. Subtract 1 if"),
        ((IMAGES, LABELS + 2), "data = 'labels from 2 to 11': .* Give labels from 0 on, or a larger num_classes"),
        ((IMAGES, LABELS - 1), "data = 'labels from -1 to 8'"),
    ],
)  # fmt: skip
def test_batches_that_are_no_images_with_labels_are_refused(batch, message, make_task, make_trainer, steps):
    task, data = make_task(strategy=Backprop()), Given(batch)
    with pytest.raises(SettingError, match=message):
        make_trainer().fit(task, data)
    data.val_dataloader = data.test_dataloader = data.train_dataloader  # type: ignore[method-assign]
    with pytest.raises(SettingError, match=message):
        make_trainer().validate(task, data)
    with pytest.raises(SettingError, match=message):
        make_trainer().test(task, data)
    assert steps == []


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int16])
def test_labels_of_any_integer_type_train_like_those_of_64_bits(dtype, make_task, make_trainer):
    ends = []
    for labels in (LABELS, LABELS.to(dtype)):
        task = make_task()
        make_trainer().fit(task, Given((IMAGES, labels)))
        ends.append(torch.cat([p.detach().flatten() for p in task.parameters()]))
    assert torch.equal(*ends)


class Listed(torch.utils.data.Dataset[Any]):
    """Like the data sets of torchvision, whose ``targets`` tell the label of each image; the last is out of range."""

    targets = (0,) * 63 + (10,)

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        return IMAGES[0], self.targets[i]


@pytest.mark.parametrize("dataset", [Listed(), TensorDataset(torch.zeros(64, 1, 8, 8), torch.tensor(Listed.targets))])
def test_labels_that_a_data_set_tells_are_checked_before_the_first_step(dataset, make_task, make_trainer, steps):
    task, loader = make_task(strategy=Backprop()), DataLoader(dataset, batch_size=4)
    with pytest.raises(SettingError, match="data = 'labels from 0 to 10': the model has 10 classes"):
        make_trainer().fit(task, loader)
    good = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=4)
    with pytest.raises(SettingError, match="data = 'labels from 0 to 10'"):
        make_trainer(limit_val_batches=1.0).fit(task, good, loader)
    assert steps == []


def test_validation_takes_probabilities_as_training_does(make_task, make_trainer):
    task, soft = make_task(), torch.nn.functional.one_hot(LABELS, 10).float()
    found = [
        make_trainer().validate(task, DataLoader(TensorDataset(IMAGES, targets), batch_size=12), verbose=False)[0]
        for targets in (LABELS, soft)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_several_sets_to_validate_or_test_with_are_refused(make_task, make_trainer, steps):
    task = make_task(strategy=Backprop())
    message = r"{}_dataloader = '2 loaders': a classifier counts the images of a single loader. Return one"
    for sanity in (0, 1):
        with pytest.raises(SettingError, match=message.format("val")):
            make_trainer(num_sanity_val_steps=sanity).fit(task, Given(loaders=2))
    with pytest.raises(SettingError, match=message.format("val")):
        make_trainer().validate(task, Given(loaders=2))
    with pytest.raises(SettingError, match=message.format("test")):
        make_trainer().test(task, Given(loaders=2))
    assert steps == []


class Alone(ForwardImageClassifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_an_optimiser_without_a_schedule_is_refused(make_trainer, digits):
    task = Alone(**MODEL, strategy=Backprop())
    message = r"configure_optimizers = \['SGD'\]: must return one optimiser and one LambdaLR. Do not override it"
    with pytest.raises(SettingError, match=message):
        make_trainer().fit(task, digits)


def test_the_remedy_for_an_optimiser_alone_works(make_trainer, digits):
    class Both(ForwardImageClassifier):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)]

    trainer = make_trainer()
    trainer.fit(Both(**MODEL, strategy=two_sites()), digits)
    assert trainer.global_step == 3


def test_a_compiled_task_is_refused_at_once_and_only_where_it_trains(make_task, make_trainer, digits):
    compiled = torch.compile(make_task(), backend="eager")
    with pytest.raises(SettingError, match=r"torch.compile = 'ForwardImageClassifier': compiles training_step, .* Fit"):
        make_trainer().fit(compiled, digits)


@pytest.mark.parametrize(
    ("callback", "settings", "message"),
    [
        (EarlyStopping("val/acc"), {}, "EarlyStopping.monitor = 'val/acc': is never logged. Choose from train/loss, "),
        (ModelCheckpoint(monitor="accuracy"), {}, "ModelCheckpoint.monitor = 'accuracy': is never logged"),
        (EarlyStopping("val/loss"), {"limit_val_batches": 0}, "EarlyStopping.monitor = 'val/loss': is never logged"),
    ],
)
def test_a_metric_that_is_never_logged_is_found_before_the_first_step(
    callback, settings, message, make_task, make_trainer, digits, steps
):
    with pytest.raises(SettingError, match=message):
        make_trainer(callback, enable_checkpointing=True, **settings).fit(make_task(strategy=Backprop()), digits)
    assert steps == []


@pytest.mark.parametrize(
    "metric", ["val/loss", "val/accuracy", "train/loss", "train/accuracy", "queries/total", "step"]
)
def test_what_is_logged_can_be_monitored(metric, make_task, make_trainer, digits, tmp_path):
    saver = ModelCheckpoint(tmp_path, filename="x", monitor=metric)
    make_trainer(saver, enable_checkpointing=True, max_epochs=1).fit(make_task(), digits)
    assert (tmp_path / "x.ckpt").is_file()


def test_callbacks_of_ones_own_may_log_what_others_monitor(make_task, make_trainer, digits):
    class Logs(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            pl_module.log("mine", 1.0)

    trainer = make_trainer(Logs(), EarlyStopping("mine", check_on_train_epoch_end=True))
    trainer.fit(make_task(), digits)
    assert trainer.global_step == 3


def test_a_network_without_a_trainable_parameter_is_said_to_be_frozen(make_task):
    with pytest.raises(
        SettingError, match=r"VisionTransformer.*: all parameters are frozen, there is nothing to train"
    ):
        make_task(freeze="*", strategy=two_sites().__class__())


def test_a_run_without_test_images_trains_and_says_so(make_task, make_trainer, caplog):
    class Untested(DigitsDataModule):
        def setup(self, stage: str) -> None:
            if stage == "test":
                raise SettingError("data.test_share", 0.0, "has no images to test with.", "Set it above 0.")
            super().setup(stage)

    with caplog.at_level("INFO", logger="lightning.pytorch"):
        make_trainer(RunSummary(export_weights=False)).fit(make_task(), Untested(batch_size=32))
    assert "no test: data.test_share = 0.0: has no images to test with" in caplog.text
    assert "\nvalidation           " in caplog.text


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"val_check_interval": 3}, "trainer: `val_check_interval` (3) must be less than or equal to the number of"),
        (
            {"callbacks": [{"class_path": "EarlyStopping", "init_args": {"monitor": "val/acc"}}]},
            "EarlyStopping.monitor = 'val/acc': is never logged. Choose from train/loss, train/accuracy, train/lr, ",
        ),
    ],
)
def test_the_command_line_names_what_lightning_refuses_in_one_line(trainer, message, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    settings = copy.deepcopy(COMMAND)
    settings["trainer"] |= trainer
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(settings))
    assert refused("fit", "-c", "given.yaml").startswith(message)
