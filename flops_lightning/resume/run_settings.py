"""The settings of a run by the names that a user writes, as plain values for its checkpoints."""

import inspect
import os
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from flops_lightning.allocators.base import QueryAllocator
from flops_lightning.settings import plain
from flops_lightning.strategies.base import ForwardGradientStrategy

OF_TRAINER = (
    "max_epochs", "max_steps", "min_epochs", "min_steps", "precision", "world_size", "limit_train_batches",
    "limit_val_batches", "overfit_batches", "val_check_interval", "check_val_every_n_epoch",
    "reload_dataloaders_every_n_epochs",
)  # fmt: skip
"""Settings of the trainer that determine the course of a run."""


def describe_run(trainer: pl.Trainer, task: Mapping[str, Any], strategy: ForwardGradientStrategy) -> dict[str, Any]:
    """All settings of a run that a resumed run could change, as plain values by dotted name."""
    return {
        **describe_task(task), **_strategy(strategy), **_allocator(trainer), **describe_data(trainer),
        **{f"trainer.{name}": plain(getattr(trainer, name)) for name in OF_TRAINER},
        "seed_everything": int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None,
    }  # fmt: skip


def describe_task(hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the task; ``optimizer: {lr: ...}`` becomes ``optimizer.lr``."""
    flat: dict[str, Any] = {}
    for name, value in hyper_parameters.items():
        grouped = isinstance(value, Mapping) and not name.endswith("_kwargs")
        flat |= {f"{name}.{key}": plain(each) for key, each in value.items()} if grouped else {name: plain(value)}
    return flat


def _strategy(strategy: ForwardGradientStrategy) -> dict[str, Any]:
    # The resolved sites stand for `sites`; the seed is part of the strategy's own state.
    own = {name: value for name, value in strategy.settings.items() if name not in ("sites", "seed")}
    described = {f"strategy.{name}": value for name, value in own.items()}
    described["strategy"] = type(strategy).__name__
    described["strategy.sites"] = {
        site.name: list(site.parameters) for site in (*strategy.sites, *strategy.exact_sites)
    }
    for site in strategy.sites:
        described[f"strategy.sites.{site.name}.sigma"] = site.sigma
        described[f"strategy.sites.{site.name}.queries_per_sample"] = site.queries_per_sample
        if site.directions:
            described[f"strategy.sites.{site.name}.directions"] = site.directions
    return described


def _allocator(trainer: pl.Trainer) -> dict[str, Any]:
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        allocator = getattr(callback, "allocator", None)
        if isinstance(allocator, QueryAllocator):
            own = {f"allocator.{name}": value for name, value in allocator.settings.items()}
            budget = {f"budget.{name}": plain(value) for name, value in vars(getattr(callback, "budget", None)).items()}
            return {"allocator": type(allocator).__name__, **own, **budget}
    return {"allocator": None}


def describe_data(trainer: pl.Trainer) -> dict[str, Any]:
    """Settings of a run's data module: the arguments that it keeps under their names, and its ``content``."""
    module = trainer.datamodule  # type: ignore[attr-defined]
    if module is None:
        return {}
    classes = [cls for cls in type(module).__mro__ if "__init__" in vars(cls)]  # a class may pass settings on
    given = dict.fromkeys(name for cls in classes for name in inspect.signature(vars(cls)["__init__"]).parameters)
    names = [name for name in given if hasattr(module, name)]
    names += ["content"] if getattr(module, "content", None) is not None else []
    return {"data": type(module).__name__, **{f"data.{name}": plain(getattr(module, name)) for name in names}}
