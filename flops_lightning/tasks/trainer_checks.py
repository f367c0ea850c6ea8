"""Trainer settings that forward-only training cannot honour, refused before anything runs."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn

from flops_lightning.errors import SettingError
from flops_lightning.tasks.ddp import drop_reducer

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse what would be silently wrong or fail late.

    Raises:
        SettingError: sharded strategies, several processes other than DDP, a precision that has no test,
            ``gradient_clip_val`` or ``accumulate_grad_batches`` of the Trainer.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise SettingError(
            "trainer.strategy", type(trainer.strategy).__name__,
            "shards parameters, which queries and closed-form gradients need whole.", "Write strategy: auto.",
        )  # fmt: skip
    if trainer.state.fn != TrainerFn.FITTING:
        return
    if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
        raise SettingError(
            "trainer.strategy", type(trainer.strategy).__name__, "does not start every process with a replica of the "
            "network and leave gradients alone.", "Write strategy: auto.",
        )  # fmt: skip
    drop_reducer(trainer.strategy)
    if trainer.precision not in PRECISIONS:
        raise SettingError(
            "trainer.precision", trainer.precision,
            "is not supported: parameters and their gradients have to be in float32.",
            f"Choose from {list(PRECISIONS)}.",
        )  # fmt: skip
    _drop_loss_scaler(trainer)
    if trainer.gradient_clip_val:
        raise SettingError(
            "trainer.gradient_clip_val", trainer.gradient_clip_val, "cannot clip under manual optimisation.",
            "Remove it and set model.init_args.clip.norm (and clip.attention_norm) instead.",
        )  # fmt: skip
    if trainer.accumulate_grad_batches != 1:
        raise SettingError(
            "trainer.accumulate_grad_batches", trainer.accumulate_grad_batches,
            "the Trainer cannot accumulate under manual optimisation.",
            "Remove it and set model.init_args.optimizer.accumulate_grad_batches instead.",
        )  # fmt: skip


def _drop_loss_scaler(trainer: pl.Trainer) -> None:
    # Gradients are not scaled, for there is no backward pass through the loss, and a scaler that never scaled fails in
    # the optimiser's step. Without one, Lightning steps as it does in bfloat16.
    if trainer.precision == "16-mixed" and isinstance(trainer.precision_plugin, MixedPrecision):
        trainer.precision_plugin.scaler = None
