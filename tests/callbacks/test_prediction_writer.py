from __future__ import annotations

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

from flops_lightning.callbacks import PredictionWriter
from flops_lightning.errors import SettingError

PROBABILITY = torch.rand(7, 3, generator=torch.Generator().manual_seed(0)).softmax(dim=1)
LABEL = PROBABILITY.argmax(dim=1)


class Oracle(pl.LightningModule):
    """Returns the input as the probabilities, or whatever it is told to."""

    def __init__(self, answer: Any = None) -> None:
        super().__init__()
        self.answer = answer

    def predict_step(self, batch: list[Tensor], batch_idx: int = 0, dataloader_idx: int = 0) -> Any:
        if self.answer is not None:
            return self.answer
        return {"label": batch[0].argmax(dim=1), "probability": batch[0]}


class Data(pl.LightningDataModule):
    def __init__(self, loaders: Any, class_names: tuple[str, ...] | None = None) -> None:
        super().__init__()
        self.loaders = loaders
        if class_names is not None:
            self.class_names = class_names

    def predict_dataloader(self) -> Any:
        return self.loaders


class Stream(IterableDataset[list[Tensor]]):
    def __iter__(self) -> Any:
        return ([row] for row in PROBABILITY)


def loader(**settings: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(PROBABILITY), batch_size=3, **settings)


def predict(folder: Path, data: Data, answer: Any = None, **settings: Any) -> list[dict[str, str]]:
    settings = {"logger": False} | settings
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=[PredictionWriter()], enable_progress_bar=False,
        enable_model_summary=False, **settings,
    )  # fmt: skip
    trainer.predict(Oracle(answer), data, return_predictions=False)
    with (Path(trainer.log_dir or "") / "predictions.csv").open(newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def expected(names: list[str], order: list[int] | None = None, files: list[str] | None = None) -> list[dict[str, str]]:
    return [
        {
            "index": str(i),
            "file": files[i] if files else "",
            "label": str(int(LABEL[k])),
            "class": names[int(LABEL[k])],
            "probability": f"{float(PROBABILITY[k, LABEL[k]]):.9g}",
        }
        for i, k in enumerate(order or range(7))
    ]


def test_a_line_per_image_with_the_names_of_the_data(tmp_path):
    names = ["a cat", 'the "dog"', "bird, small"]
    rows = predict(tmp_path, Data(loader(), tuple(names)))
    assert rows == expected(names)
    read_back = torch.tensor([float(row["probability"]) for row in rows])
    assert torch.equal(read_back, PROBABILITY.max(dim=1).values)


@pytest.mark.parametrize("data", [loader(), loader(sampler=[4, 0, 6, 2, 1, 5, 3]), DataLoader(Stream(), batch_size=3)])
def test_without_names_the_number_stands_in_whatever_order_the_images_are_read(tmp_path, data):
    assert predict(tmp_path, Data(data)) == expected(["0", "1", "2"])


@pytest.mark.parametrize(
    ("data", "message"),
    [(Data([loader(), loader()]), "2 loaders"), (Data(loader(), ("one", "two")), "the model tells 3 classes apart")],
)
def test_data_that_does_not_fit_is_refused(tmp_path, data, message):
    with pytest.raises(SettingError, match=message):
        predict(tmp_path, data)


class Photos(TensorDataset):
    """Images that lie in files; one path needs quotes, one has a byte that is no UTF-8."""

    files = (*(f"photos/{i}.jpg" for i in range(5)), 'a "b", c.jpg', os.fsdecode(b"caf\xe9.jpg"))


@pytest.mark.parametrize("as_list", [True, False])
def test_the_path_stands_beside_each_image_in_whatever_order_they_are_read(tmp_path, as_list):
    order = [4, 0, 6, 2, 1, 5, 3]
    photos = DataLoader(Photos(PROBABILITY[torch.tensor(order).argsort()]), batch_size=3, sampler=order)
    rows = predict(tmp_path, Data([photos] if as_list else photos))
    of_set = torch.tensor(order).argsort().tolist()
    assert rows == expected(["0", "1", "2"], of_set, list(Photos.files))


def test_the_file_lies_in_the_folder_of_the_run_and_its_path_is_told(tmp_path, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch"):
        predict(tmp_path, Data(loader()), logger=CSVLogger(tmp_path, "name"))
    file = tmp_path / "name" / "version_0" / "predictions.csv"
    assert file.is_file()
    assert f"predictions of 7 images written to {file}" in caplog.text


def test_a_trial_run_writes_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        predict(tmp_path, Data(loader()), fast_dev_run=True)
    assert list(tmp_path.rglob("*.csv")) == []


def test_a_second_prediction_starts_afresh(tmp_path):
    trainer = pl.Trainer(
        accelerator="cpu", default_root_dir=tmp_path, callbacks=[PredictionWriter()], logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    for _ in range(2):
        trainer.predict(Oracle(), Data(loader()))
        assert len((tmp_path / "predictions.csv").read_text().splitlines()) == 1 + 7


@pytest.mark.parametrize(
    ("answer", "given"),
    [
        (PROBABILITY, "'torch.float32 (7, 3)'"),
        ([LABEL, PROBABILITY], "'list'"),
        ({"label": LABEL}, "{'label': 'torch.int64 (7,)'}"),
        ({"label": LABEL.float(), "probability": PROBABILITY}, "'label': 'torch.float32 (7,)'"),
        ({"label": LABEL, "probability": PROBABILITY[:, 0]}, "'probability': 'torch.float32 (7,)'"),
        ({"label": LABEL[:3], "probability": PROBABILITY}, "'label': 'torch.int64 (3,)'"),
    ],
)
def test_another_kind_of_output_is_refused_at_the_first_batch(tmp_path, answer, given):
    with pytest.raises(SettingError, match="writes labels and probabilities only") as refusal:
        predict(tmp_path, Data(loader()), answer)
    assert given in str(refusal.value)
    assert not (tmp_path / "predictions.csv").exists()
