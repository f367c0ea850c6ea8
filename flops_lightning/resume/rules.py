"""Whether a checkpoint fits the run that resumes from it, and what happens to settings that differ.

Differences marked "refused" stop the run; all others apply from the next step on and are named in the log.

==========================================  ============================================================================
``model_name``, ``model_kwargs``,           refused: the weights are those of another network
``num_classes``
``target.*``, ``freeze``                    refused if other parameters are trained
``checkpoint``, ``pretrained``              refused if given and different: the weights come from the checkpoint; a file
                                            of the same name in another folder is named in the log, and not read
``init``                                    refused: the weights come from the checkpoint
``optimizer.name``                          refused: its state does not fit
``optimizer.lr``, ``weight_decay``,         obeyed; moments are kept even if parameters change groups
``momentum``, ``layer_decay``,
``bias_lr_factor``
``optimizer.schedule``, ``warmup_steps``,   obeyed: the rate is that of the present schedule at the present step (a
``trainer.max_epochs``, ``max_steps``       longer cosine continues higher up)
``strategy``, ``strategy.sites``            refused: another class, or other sites or parameters of a site
``strategy.seed``                           refused if given and different
``strategy.generator``                      refused at the first batch if that draws other numbers
``strategy.sites.*.sigma``                  obeyed; a learned sigma restarts from the new value
``strategy.keep``, ``grasp_queries``        obeyed: ZO-GraSP runs again
``allocator``, ``allocator.*``              obeyed: another class starts with an empty memory, an optimised Bernoulli
                                            allocator at the given ``p``
``seed_everything``                         refused: the order of the data and the noise follow from it
``data``, ``data.split_seed``               refused: other images were held back
``data.mixup_alpha``, ``cutmix_alpha``,     obeyed
``rand_augment``, ``num_workers``,
``cache``, ``cache_dir``, ``train_file``,
``val_file``, ``test_file``
other ``data.*`` (``content``, ...)         obeyed at the end of an epoch; refused within one: its batches would differ
``trainer.callbacks``                       refused without a callback that averages weights where the run had one
all others                                  obeyed
==========================================  ============================================================================

Checkpoints from before all settings were saved can only be compared on the task's settings.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import lightning.pytorch as pl
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim import Optimizer

from flops_lightning.errors import SettingError

ALWAYS = (
    "model_name", "model_kwargs", "num_classes", "target.*", "freeze", "init", "optimizer.name", "strategy",
    "strategy.sites", "seed_everything", "data", "data.split_seed",
)  # fmt: skip
"""Settings (patterns) that a resumed run cannot change."""
IF_GIVEN = ("checkpoint", "pretrained")
"""Settings that it can only leave out."""
AT_ANY_STEP = (
    "data.mixup_alpha", "data.cutmix_alpha", "data.rand_augment", "data.num_workers", "data.cache", "data.cache_dir",
    "data.train_file", "data.val_file", "data.test_file",
)  # fmt: skip
WITHIN_AN_EPOCH = "data.*"
"""Settings that it cannot change within an epoch, except for those above."""
INTERNAL = "strategy.chunk_rows", "data.num_workers"
"""Settings that change no result and need no line in the log."""


class Change(NamedTuple):
    """A setting that was given another value."""

    setting: str
    before: Any
    now: Any


def check_weights(present: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raise a :class:`SettingError` that names the first tensor whose name or shape differs."""
    own = {name: tuple(tensor.shape) for name, tensor in present.items()}
    given = {name: tuple(tensor.shape) for name, tensor in saved.items()}
    for name in dict.fromkeys([*own, *given]):
        there, here = given.get(name, "missing"), own.get(name, "missing")
        if there != here:
            remedy = "Give the checkpoint of this configuration, or the configuration of that run."
            raise SettingError("ckpt_path", name, f"is {there} in the checkpoint and {here} in this network.", remedy)


def class_names_of(trainer: pl.Trainer | None) -> list[str] | None:
    """Names of the classes in the order of the labels; None without a data module that has them."""
    names = getattr(getattr(trainer, "datamodule", None), "class_names", None)
    return None if names is None else [str(name) for name in names]


