"""The metrics of a test as a file, for studies that test what other runs have trained."""

import json

from lightning.pytorch import Callback, LightningModule, Trainer

from flops_lightning.callbacks.tables import run_folder

FILE_NAME = "test.json"


class WriteMetrics(Callback):
    """Write ``test.json`` into the run's folder at the end of a test: its metrics, as in ``test_accuracy``."""

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {name.replace("/", "_"): float(value) for name, value in trainer.callback_metrics.items()}
        folder = run_folder(trainer)
        if trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / FILE_NAME).write_text(json.dumps(found, indent=2) + "\n")
