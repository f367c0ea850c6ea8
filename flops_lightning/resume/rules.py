"""Whether a checkpoint fits the run that is to go on from it, and what the settings given beside it do.

None is overridden in silence. Those below are refused, all others are obeyed from the next step on and named in a line
of the log. A setting that is only where an optimisation started is obeyed by starting it anew.

==========================================  ============================================================================
``model_name``, ``model_kwargs``,           refused: the weights are those of another network
``num_classes``
``target.*``, ``freeze``                    refused if other parameters learn
``checkpoint``, ``pretrained``              refused if given and other than then: the weights come from the checkpoint;
                                            a file of the same name in another folder is named in the log, and not read
``optimizer.name``                          refused: its state is another
``optimizer.lr``, ``weight_decay``,         obeyed; moments are kept, also where parameters change groups
``momentum``, ``layer_decay``
``optimizer.schedule``, ``warmup_steps``,   obeyed: the rate is that of the present schedule at the present step (a
``trainer.max_epochs``, ``max_steps``       longer cosine goes on higher up)
``optimizer.accumulate_grad_batches``,      obeyed
``clip.*``, ``loss``, ``label_smoothing``,
``max_skipped_steps``
``strategy``, ``strategy.sites``            refused: another class, or other sites or parameters of a site
``strategy.seed``                           refused if given and other than then
``strategy.sites.*.sigma``,                 obeyed; a sigma that was being learned starts anew where it is set anew
``queries_per_sample``
``strategy.keep``, ``grasp_queries``        obeyed: ZO-GraSP is run again
other settings of the strategy              obeyed
``allocator``                               obeyed: another class starts with an empty memory
``allocator.*``                             obeyed; ``p`` of an optimised Bernoulli allocator starts there
``seed_everything``                         refused: order of the data and noise follow from it
``data``, ``data.split_seed``               refused: other images were held back
``data.mixup_alpha``, ``cutmix_alpha``,     obeyed
``rand_augment``, ``num_workers``
``data.batch_size``, other settings of      obeyed at the end of an epoch, refused within: batches done there would be
the data                                    others
``trainer.precision``, number of processes  obeyed
``trainer.limit_train_batches`` and others  obeyed, see ``run_settings.OF_TRAINER``
``trainer.callbacks``                       refused without one that averages weights where the run had one
==========================================  ============================================================================

A checkpoint from before settings were saved has only those of the task to compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim import Optimizer

from flops_lightning.errors import SettingError

ALWAYS = (
    "model_name", "model_kwargs", "num_classes", "target.*", "freeze", "optimizer.name", "strategy", "strategy.sites",
    "seed_everything", "data", "data.split_seed",
)  # fmt: skip
"""Patterns of settings in which a resumed run may not differ."""

IF_GIVEN = ("checkpoint", "pretrained")
"""Settings in which it may only be silent."""

AT_ANY_STEP = ("data.mixup_alpha", "data.cutmix_alpha", "data.rand_augment", "data.num_workers")
WITHIN_AN_EPOCH = "data.*"
"""Settings in which it may not differ within an epoch, unless they are among those of the line above."""

INTERNAL = "strategy.chunk_rows", "data.num_workers"
"""Settings that change no result, not worth a line."""


class Change(NamedTuple):
    """A setting that was given another value."""

    setting: str
    before: Any
    now: Any


def check_weights(present: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Compare names and shapes.

    Raises:
        SettingError: The checkpoint is of another network; the first tensor that differs is named.
    """
    own = {name: tuple(tensor.shape) for name, tensor in present.items()}
    given = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    for name in dict.fromkeys([*own, *given]):
        there, here = given.get(name, "missing"), own.get(name, "missing")
        if there != here:
            raise SettingError(
                "ckpt_path", name, f"is {there} in the checkpoint and {here} in this network.",
                "Give the checkpoint of this configuration, or the configuration of that run.",
            )  # fmt: skip


