from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from flops_lightning.callbacks import ClassReport, RunSummary
from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.errors import SettingError
from flops_lightning.strategies import Backprop
from flops_lightning.tasks import ForwardImageClassifier
from flops_lightning.tasks.evaluation import ClassMeanAccuracy

LABELS = torch.tensor([0, 0, 0, 1, 3, 3, 3])
PREDICTED = torch.tensor([0, 2, 0, 2, 3, 3, 3])
COUNTED = [("3", "0.666666667"), ("1", "0"), ("0", ""), ("3", "1")]  # of label 2 there are no images


class Oracle(pl.LightningModule):
    """Takes its input for the logits."""

    def __init__(self) -> None:
        super().__init__()
        self.by_class = ClassMeanAccuracy(4)

    def test_step(self, batch: list[Tensor]):
        self.by_class.update(*batch)
        self.log("class_mean", self.by_class)


class Data(pl.LightningDataModule):
    def __init__(self, class_names: tuple[str, ...] | None = None) -> None:
        super().__init__()
        if class_names is not None:
            self.class_names = class_names

    def test_dataloader(self) -> Any:
        logits = torch.nn.functional.one_hot(PREDICTED, 4).float()
        return DataLoader(TensorDataset(logits, LABELS), batch_size=3)


def make_trainer(folder: Path, **settings: Any) -> pl.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    callbacks = [ClassReport()]
    return pl.Trainer(accelerator="cpu", default_root_dir=folder, **{**quiet, "callbacks": callbacks, **settings})


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def expected(names: list[str]) -> list[dict[str, str]]:
    return [
        {"label": str(label), "class": name, "images": images, "accuracy": accuracy}
        for label, (name, (images, accuracy)) in enumerate(zip(names, COUNTED, strict=True))
    ]


def test_a_line_per_class_by_its_label_and_the_same_when_tested_again(tmp_path):
    names = ["tulip", 'the "rose"', "oak, old", "fern"]
    trainer, module = make_trainer(tmp_path), Oracle()
    for _ in range(2):
        trainer.test(module, Data(tuple(names)), verbose=False)
        assert rows(tmp_path / "class_accuracy.csv") == expected(names)


def test_the_file_lies_in_the_folder_of_the_run_and_its_path_is_told(tmp_path, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        make_trainer(tmp_path, logger=CSVLogger(tmp_path, "name")).test(Oracle(), Data(), verbose=False)
    file = tmp_path / "name" / "version_0" / "class_accuracy.csv"
    assert rows(file) == expected(["0", "1", "2", "3"])
    assert f"accuracy of each class written to {file}" in caplog.text


def test_names_of_another_number_of_classes_are_refused_before_the_test(tmp_path):
    module = Oracle()
    with pytest.raises(SettingError, match="the model tells 4 classes apart"):
        make_trainer(tmp_path).test(module, Data(("one", "two")), verbose=False)
    assert int(module.by_class.images.sum()) == 0


def test_a_module_that_counts_no_classes_is_refused(tmp_path):
    module = Oracle()
    del module.by_class
    with pytest.raises(SettingError, match=r"Oracle counts no classes\. Update a ClassMeanAccuracy in its test_step"):
        make_trainer(tmp_path).test(module, Data(), verbose=False)


def test_training_writes_none_whatever_is_tested_meanwhile_and_a_trial_run_neither(tmp_path):
    task = ForwardImageClassifier(
        model_name="vit_tiny_patch16_224", num_classes=10, strategy=Backprop(),
        model_kwargs={"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 1, "num_heads": 2},
    )  # fmt: skip
    callbacks: list[pl.Callback] = [ClassReport(), RunSummary()]
    make_trainer(tmp_path, callbacks=callbacks, max_steps=1, enable_checkpointing=False).fit(task, DigitsDataModule())
    assert {file.name for file in tmp_path.iterdir()} == {"summary.json", "model.safetensors"}
    make_trainer(tmp_path, fast_dev_run=True).test(task, DigitsDataModule(), verbose=False)
    assert not (tmp_path / "class_accuracy.csv").exists()
    make_trainer(tmp_path).test(task, DigitsDataModule(), verbose=False)
    table = rows(tmp_path / "class_accuracy.csv")
    assert [row["class"] for row in table] == list(DigitsDataModule.class_names)
    assert sum(int(row["images"]) for row in table) == 360
