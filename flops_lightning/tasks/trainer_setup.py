"""The trainer of a forward-only run: unsupported settings are refused, and its parts for ``backward`` removed."""

import math

import lightning.pytorch as pl
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim.lr_scheduler import LambdaLR

from flops_lightning.distributed import broadcast_state
from flops_lightning.errors import SettingError
from flops_lightning.tasks.manual_optimization import check_manual_optimization

PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")


def check_trainer(trainer: pl.Trainer, *, manual: bool = True) -> None:
    """Raise a :class:`SettingError` for settings that would be silently wrong or fail late.

    ``manual``: the module optimises manually, as tasks do.
    """
    strategy = type(trainer.strategy).__name__
    if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
        problem = "shards parameters, but queries and closed-form gradients need them whole."
        raise SettingError("trainer.strategy", strategy, problem, "Write trainer.strategy: auto.")
    if trainer.state.fn != TrainerFn.FITTING:
        return
    if trainer.world_size > 1 and not isinstance(trainer.strategy, DDPStrategy):
        problem = "does not give every process a replica of the network."
        raise SettingError("trainer.strategy", strategy, problem, "Write trainer.strategy: auto.")
    if trainer.precision not in PRECISIONS:
        problem = "is not supported: parameters must be float32 or float64."
        raise SettingError("trainer.precision", trainer.precision, problem, f"Choose from {', '.join(PRECISIONS)}.")
    if manual:
        check_manual_optimization(trainer)


def refuse_compiled(module: pl.LightningModule) -> None:
    """Raise a :class:`SettingError` for a module that went through ``torch.compile``."""
    if module._compiler_ctx is not None:
        problem = "compiles training_step, whose queries are drawn from keys outside of the graph."
        remedy = "Fit the module itself, and write compile_suffixes: true of the strategy."
        raise SettingError("torch.compile", type(module).__name__, problem, remedy)


def check_optimization(trainer: pl.Trainer, accumulated: int, updates: int) -> None:
    """Raise a :class:`SettingError` unless there is one optimiser with a schedule of its rates, for one kind of step.

    A step takes the gradients of ``accumulated`` batches, or one batch makes several ``updates``.
    """
    if accumulated > 1 and updates > 1:
        problem = "cannot be combined with update: site_by_site, which makes several steps of one batch."
        remedy = "Write 1, or update: simultaneous."
        raise SettingError("optimizer.accumulate_grad_batches", accumulated, problem, remedy)
    schedules = [each.scheduler for each in trainer.lr_scheduler_configs]
    if len(trainer.optimizers) != 1 or len(schedules) != 1 or not isinstance(schedules[0], LambdaLR):
        given = [type(each).__name__ for each in (*trainer.optimizers, *schedules)]
        remedy = (
            "Do not override it and set `optimizer`, or return [optimizer], [LambdaLR(optimizer, lambda step: 1.0)]."
        )
        raise SettingError("configure_optimizers", given, "must return one optimiser and one LambdaLR.", remedy)


class ForwardDDPStrategy(DDPStrategy):
    """Lightning's data-parallel strategy without torch's reducer: a replica in each process, from rank 0's start.

    ``DistributedDataParallel`` reduces gradients in hooks of ``backward``, which is never called, and its reducer would
    hold a second copy of them; the task reduces gradients itself. Processes start as under ``strategy: ddp``.
    """

    def configure_ddp(self) -> None:
        """Give every rank the state of rank 0, and leave the module as it is."""
        if self.lightning_module is not None:
            broadcast_state(self.lightning_module)


def remove_reducer_and_scaler(trainer: pl.Trainer) -> None:
    """Turn ``DDPStrategy`` into :class:`ForwardDDPStrategy`, and remove the loss scaler of ``16-mixed``.

    Lightning builds both from words before a module has a say. Changing the strategy's class adds no state; subclasses
    of ``DDPStrategy`` stay as they are. A scaler that never scaled a loss fails in the optimiser's step; without one,
    Lightning steps as it does in bfloat16.
    """
    if type(trainer.strategy) is DDPStrategy:
        trainer.strategy.__class__ = ForwardDDPStrategy
    if trainer.precision == "16-mixed" and isinstance(trainer.precision_plugin, MixedPrecision):
        trainer.precision_plugin.scaler = None


def optimizer_steps(trainer: pl.Trainer, accumulated: int) -> float:
    """Optimiser steps of the whole run, where ``accumulated`` batches make one; infinite if it has no end."""
    batches = trainer.estimated_stepping_batches  # Lightning counts a step a batch
    endless = trainer.max_epochs in (None, -1)  # then it is max_steps, or infinite
    if accumulated == 1 or endless or not math.isfinite(batches):
        return batches
    steps = math.ceil(trainer.num_training_batches / accumulated) * (trainer.max_epochs or 1)
    return steps if trainer.max_steps < 0 else min(steps, trainer.max_steps)
