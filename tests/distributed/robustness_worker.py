"""Tests under noise and attack as one process of several, or alone.

``python -m tests.distributed.robustness_worker SIZE FOLDER`` leaves the files of :class:`Robustness` in the folder.
"""

import sys
from pathlib import Path

import torch

from flops_lightning.callbacks import Robustness
from tests.callbacks.test_robustness import SMALL, Data, classifier
from tests.digits import quiet_trainer


def run(folder: Path, devices: int = 1) -> None:
    trainer = quiet_trainer(Robustness(**SMALL), devices=devices, default_root_dir=folder)
    trainer.test(classifier(), Data(batch_size=12), verbose=False)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[2]), int(sys.argv[1]))