def class_names_of(trainer: pl.Trainer | None) -> list[str] | None:
    """Names of the classes in the order of the labels; None where there is no data module that has them."""
    names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
    return None if names is None else [str(name) for name in names]


def check_classes(saved: Sequence[str] | None, present: Sequence[str] | None) -> None:
    """Compare names: data sets of other things may have as many classes.

    Raises:
        SettingError: the checkpoint tells other classes apart than the data has; the first that differs is named.
    """
    if saved is None or present is None or list(saved) == list(present):
        return
    differing = [(a, b) for a, b in zip(saved, present, strict=False) if a != b]
    then, now = differing[0] if differing else (f"{len(saved)} classes", f"{len(present)} classes")
    raise SettingError(
        "data", now, f"the checkpoint was trained to tell {then!r} there.",
        "Give the data set of that run, or start from its weights with `checkpoint`.",
    )  # fmt: skip


def check_optimizer(optimizer: Optimizer, checkpoint: Mapping[str, Any]) -> None:
    """Compare the number of parameters that are trained.

    Raises:
        SettingError: the checkpoint trained other parameters than this configuration.
    """
    states = checkpoint.get("optimizer_states", [])
    saved = sum(len(group["params"]) for state in states for group in state["param_groups"])
    own = sum(len(group["params"]) for group in optimizer.param_groups)
    if states and saved != own:
        raise SettingError(
            "ckpt_path", saved, f"the checkpoint's optimiser has that many parameters, this one {own}.",
            "Resume with the configuration of that run, or start from its weights with `checkpoint`.",
        )  # fmt: skip


def check_averaging(checkpoint: Mapping[str, Any], callbacks: Sequence[object]) -> None:
    """A run that averaged its weights can only go on with a callback that does.

    Raises:
        SettingError: there is none, so that the run would go on from the averages as if they were its weights.
    """
    averaged = "averaging_state" in checkpoint and "current_model_state" in checkpoint
    if averaged and not any(isinstance(callback, WeightAveraging) for callback in callbacks):
        raise SettingError(
            "trainer.callbacks", [type(callback).__name__ for callback in callbacks],
            "none averages weights, and the run that is to go on does.",
            "Add its EMAWeightAveraging or WeightAveraging, or begin a new run from its weights without ckpt_path.",
        )  # fmt: skip


def check_settings(saved: Mapping[str, Any], present: Mapping[str, Any], *, within_epoch: bool) -> list[Change]:
    """Compare the settings of a run with those that were given beside its checkpoint.

    Args:
        saved: Settings in the checkpoint, by name.
        present: Settings now.
        within_epoch: The checkpoint was made before the end of an epoch.

    Returns:
        What is different and obeyed; settings that only one of the two knows are not compared.

    Raises:
        SettingError: what is different cannot be obeyed.
    """
    changes = [Change(name, saved[name], now) for name, now in present.items() if name in saved and saved[name] != now]
    for change in changes:
        name = change.setting
        unsaid = (
            not change.now if name in IF_GIVEN else name == "seed_everything" and None in (change.before, change.now)
        )
        if _matches(name, (*ALWAYS, *IF_GIVEN)) and not unsaid:
            raise SettingError(
                name, change.now, f"the run that is to go on has {change.before!r}.",
                "Give its value, or leave the setting out; or begin a new run without ckpt_path.",
            )  # fmt: skip
        if within_epoch and fnmatchcase(name, WITHIN_AN_EPOCH) and name not in AT_ANY_STEP:
            raise SettingError(
                name, change.now, f"the run that is to go on has {change.before!r} and was left in the middle of an "
                "epoch.", "Give its value, or a checkpoint made at the end of an epoch.",
            )  # fmt: skip
    return [c for c in changes if c.setting not in (*INTERNAL, *IF_GIVEN, "seed_everything")]


def within_epoch(checkpoint: Mapping[str, Any]) -> bool:
    """Whether the checkpoint was made before the last batch of an epoch was done."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    return bool(progress) and progress["current"]["ready"] > 0 and not progress["is_last_batch"]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
