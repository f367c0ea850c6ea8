"""What a task adds to its checkpoints, and how a resumed run takes it back under the settings that are given to it.

Optimisers and schedules restore their own settings together with their state, and so do parts that learn. Checkpoints
are therefore rewritten before Lightning reads them, so that the present settings apply.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer

from flops_lightning.distributed import Communicator, gather_plain, present_communicator
from flops_lightning.meter import QueryMeter
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.optim.optimizers import OptimizerSettings, build_optimizer
from flops_lightning.resume import rules
from flops_lightning.resume.loop_progress import settle_progress
from flops_lightning.resume.rules import Change
from flops_lightning.resume.run_settings import describe_run, describe_task
from flops_lightning.settings import read_settings
from flops_lightning.strategies.base import ForwardGradientStrategy

KEY = "forward_gradient"


class _Task(Protocol):  # what is read of a ForwardModule
    network: StagedNetwork
    strategy: ForwardGradientStrategy | None
    optimizer_settings: OptimizerSettings
    start_weights: dict[str, Any]

    @property
    def device(self) -> torch.device: ...
    @property
    def hparams(self) -> Any: ...
    def state_dict(self) -> dict[str, Tensor]: ...


def save_run(checkpoint: dict[str, Any], task: _Task, trainer: pl.Trainer | None, own: Mapping[str, Any]) -> None:
    """Add class names, the normalisation, the strategy's state (draw counter, seed, meters), all settings and ``own``.

    Every process of a run must call this.
    """
    names = rules.class_names_of(trainer)
    if names is not None:
        checkpoint["class_names"] = names
    normalization = rules.normalization_of(trainer)
    if normalization is not None:
        checkpoint["normalization"] = normalization
    strategy = task.strategy
    if strategy is not None:
        assert trainer is not None
        meter = strategy.meter.state_dict()
        checkpoint[KEY] = {
            **own,
            "strategy": strategy.state_dict(),
            "meters": gather_plain(strategy.communicator, meter, device=task.device),
            "settings": settings_of(task, trainer, strategy),
        }


def restore_run(checkpoint: dict[str, Any], task: _Task, trainer: pl.Trainer | None) -> dict[str, Any] | None:
    """Check a checkpoint against the task, and if training is resumed from it, restore what :func:`save_run` added.

    Settings that differ from those of the checkpoint are obeyed and named in the log, or refused (see
    :mod:`flops_lightning.resume.rules`). The checkpoint is changed in place, before optimiser, schedule, loops and
    callbacks are restored.

    Returns:
        What the task keeps itself; None where no training is resumed: testing and fine-tuning count from zero.
    """
    rules.check_weights(task.state_dict(), checkpoint["state_dict"])
    rules.check_classes(checkpoint.get("class_names"), rules.class_names_of(trainer))
    if trainer is not None and trainer.state.fn != TrainerFn.FITTING:  # a resumed run's settings are compared below
        rules.check_normalization(checkpoint.get("normalization"), rules.normalization_of(trainer))
    state: dict[str, Any] | None = checkpoint.get(KEY)
    strategy = task.strategy
    if state is None or strategy is None or trainer is None or trainer.state.fn != TrainerFn.FITTING:
        return None
    optimizer = build_optimizer(task.network.module, task.optimizer_settings)
    rules.check_optimizer(optimizer, checkpoint)
    rules.check_averaging(checkpoint, trainer.callbacks)  # type: ignore[attr-defined]
    settings, saved = settings_of(task, trainer, strategy), dict(checkpoint.get("hyper_parameters", {}))
    before = state.get("settings") or {**describe_task(saved), "freeze": settings["freeze"]}
    changes = rules.check_settings(before, settings, within_epoch=rules.within_epoch(checkpoint))
    if changes:
        listed = ", ".join(f"{name} {old!r} -> {new!r}" for name, old, new in changes)
        rank_zero_info(f"resuming with settings that differ from the checkpoint's: {listed}")
    then = build_optimizer(task.network.module, read_settings(OptimizerSettings, saved.get("optimizer"), "optimizer"))
    _obey_optimizer(checkpoint, then=then, now=optimizer)
    _obey_strategy_and_allocator(checkpoint, state["strategy"], changes)
    strategy.load_state_dict(state["strategy"])
    share_meters(strategy.meter, state.get("meters", [state["strategy"]["meter"]]), present_communicator())
    settle_progress(checkpoint)
    return state


def settings_of(task: _Task, trainer: pl.Trainer, strategy: ForwardGradientStrategy) -> dict[str, Any]:
    """All settings of a run with this task, by name."""
    return describe_run(trainer, {**task.hparams, **task.start_weights, "freeze": task.network.frozen()}, strategy)


def _obey_optimizer(checkpoint: dict[str, Any], *, then: Optimizer, now: Optimizer) -> None:
    """Give the saved state of the optimiser the present groups and their settings.

    ``then`` has the groups of the run that made the checkpoint: moments follow their parameters from group to group.
    """
    (saved,) = checkpoint["optimizer_states"]
    place = {id(p): i for i, p in enumerate(_parameters(now))}
    state = {place[id(p)]: saved["state"][i] for i, p in enumerate(_parameters(then)) if i in saved["state"]}
    groups = [{**group, "initial_lr": group["lr"]} for group in now.state_dict()["param_groups"]]
    checkpoint["optimizer_states"] = [{"state": state, "param_groups": groups}]
    for schedule in checkpoint.get("lr_schedulers", []):
        schedule["base_lrs"] = [group["lr"] for group in groups]
        schedule["lr_lambdas"] = [None] * len(groups)


def _parameters(optimizer: Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _obey_strategy_and_allocator(checkpoint: dict[str, Any], state: dict[str, Any], changes: Sequence[Change]) -> None:
    """Forget what was learned from a setting that has changed."""
    for setting, _, now in changes:
        parts = setting.split(".")
        if parts[:2] == ["strategy", "sites"] and parts[-1] == "sigma":
            state.get("learned_sigma", {}).pop(".".join(parts[2:-1]), None)
        elif setting in ("strategy.keep", "strategy.grasp_queries"):
            state["ratios"] = None
        elif setting == "allocator.p":
            for key, part in checkpoint.get("callbacks", {}).items():
                if "BernoulliAllocator" in key:
                    part["p"] = now


def share_meters(meter: QueryMeter, saved: Sequence[dict[str, Any]], communicator: Communicator) -> None:
    """Restore this rank's meter from those of all ranks; if their number has changed, the first rank gets the sum."""
    meter.sites.clear()
    same = len(saved) == communicator.size
    for state in [saved[communicator.rank]] if same else saved if communicator.rank == 0 else []:
        meter.add_state(state)
