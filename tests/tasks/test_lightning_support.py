"""The tables of docs/lightning.md hold for the installed Lightning: each callback and setting works, or is refused."""

import inspect
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F

from flops_lightning.callbacks import ForwardOnly
from flops_lightning.errors import SettingError
from flops_lightning.strategies import MeZO
from flops_lightning.tasks import ForwardModule
from tests.digits import QUIET

PAGE = (Path(__file__).parents[2] / "docs" / "lightning.md").read_text(encoding="utf-8")


def table(first: str) -> dict[str, tuple[str, str]]:
    """Name -> what the page says of tasks and of ``ForwardOnly``."""
    rows = PAGE.split(f"| {first} | tasks |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {name.strip("`"): (tasks, unchanged) for name, tasks, unchanged in cells}


CALLBACKS, SETTINGS = table("callback"), table("setting")


def test_the_tables_have_every_callback_and_setting_of_the_installed_version():
    assert list(CALLBACKS) == sorted(lightning_callbacks.__all__)
    assert list(SETTINGS) == [name for name in inspect.signature(pl.Trainer).parameters if name != "self"]


class Data(pl.LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 8

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(32, 6, generator=generator), torch.randint(3, (32,), generator=generator)
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=self.batch_size)

    val_dataloader = train_dataloader


class Shared(pl.LightningModule):
    lr = 0.1

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.backbone = self.net[0]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", F.cross_entropy(self.net(batch[0]), batch[1]))


class Task(Shared, ForwardModule):
    def __init__(self) -> None:
        super().__init__(strategy=MeZO(seed=0), optimizer={"name": "sgd", "lr": 0.1})
        self.stage(self.net)

    def loss(self, outputs: Any, targets: Any) -> Any:
        return F.cross_entropy(outputs, targets, reduction="none")


class Unchanged(Shared):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=self.lr)


Module = type[Task] | type[Unchanged]


def fit(module: Module, folder: Path, *callbacks: Any, **settings: Any) -> tuple[pl.Trainer, Tensor]:
    """The trainer and the parameters after two epochs."""
    made = module()
    own = [ForwardOnly(MeZO(seed=0))] if module is Unchanged else []
    usual = {
        **QUIET, "max_epochs": 2, "default_root_dir": folder, "enable_checkpointing": False, "num_sanity_val_steps": 0,
        "callbacks": [*own, *callbacks],
    }  # fmt: skip
    trainer = pl.Trainer(**{**usual, **settings})
    trainer.fit(made, Data())
    return trainer, torch.cat([p.detach().float().flatten() for p in made.parameters()])


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> dict[Module, Tensor]:
    """Parameters after a run with nothing special."""
    return {module: fit(module, tmp_path_factory.mktemp("usual"))[1] for module in (Task, Unchanged)}


class Unfreezes(lightning_callbacks.BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer)


class Writes(lightning_callbacks.BasePredictionWriter):
    def write_on_batch_end(self, *_: Any) -> None:
        raise AssertionError("no prediction was asked for")


LISTED = {
    # callback: what it is given, steps of the run, whether it changes the parameters, a column of the log
    "BackboneFinetuning": ({"unfreeze_backbone_at_epoch": 1}, 8, True, ""),
    "BaseFinetuning": ({}, 8, True, ""),
    "BasePredictionWriter": ({}, 8, False, ""),
    "BatchSizeFinder": ({"max_trials": 2}, None, True, ""),
    "DeviceStatsMonitor": ({"cpu_stats": True}, 8, False, "cpu_percent"),
    "EMAWeightAveraging": ({"decay": 0.5}, 8, True, ""),
    "EarlyStopping": ({"monitor": "val", "min_delta": 10.0, "patience": 1}, 8, False, ""),
    "GradientAccumulationScheduler": ({"scheduling": {0: 2}}, 4, True, ""),
    "LambdaCallback": ({}, 8, False, ""),
    "LearningRateFinder": ({"num_training_steps": 5}, 8, False, ""),
    "LearningRateMonitor": ({}, 8, False, "lr"),
    "ModelCheckpoint": ({"every_n_train_steps": 1}, 8, False, ""),
    "ModelPruning": ({"pruning_fn": "l1_unstructured", "amount": 0.5}, 8, True, ""),
    "ModelSummary": ({}, 8, False, ""),
    "OnExceptionCheckpoint": ({}, 8, False, ""),
    "RichModelSummary": ({}, 8, False, ""),
    "RichProgressBar": ({}, 8, False, ""),
    "SpikeDetection": ({"rtol": 1e9}, 8, False, ""),
    "StochasticWeightAveraging": ({"swa_lrs": 0.01, "swa_epoch_start": 1}, 8, True, ""),
    "TQDMProgressBar": ({}, 8, False, ""),
    "ThroughputMonitor": ({"batch_size_fn": lambda batch: len(batch[0])}, 8, False, "train/samples"),
    "Timer": ({"duration": timedelta(hours=1)}, 8, False, ""),
    "WeightAveraging": ({}, 8, True, ""),
}
ABSTRACT = ("Callback", "Checkpoint", "ProgressBar")
OWN = {"BaseFinetuning": Unfreezes, "BasePredictionWriter": Writes}


@pytest.mark.parametrize("module", [Task, Unchanged])
@pytest.mark.parametrize("name", [name for name in CALLBACKS if name not in ABSTRACT])
def test_callbacks_do_their_work_or_are_refused(tmp_path, usual, name, module):
    given, steps, changes, column = LISTED[name]
    if name == "DeviceStatsMonitor":
        pytest.importorskip("psutil", reason="the callback reads a CPU's figures by psutil")
    if name in ("ModelCheckpoint", "OnExceptionCheckpoint"):
        given = {**given, "dirpath": tmp_path / "saved"}
    callback = OWN.get(name, getattr(lightning_callbacks, name))(**given)
    settings = {
        "logger": CSVLogger(tmp_path) if column else False, "enable_checkpointing": "Checkpoint" in name,
        "enable_progress_bar": "Progress" in name, "enable_model_summary": "Summary" in name, "log_every_n_steps": 1,
    }  # fmt: skip
    if CALLBACKS[name][module is Unchanged].startswith("refused"):
        with pytest.raises(SettingError, match=f"trainer.callbacks = '{type(callback).__name__}': "):
            fit(module, tmp_path, callback, **settings)
        return
    trainer, parameters = fit(module, tmp_path, callback, **settings)
    assert steps in (None, trainer.global_step)
    assert torch.equal(parameters, usual[module]) is not changes
    assert not column or column in (Path(trainer.logger.log_dir) / "metrics.csv").read_text().splitlines()[0]
    assert bool(list(tmp_path.glob("saved/*.ckpt"))) is (name == "ModelCheckpoint")
    if name.endswith("Finetuning"):
        assert len(trainer.optimizers[0].param_groups) == 2


@pytest.mark.parametrize("module", [Task, Unchanged])
def test_a_callback_stops_or_saves_when_it_should(tmp_path, module):
    stops = lightning_callbacks.EarlyStopping("val", min_delta=10.0, patience=1)
    assert fit(module, tmp_path, stops, max_epochs=5)[0].global_step == 8
    with pytest.raises(TrainingSpikeException):  # every loss is above -1 times the mean of those before
        fit(module, tmp_path, lightning_callbacks.SpikeDetection(mode="max", rtol=0.0, atol=0.0))
    saver = lightning_callbacks.OnExceptionCheckpoint(tmp_path / "saved")

    class Fails(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            assert trainer.global_step < 3

    with pytest.raises(AssertionError):
        fit(module, tmp_path, saver, Fails(), enable_checkpointing=True)
    (file,) = (tmp_path / "saved").glob("*.ckpt")
    assert torch.load(file, weights_only=True)["global_step"] == 3


def test_checkpoints_by_time_are_refused_for_tasks(tmp_path):
    saver = lightning_callbacks.ModelCheckpoint(tmp_path, train_time_interval=timedelta(minutes=1))
    with pytest.raises(SettingError, match=r"ModelCheckpoint.train_time_interval = '0:01:00': is never due .*every_n_"):
        fit(Task, tmp_path, saver, enable_checkpointing=True)


VALUES: dict[str, tuple[Any, int, bool]] = {
    # setting: a value that it does not have otherwise, steps of the run, whether it changes the parameters
    "accelerator": ("auto", 8, False),
    "strategy": ("auto", 8, False),
    "devices": ("auto", 8, False),
    "num_nodes": (1, 8, False),
    "precision": ("bf16-mixed", 8, True),
    "logger": (DummyLogger(), 8, False),
    "fast_dev_run": (3, 3, True),
    "max_epochs": (3, 12, True),
    "min_epochs": (2, 8, False),
    "max_steps": (5, 5, True),
    "min_steps": (1, 8, False),
    "max_time": ("00:01:00:00", 8, False),
    "limit_train_batches": (3, 6, True),
    "limit_val_batches": (1, 8, False),
    "limit_test_batches": (1, 8, False),
    "limit_predict_batches": (1, 8, False),
    "overfit_batches": (1, 2, True),
    "val_check_interval": (2, 8, False),
    "check_val_every_n_epoch": (2, 8, False),
    "num_sanity_val_steps": (1, 8, False),
    "log_every_n_steps": (2, 8, False),
    "enable_checkpointing": (True, 8, False),
    "enable_progress_bar": (True, 8, False),
    "enable_model_summary": (True, 8, False),
    "accumulate_grad_batches": (2, 4, True),
    "gradient_clip_val": (0.01, 8, True),
    "gradient_clip_algorithm": ("value", 8, False),
    "deterministic": (True, 8, False),
    "benchmark": (False, 8, False),
    "inference_mode": (False, 8, False),
    "use_distributed_sampler": (False, 8, False),
    "profiler": ("simple", 8, False),
    "detect_anomaly": (True, 8, False),
    "barebones": (True, 8, False),
    "plugins": ([MixedPrecision("bf16-mixed", "cpu")], 8, True),
    "sync_batchnorm": (True, 8, False),
    "reload_dataloaders_every_n_epochs": (1, 8, False),
    "enable_autolog_hparams": (False, 8, False),
}


@pytest.mark.filterwarnings("ignore:.*below what torch.bfloat16 resolves", "ignore:.*has no effect")
@pytest.mark.parametrize("module", [Task, Unchanged])
@pytest.mark.parametrize("name", VALUES)
def test_settings_work_or_are_refused(tmp_path, usual, name, module):
    value, steps, changes = VALUES[name]
    if SETTINGS[name][module is Unchanged].startswith("refused"):
        with pytest.raises(SettingError, match=rf"trainer\.{name} = "):
            fit(module, tmp_path, **{name: value})
        return
    trainer, parameters = fit(module, tmp_path, **{name: value})
    assert trainer.global_step == steps
    assert torch.equal(parameters, usual[module]) is not changes


def test_every_setting_is_tried():
    elsewhere = {"callbacks", "default_root_dir", "model_registry"}  # above, always given, a name in the cloud
    assert SETTINGS.keys() - VALUES.keys() == elsewhere
    assert CALLBACKS.keys() - LISTED.keys() == set(ABSTRACT)