def check_classes(saved: Sequence[str] | None, present: Sequence[str] | None) -> None:
    """Raise a :class:`SettingError` that names the first class that differs: other data may have as many."""
    if saved is None or present is None or list(saved) == list(present):
        return
    differing = [(a, b) for a, b in zip(saved, present, strict=False) if a != b]
    then, now = differing[0] if differing else (f"{len(saved)} classes", f"{len(present)} classes")
    problem = f"the checkpoint was trained on {then!r} instead, the first difference between the classes."
    remedy = "Give the data set of that run, or start from its weights with `checkpoint`."
    raise SettingError("data", now, problem, remedy)


def normalization_of(trainer: pl.Trainer | None) -> dict[str, list[float]] | None:
    """Mean and standard deviation that images are normalised with; None without a data module that has them."""
    data = getattr(trainer, "datamodule", None)
    parts = {name: getattr(data, name, None) for name in ("mean", "std")}
    known = all(isinstance(part, (list, tuple)) for part in parts.values())
    return {name: [float(value) for value in part or ()] for name, part in parts.items()} if known else None


def check_normalization(saved: Mapping[str, Any] | None, present: Mapping[str, Any] | None) -> None:
    """Raise a :class:`SettingError` if the checkpoint was trained on images of another mean or standard deviation."""
    if saved is not None and present is not None and dict(saved) != dict(present):
        now, then = (f"mean {each['mean']}, std {each['std']}" for each in (present, saved))
        problem = f"the checkpoint was trained on images normalised with {then}."
        raise SettingError("data", now, problem, "Give data.normalization as in that run.")


def check_optimizer(optimizer: Optimizer, checkpoint: Mapping[str, Any]) -> None:
    """Raise a :class:`SettingError` if the checkpoint trained another number of parameters."""
    states = checkpoint.get("optimizer_states", [])
    saved = sum(len(group["params"]) for state in states for group in state["param_groups"])
    own = sum(len(group["params"]) for group in optimizer.param_groups)
    if states and saved != own:
        remedy = "Resume with the configuration of that run, or start from its weights with `checkpoint`."
        raise SettingError("optimizer", f"{own} parameters", f"the checkpoint's optimiser has {saved}.", remedy)


def check_averaging(checkpoint: Mapping[str, Any], callbacks: Sequence[object]) -> None:
    """Require a callback that averages weights where the run had one, or it would take the averages for its weights."""
    averaged = "averaging_state" in checkpoint and "current_model_state" in checkpoint
    if averaged and not any(isinstance(callback, WeightAveraging) for callback in callbacks):
        problem = "no callback averages weights, but the checkpoint's run does."
        remedy = "Add its EMAWeightAveraging or WeightAveraging, or start a new run from its weights without ckpt_path."
        raise SettingError("trainer.callbacks", [type(callback).__name__ for callback in callbacks], problem, remedy)


def check_settings(saved: Mapping[str, Any], present: Mapping[str, Any], *, within_epoch: bool) -> list[Change]:
    """Differences between a checkpoint's settings and the present ones that are obeyed; others are refused.

    Settings that only one of the two knows are not compared.
    """
    changes = [Change(name, saved[name], now) for name, now in present.items() if name in saved and saved[name] != now]
    for change in changes:
        name = change.setting
        seed = name == "seed_everything"
        left_out = not change.now if name in IF_GIVEN else seed and None in (change.before, change.now)
        if any(fnmatchcase(name, pattern) for pattern in (*ALWAYS, *IF_GIVEN)) and not left_out:
            remedy = "Give that value, leave the setting out, or start a new run without ckpt_path."
            raise SettingError(name, change.now, f"the checkpoint's run has {change.before!r}.", remedy)
        if within_epoch and fnmatchcase(name, WITHIN_AN_EPOCH) and name not in AT_ANY_STEP:
            problem = f"the checkpoint's run has {change.before!r} and stopped in the middle of an epoch."
            raise SettingError(name, change.now, problem, "Give that value, or a checkpoint from the end of an epoch.")
    return [c for c in changes if c.setting not in (*INTERNAL, *IF_GIVEN, "seed_everything")]


def within_epoch(checkpoint: Mapping[str, Any]) -> bool:
    """Whether the checkpoint was made before the last batch of an epoch was processed."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    return bool(progress) and progress["current"]["ready"] > 0 and not progress["is_last_batch"]
