"""A checkpoint rewritten so that the settings given beside it rule, where those saved in it would.

Optimisers and schedules restore their own settings together with their state; so do a few parts that learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from flops_lightning.distributed import Communicator
from flops_lightning.meter import QueryMeter
from flops_lightning.optim.optimizers import OptimizerSettings, build_optimizer, read_settings
from flops_lightning.resume.rules import (
    Change,
    check_averaging,
    check_optimizer,
    check_settings,
    within_epoch,
)
from flops_lightning.resume.run_settings import describe_task


def obey_settings(
    checkpoint: dict[str, Any],
    state: dict[str, Any],
    settings: Mapping[str, Any],
    *,
    backbone: nn.Module,
    optimizer: OptimizerSettings,
    callbacks: Sequence[object],
) -> None:
    """Let the settings given beside a checkpoint rule, and name in the log those that are other than before.

    Args:
        checkpoint: Of Lightning; changed in place, like the next.
        state: The task's part of it, with the strategy's state and the settings of then.
        settings: The present ones, as :func:`describe_run` gives them.
        backbone: The network that is trained.
        optimizer: Present settings of its optimiser.
        callbacks: Those of the trainer.

    Raises:
        SettingError: the checkpoint trained other parameters than this configuration, or was made with settings that a
            run cannot change (see :mod:`checkpoint_checks`).
    """
    now = build_optimizer(backbone, optimizer)
    check_optimizer(now, checkpoint)
    check_averaging(checkpoint, callbacks)
    saved = dict(checkpoint.get("hyper_parameters", {}))
    before = state.get("settings") or {**describe_task(saved), "freeze": settings["freeze"]}
    changes = check_settings(before, settings, within_epoch=within_epoch(checkpoint))
    if changes:
        listed = ", ".join(f"{name} {old!r} -> {new!r}" for name, old, new in changes)
        rank_zero_info(f"the run goes on with other settings than before: {listed}")
    then = build_optimizer(backbone, read_settings("optimizer", OptimizerSettings, saved.get("optimizer")))
    obey_optimizer(checkpoint, then=then, now=now)
    obey_what_learns(checkpoint, state["strategy"], changes)


def obey_optimizer(checkpoint: dict[str, Any], *, then: Optimizer, now: Optimizer) -> None:
    """Give the saved state of the optimiser the present groups and their settings.

    Args:
        checkpoint: Of Lightning, with one optimiser; changed in place.
        then: An optimiser of these parameters by the settings of the run that made the checkpoint.
        now: One by the present settings.
    """
    (saved,) = checkpoint["optimizer_states"]
    place = {id(p): i for i, p in enumerate(_parameters(now))}
    state = {place[id(p)]: saved["state"][i] for i, p in enumerate(_parameters(then)) if i in saved["state"]}
    groups = [{**group, "initial_lr": group["lr"]} for group in now.state_dict()["param_groups"]]
    checkpoint["optimizer_states"] = [{"state": state, "param_groups": groups}]
    for schedule in checkpoint.get("lr_schedulers", []):
        schedule["base_lrs"] = [group["lr"] for group in groups]
        schedule["lr_lambdas"] = [None] * len(groups)


def obey_schedule(schedule: LambdaLR) -> None:
    """Set the rates that the schedule has for the present step; they are those already there, unless it was changed."""
    optimizer = schedule.optimizer
    for group, base, factor in zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(schedule.last_epoch)


def obey_what_learns(checkpoint: dict[str, Any], state: dict[str, Any], changes: Sequence[Change]) -> None:
    """Forget what was learned from a setting that was given anew.

    Args:
        checkpoint: Of Lightning; changed in place, like the next.
        state: The strategy's part of it.
        changes: The settings that differ.
    """
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
    """Give each rank what it had paid; with another number of ranks than then, all of it to the first.

    Args:
        meter: This rank's; changed in place.
        saved: State of every rank's meter, in order.
        communicator: The ranks at present.
    """
    meter.sites.clear()
    same = len(saved) == communicator.size
    for state in [saved[communicator.rank]] if same else saved if communicator.rank == 0 else []:
        meter.add_state(state)


def _parameters(optimizer: Optimizer) -> list[Any]:
    return [p for group in optimizer.param_groups for p in group["params"]]
