"""Tests and predicts as one process of several, started with the environment that torchrun sets, or alone.

``python -m tests.distributed.evaluation_worker SIZE FOLDER IMAGES ...`` leaves for each number of images, in
``FOLDER/IMAGES``, the tables and ``metrics-RANK.json``: what two tests in a row logged.
"""

import json
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from flops_lightning.callbacks import ClassReport, PredictionWriter
from flops_lightning.tasks import ForwardImageClassifier
from tests.digits import quiet_trainer
from tests.distributed.scenarios import MODEL


class Photos(TensorDataset):
    """Images with paths; there is no image of the last class."""

    def __init__(self, images: int) -> None:
        generator = torch.Generator().manual_seed(0)
        super().__init__(torch.randn(images, 1, 8, 8, generator=generator), torch.arange(images) % 9)
        self.files = [f"{i}.jpg" for i in range(images)]


class Data(pl.LightningDataModule):
    """The same loader to test and to predict."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.test_set = Photos(images)

    def test_dataloader(self) -> DataLoader[tuple[torch.Tensor, ...]]:
        return DataLoader(self.test_set, batch_size=3)

    predict_dataloader = test_dataloader


def run(folder: Path, images: int, devices: int = 1) -> None:
    torch.manual_seed(0)
    task = ForwardImageClassifier(**MODEL)
    trainer = quiet_trainer(ClassReport(), PredictionWriter(), devices=devices, default_root_dir=folder)
    metrics = [trainer.test(task, Data(images), verbose=False)[0] for _ in range(2)]
    (folder / f"metrics-{trainer.global_rank}.json").write_text(json.dumps(metrics))
    if images > 1:  # Lightning does not predict with more processes than images
        trainer.predict(task, Data(images), return_predictions=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in sys.argv[3:]:
        run(Path(sys.argv[2]) / each, int(each), int(sys.argv[1]))
