"""Lightning's callbacks and settings that rely on automatic optimisation: tasks optimise manually, and refuse them."""

import lightning.pytorch as pl
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import ModelCheckpoint

from flops_lightning.errors import SettingError

CALLBACKS = {
    "BaseFinetuning": (
        "unfreezes parameters during training, which the strategy's sites would not know.",
        "Remove it and choose before training what is trained: model.init_args.target, or requires_grad_(False).",
    ),
    "BatchSizeFinder": (
        "tries steps without the other callbacks, the allocator among them.",
        "Remove it and set data.init_args.batch_size; the strategy's chunk_rows: auto bounds memory at any batch size.",
    ),
    "GradientAccumulationScheduler": (
        "has no effect under manual optimisation.",
        "Remove it and set model.init_args.optimizer.accumulate_grad_batches.",
    ),
    "LearningRateFinder": (
        "tries steps without the other callbacks, the allocator among them.",
        "Remove it and run `python main.py tune`, which finds model.init_args.optimizer.lr.",
    ),
    "ModelPruning": (
        "replaces the parameters that the strategy's sites hold.",
        "Remove it and prune before the task is made, or after training.",
    ),
    "StochasticWeightAveraging": (
        "sets a schedule by epoch, which manual optimisation steps with every batch.",
        "Use EMAWeightAveraging or WeightAveraging.",
    ),
}
"""Class names (subclasses included): what is wrong, and what to do."""

SETTINGS = {
    "gradient_clip_val": "Remove it and set model.init_args.clip.norm (and clip.attention_norm) instead.",
    "gradient_clip_algorithm": "Remove it; model.init_args.clip.norm clips by norm.",
    "accumulate_grad_batches": "Remove it and set model.init_args.optimizer.accumulate_grad_batches instead.",
}
"""Settings of the trainer without effect under manual optimisation, and what to do."""


def check_manual_optimization(trainer: pl.Trainer) -> None:
    """Raise a :class:`SettingError` for what manual optimisation would silently void, or what ends in a traceback."""
    for name, remedy in SETTINGS.items():
        value = getattr(trainer, name)
        if value and not (name == "accumulate_grad_batches" and value == 1):
            raise SettingError(f"trainer.{name}", value, "has no effect under manual optimisation.", remedy)
    if trainer._accelerator_connector._layer_sync is not None:
        problem = "replaces layers that the strategy's stages hold."
        remedy = "Remove it: running statistics are constants here (batch_norm: frozen)."
        raise SettingError("trainer.sync_batchnorm", True, problem, remedy)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        for refused, (problem, remedy) in CALLBACKS.items():
            if isinstance(callback, getattr(lightning_callbacks, refused)):
                raise SettingError("trainer.callbacks", name, problem, remedy)
        if isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None:
            problem = "is never due under manual optimisation: no file would be written."
            remedy = "Use every_n_train_steps, or the callback SaveOnSignal."
            raise SettingError(f"{name}.train_time_interval", str(callback._train_time_interval), problem, remedy)
