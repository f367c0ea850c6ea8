"""The tables that ``ClassReport`` and ``PredictionWriter`` write into the folder of a run."""

import csv
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from flops_lightning.callbacks import ClassReport, PredictionWriter, RunSummary
from flops_lightning.datamodules import DigitsDataModule
from flops_lightning.errors import SettingError
from flops_lightning.strategies import Backprop
from flops_lightning.tasks.evaluation import ClassMeanAccuracy
from tests.digits import TINY, classifier, quiet_trainer

LABELS = torch.tensor([0, 0, 0, 1, 3, 3, 3])
PREDICTED = torch.tensor([0, 2, 0, 2, 3, 3, 3])
COUNTED = [("3", "0.666666667"), ("1", "0"), ("0", ""), ("3", "1")]  # of label 2 there are no images
PROBABILITY = torch.rand(7, 3, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
LABEL = PROBABILITY.argmax(dim=1)
NAMES = ["tulip", 'the "rose"', "oak, old", "fern"]


class Oracle(pl.LightningModule):
    """Takes its input for the logits or the probabilities, or predicts what it is told to."""

    def __init__(self, answer: Any = None) -> None:
        super().__init__()
        self.answer = answer
        self.by_class = ClassMeanAccuracy(4)

    def test_step(self, batch: list[Tensor]) -> None:
        self.by_class.update(*batch)
        self.log("class_mean", self.by_class)

    def predict_step(self, batch: list[Tensor], batch_idx: int = 0, dataloader_idx: int = 0) -> Any:
        if self.answer is not None:
            return self.answer
        return {"label": batch[0].argmax(dim=1), "probability": batch[0]}


class Data(pl.LightningDataModule):
    def __init__(self, class_names: list[str] | None = None, loaders: Any = None) -> None:
        super().__init__()
        self.loaders = loader() if loaders is None else loaders
        if class_names is not None:
            self.class_names = class_names

    def test_dataloader(self) -> Any:
        logits = torch.nn.functional.one_hot(PREDICTED, 4).float()
        return DataLoader(TensorDataset(logits, LABELS), batch_size=3)

    def predict_dataloader(self) -> Any:
        return self.loaders


class Stream(IterableDataset[list[Tensor]]):
    def __iter__(self) -> Any:
        return ([row] for row in PROBABILITY)


def loader(**settings: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(PROBABILITY), batch_size=3, **settings)


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", errors="surrogateescape") as stream:
        return list(csv.DictReader(stream))


def classes(names: list[str]) -> list[dict[str, str]]:
    return [
        {"label": str(label), "class": name, "images": images, "accuracy": accuracy}
        for label, (name, (images, accuracy)) in enumerate(zip(names, COUNTED, strict=True))
    ]


def predictions(names: list[str], order: Any = range(7), files: tuple[str, ...] = ("",) * 7) -> list[dict[str, str]]:
    return [
        {
            "index": str(i), "file": files[i], "label": str(int(LABEL[k])), "class": names[int(LABEL[k])],
            "probability": f"{float(PROBABILITY[k, LABEL[k]]):.9g}",
        }
        for i, k in enumerate(order)
    ]  # fmt: skip


def predict(folder: Path, data: Data, answer: Any = None) -> list[dict[str, str]]:
    trainer = quiet_trainer(PredictionWriter(), default_root_dir=folder)
    trainer.predict(Oracle(answer), data, return_predictions=False)
    return rows(folder / "predictions.csv")


def test_a_line_for_each_class_and_image_with_the_names_of_the_data_and_the_same_a_second_time(tmp_path):
    trainer, module = quiet_trainer(ClassReport(), PredictionWriter(), default_root_dir=tmp_path), Oracle()
    for _ in range(2):
        trainer.test(module, Data(NAMES), verbose=False)
        assert rows(tmp_path / "class_accuracy.csv") == classes(NAMES)
        trainer.predict(module, Data(NAMES[:3]), return_predictions=False)
        table = rows(tmp_path / "predictions.csv")
        assert table == predictions(NAMES)
    read_back = torch.tensor([float(row["probability"]) for row in table])
    assert torch.equal(read_back, PROBABILITY.max(dim=1).values)


@pytest.mark.parametrize("data", [loader(), loader(sampler=[4, 0, 6, 2, 1, 5, 3]), DataLoader(Stream(), batch_size=3)])
def test_without_names_the_number_stands_in_whatever_order_the_images_are_read(tmp_path, data):
    assert predict(tmp_path, Data(loaders=data)) == predictions(["0", "1", "2"])


class Photos(TensorDataset):
    """Images that lie in files; one path needs quotes, one has a byte that is no UTF-8."""

    files = (*(f"photos/{i}.jpg" for i in range(5)), 'a "b", c.jpg', os.fsdecode(b"caf\xe9.jpg"))


@pytest.mark.parametrize("as_list", [True, False])
def test_the_path_stands_beside_each_image_in_whatever_order_they_are_read(tmp_path, as_list):
    order = torch.tensor([4, 0, 6, 2, 1, 5, 3])
    photos = DataLoader(Photos(PROBABILITY[order.argsort()]), batch_size=3, sampler=order.tolist())
    found = predict(tmp_path, Data(loaders=[photos] if as_list else photos))
    assert found == predictions(["0", "1", "2"], order.argsort().tolist(), Photos.files)


def test_the_files_lie_in_the_folder_of_the_run_and_their_paths_are_told(tmp_path, caplog):
    trainer = quiet_trainer(ClassReport(), PredictionWriter(), logger=CSVLogger(tmp_path, "name"))
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        trainer.test(Oracle(), Data(), verbose=False)
        trainer.predict(Oracle(), Data(), return_predictions=False)
    folder = tmp_path / "name" / "version_0"
    assert rows(folder / "class_accuracy.csv") == classes(["0", "1", "2", "3"])
    assert len(rows(folder / "predictions.csv")) == 7
    assert f"accuracy of each class written to {folder}/class_accuracy.csv" in caplog.text
    assert f"predictions of 7 samples written to {folder}/predictions.csv" in caplog.text


def test_classes_that_do_not_fit_are_refused_before_the_test(tmp_path):
    module, trainer = Oracle(), quiet_trainer(ClassReport(), default_root_dir=tmp_path)
    with pytest.raises(SettingError, match="the model has 4 classes"):
        trainer.test(module, Data(["one", "two", "three", "four", "five"]), verbose=False)
    assert int(module.by_class.images.sum()) == 0
    del module.by_class
    with pytest.raises(SettingError, match=r"Oracle counts no classes\. Update a ClassMeanAccuracy in its test_step"):
        trainer.test(module, Data(), verbose=False)


PLAIN = "writes labels and probabilities, or captions.*"


@pytest.mark.parametrize(
    ("data", "answer", "message"),
    [
        ({"loaders": [loader(), loader()]}, None, "2 loaders"),
        ({"class_names": ["one", "two", "three", "four"]}, None, "the model has 3 classes"),
        ({}, PROBABILITY, rf"'torch.float32 \(7, 3\)': .*{PLAIN}"),
        ({}, [LABEL, PROBABILITY], f"'list': .*{PLAIN}"),
        ({}, {"label": LABEL}, rf"{{'label': 'torch.int64 \(7,\)'}}: .*{PLAIN}"),
        ({}, {"label": LABEL.float(), "probability": PROBABILITY}, rf"'label': 'torch.float32 \(7,\)'.*{PLAIN}"),
        ({}, {"label": LABEL, "probability": PROBABILITY[:, 0]}, rf"'probability': 'torch.float32 \(7,\)'.*{PLAIN}"),
        ({}, {"label": LABEL[:3], "probability": PROBABILITY}, rf"'label': 'torch.int64 \(3,\)'.*{PLAIN}"),
    ],
)
def test_predictions_that_cannot_be_written_are_refused(tmp_path, data, answer, message):
    with pytest.raises(SettingError, match=message):
        predict(tmp_path, Data(**data), answer)
    assert not (tmp_path / "predictions.csv").exists()


def test_training_and_trial_runs_write_no_table(tmp_path):
    task = classifier(strategy=Backprop(), model_kwargs={**TINY, "embed_dim": 8, "depth": 1})
    quiet_trainer(ClassReport(), RunSummary(), max_steps=1, default_root_dir=tmp_path).fit(task, DigitsDataModule())
    trial = quiet_trainer(ClassReport(), PredictionWriter(), fast_dev_run=True, default_root_dir=tmp_path)
    trial.test(task, DigitsDataModule(), verbose=False)
    trial.predict(Oracle(), Data(), return_predictions=False)
    assert {file.name for file in tmp_path.iterdir()} == {"summary.json", "model.safetensors"}
