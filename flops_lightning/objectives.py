"""Losses ``(logits (r, c), target (r,)) -> (r,)``, to be named in a configuration by their dotted path.

Where images are mixed (``data.mixup_alpha``, ``data.cutmix_alpha``) targets are probabilities ``(r, c)`` instead.
Forward learning needs no derivative of a loss; a piecewise constant one needs a sigma at which perturbed outputs cross
its steps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flops_lightning.errors import SettingError

Objective = Callable[[Tensor, Tensor], Tensor]
"""``(logits (r, c), target (r,) or (r, c)) -> (r,)``: one loss a row, no reduction."""


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """``(r,)`` negative log-probabilities of the target class, in nats; their mean under targets ``(r, c)``."""
    return F.cross_entropy(logits, target, reduction="none")


def zero_one_error(logits: Tensor, target: Tensor) -> Tensor:
    """``(r,)`` 1 where the largest logit is not the target's, else 0 (NaN where a logit is); it has no derivative."""
    if target.dim() > 1:
        raise SettingError(
            "loss", "flops_lightning.objectives.zero_one_error", "has no meaning for targets that are probabilities.",
            "Write data.mixup_alpha: 0 and data.cutmix_alpha: 0, or leave the loss out for cross-entropy.",
        )  # fmt: skip
    wrong = (logits.argmax(dim=1) != target).to(logits.dtype)
    # argmax takes a NaN for the largest, so a network of NaN would go unnoticed.
    return wrong.masked_fill(logits.isnan().any(dim=1), torch.nan)


def most_probable(target: Tensor) -> Tensor:
    """``(r,)`` labels: those given, or the most probable classes where targets are probabilities ``(r, c)``."""
    return target.argmax(dim=1) if target.dim() > 1 else target


def find_objective(path: str) -> Objective:
    """The function at a dotted path."""
    try:
        found: Any = resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        remedy = "Write the dotted path of a function, for example flops_lightning.objectives.zero_one_error, or give "
        raise SettingError("loss", path, f"cannot be imported ({error}).", remedy + "the function itself.") from error
    if not callable(found) or isinstance(found, type):
        remedy = "Write the path of a function (logits (r, c), target (r,)) -> (r,)."
        raise SettingError("loss", path, "is not a function.", remedy)
    return found


def dotted_path(objective: Objective) -> str:
    """The path for :func:`find_objective`; it ends in ``(...)`` where there is none, as for lambdas and objects."""
    named = objective if hasattr(objective, "__qualname__") else type(objective)
    path = f"{named.__module__}.{named.__qualname__}"
    try:
        return path if resolve_name(path) is objective else f"{path}(...)"
    except (ImportError, AttributeError, ValueError):
        return f"{path}(...)"


@contextmanager
def naming_the_loss(path: str) -> Iterator[None]:
    """Let errors name the loss by the path that the user gave; whoever raises them may know a method of a task only."""
    try:
        yield
    except SettingError as error:
        if error.setting != "loss" or not path:
            raise
        raise SettingError("loss", path, error.problem, error.remedy) from error
