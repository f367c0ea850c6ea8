"""Trainer settings that forward-only training cannot honour, refused before anything runs."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn

from flops_lightning.errors import SettingError

PRECISIONS = ("32-true", "64-true", "bf16-mixed")


def check_trainer(trainer: pl.Trainer) -> None:
    """Refuse what would be silently wrong or fail late.

    Raises:
        SettingError: sharded strategies, several processes, a precision that needs a loss scaler or has no test,
            ``gradient_clip_val`` or ``accumulate_grad_batches`` of the Trainer.
    """
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        raise SettingError(
            "trainer.strategy", type(trainer.strategy).__name__,
            "shards parameters, which queries and closed-form gradients need whole.", "Write strategy: auto.",
        )  # fmt: skip
    if trainer.state.fn != TrainerFn.FITTING:
        return
    if trainer.world_size > 1:
        raise SettingError(
            "trainer.devices", trainer.world_size, "training in several processes is not supported yet: "
            "gradients would not be reduced.", "Write devices: 1 and num_nodes: 1.",
        )  # fmt: skip
    if trainer.precision not in PRECISIONS:
        raise SettingError(
            "trainer.precision", trainer.precision,
            "is not supported: half-precision losses and loss scaling hide the small differences that queries measure.",
            f"Choose from {list(PRECISIONS)}.",
        )  # fmt: skip
    if trainer.gradient_clip_val:
        raise SettingError(
            "trainer.gradient_clip_val", trainer.gradient_clip_val, "cannot clip under manual optimisation.",
            "Remove it and set model.init_args.clip.norm (and clip.attention_norm) instead.",
        )  # fmt: skip
    if trainer.accumulate_grad_batches != 1:
        raise SettingError(
            "trainer.accumulate_grad_batches", trainer.accumulate_grad_batches,
            "the Trainer cannot accumulate under manual optimisation.",
            "Remove it; raise data.init_args.batch_size instead (chunk_rows bounds the memory).",
        )  # fmt: skip
