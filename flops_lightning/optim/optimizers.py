"""Optimiser, learning-rate schedule and gradient clipping by plain settings, for manual optimisation."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from inspect import Parameter, signature
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from flops_lightning.errors import SettingError, check_at_least, check_choice, check_positive
from flops_lightning.optim.muon import Muon, hidden_matrices

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "muon": Muon, "sgd": torch.optim.SGD
}  # fmt: skip
ScheduleName = Literal["constant", "cosine"]


@dataclass
class OptimizerSettings:
    """Optimiser and learning-rate schedule; the defaults are the paper's (Adam, 1e-4, constant).

    Attributes:
        name: ``adam``, ``adamw``, ``sgd``, or ``muon`` (:class:`flops_lightning.optim.muon.Muon`: hidden matrices, and
            AdamW for all else), or the dotted path of another ``torch.optim.Optimizer`` such as
            ``torch.optim.RMSprop``.
        arguments: Further arguments of the optimiser, by name.
        lr: Learning rate (its peak, under a schedule).
        weight_decay: Weight decay, not applied to biases, norms and other one-dimensional parameters.
        momentum: Momentum of ``sgd`` and ``muon``.
        schedule: ``constant``, or ``cosine`` down to zero at the last step.
        warmup_steps: Steps of linear warm-up from zero.
        layer_decay: Factor of the learning rate from each block to the one below it, counted by timm from the head
            down; 1: the same for all.
        bias_lr_factor: Factor of the learning rate of biases.
        accumulate_grad_batches: Number of batches whose mean gradient makes one step, fewer at the end of an epoch (the
            trainer's own setting of this name has no effect under manual optimisation).

    Example:
        >>> from flops_lightning.tasks import OptimizerSettings
        >>> OptimizerSettings(lr=1e-3, schedule="cosine", warmup_steps=10).check()
        >>> OptimizerSettings(lr=-1.0).check()
        Traceback (most recent call last):
        ...
        flops_lightning.errors.SettingError: optimizer.lr = -1.0: must be a number above 0. Write, for example, 1.0e-4.
    """

    name: str = "adam"
    arguments: dict[str, Any] = field(default_factory=dict)
    lr: float = 1e-4
    weight_decay: float = 0.0
    momentum: float = 0.0
    schedule: ScheduleName = "constant"
    warmup_steps: int = 0
    layer_decay: float = 1.0
    bias_lr_factor: float = 1.0
    accumulate_grad_batches: int = 1

    def check(self) -> None:
        """Raise a :class:`SettingError` for an unknown name, a number out of range, or momentum of Adam."""
        optimizer_class(self.name)
        check_choice("optimizer.schedule", self.schedule, get_args(ScheduleName))
        check_positive("optimizer.lr", self.lr, "Write, for example, 1.0e-4.")
        for setting in ("weight_decay", "momentum", "warmup_steps"):
            check_at_least(f"optimizer.{setting}", getattr(self, setting), 0)
        check_at_least("optimizer.accumulate_grad_batches", self.accumulate_grad_batches, 1)
        if twice := {"lr", "weight_decay", "momentum"} & self.arguments.keys():
            problem = f"has {', '.join(sorted(twice))}, which are settings of their own."
            raise SettingError("optimizer.arguments", self.arguments, problem, "Write them next to `arguments`.")
        if not 0 < self.layer_decay <= 1:
            problem = "must be in (0, 1]."
            raise SettingError("optimizer.layer_decay", self.layer_decay, problem, "Write 0.75, say, or 1.")
        check_positive("optimizer.bias_lr_factor", self.bias_lr_factor, "Write, for example, 3.0, or 1.")
        if self.momentum and self.name not in ("sgd", "muon"):
            problem = f"{self.name} has no momentum setting."
            raise SettingError("optimizer.momentum", self.momentum, problem, "Write 0, or name: sgd or muon.")


@dataclass
class ClipSettings:
    """Clipping of the gradient's norm.

    Attributes:
        norm: Largest norm of the gradient; 0: no clipping. With ``attention_norm``, that of all other parameters.
        attention_norm: Largest norm of the gradient of the attention layers (names with ``.attn.``), clipped separately
            as the paper advises (FLOPS, appendix C.4); 0: not separately.

    Example:
        >>> import torch
        >>> from flops_lightning.optim.optimizers import clip_gradients
        >>> from flops_lightning.tasks import ClipSettings
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_gradients([("head.weight", weight)], ClipSettings(norm=1.0))
        tensor(5.)
        >>> torch.allclose(weight.grad, torch.tensor([0.6, 0.8]))
        True
    """

    norm: float = 0.0
    attention_norm: float = 0.0

    def check(self) -> None:
        """Raise a :class:`SettingError` for a norm below zero."""
        for setting in ("norm", "attention_norm"):
            check_at_least(f"clip.{setting}", getattr(self, setting), 0, "Write 0 for none.")


def build_optimizer(module: nn.Module, settings: OptimizerSettings) -> Optimizer:
    """The optimiser of the trainable parameters of ``module``."""
    settings.check()
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups: list[dict[str, object]] = [{"params": parameters}]
    if settings.weight_decay:
        groups = [{"params": [p for p in parameters if p.ndim > 1]}]
        groups += [{"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}]
    if settings.layer_decay != 1:
        from timm.optim import param_groups_layer_decay

        groups = param_groups_layer_decay(module, settings.weight_decay, layer_decay=settings.layer_decay)
        groups = [{**group, "lr": settings.lr * float(str(group.pop("lr_scale")))} for group in groups]
    if settings.bias_lr_factor != 1:
        groups = _biases_apart(module, groups, settings)
    family: Any = optimizer_class(settings.name)
    if family is Muon:
        groups = _matrices_apart(module, groups)
    groups = [group for group in groups if group["params"]]
    arguments = {"lr": settings.lr, **settings.arguments}
    for name in ("weight_decay", "momentum"):  # some optimisers have neither
        if value := getattr(settings, name):
            arguments[name] = value
    try:
        return cast("Optimizer", family(groups, **arguments))
    except (TypeError, ValueError) as error:
        remedy = "Give arguments that it takes, for parameters of any shape (torch.optim.Muon: write name: muon)."
        raise SettingError("optimizer.arguments", arguments, f"{settings.name}: {error}.", remedy) from error


def _biases_apart(
    module: nn.Module, groups: Iterable[dict[str, Any]], settings: OptimizerSettings
) -> list[dict[str, object]]:
    """Each group in two: the biases, and all else."""
    biases = {id(p) for name, p in module.named_parameters() if name.rpartition(".")[2] == "bias" and p.requires_grad}
    if not biases:
        problem = "has no effect: no bias is trained."
        raise SettingError("optimizer.bias_lr_factor", settings.bias_lr_factor, problem, "Leave it out.")
    return [
        {
            **group, "params": [p for p in group["params"] if (id(p) in biases) is of_biases],
            "lr": group.get("lr", settings.lr) * (settings.bias_lr_factor if of_biases else 1.0),
        }
        for group in groups
        for of_biases in (False, True)
    ]  # fmt: skip


def _matrices_apart(module: nn.Module, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each group in two: the hidden matrices, and what is not for Muon."""
    chosen = {id(p) for p in hidden_matrices(module)}
    if not chosen:
        problem = "has no matrix to train other than embeddings and the head."
        raise SettingError("optimizer.name", "muon", problem, "Freeze less, or write name: adamw.")
    return [
        {**group, "params": [p for p in group["params"] if (id(p) in chosen) is matrices], "matrices": matrices}
        for group in groups
        for matrices in (True, False)
    ]


def optimizer_class(name: str) -> type[Optimizer]:
    """The optimiser of a short name or a dotted path; refuse one that calls the loss again in its step."""
    module, _, attribute = name.rpartition(".")
    try:
        found = OPTIMIZERS.get(name) or getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        problem = f"is neither one of {', '.join(OPTIMIZERS)} nor the path of an optimiser."
        raise SettingError("optimizer.name", name, problem, "Write, for example, torch.optim.RMSprop.")
    if signature(found.step).parameters["closure"].default is Parameter.empty:
        problem = "evaluates the loss several times in a step, and each time the gradient estimate would differ."
        raise SettingError("optimizer.name", name, problem, f"Choose from {', '.join(OPTIMIZERS)}, for example.")
    return found


def lr_factor(step: int, *, schedule: ScheduleName, warmup_steps: int, total_steps: float) -> float:
    """Factor of the learning rate at a step: linear warm-up, then constant or half a cosine down to zero."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    return cosine((step - warmup_steps) / max(1.0, total_steps - warmup_steps))


def cosine(progress: float) -> float:
    """Half a cosine from 1 down to 0 as ``progress`` goes from 0 to 1."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def build_schedule(
    optimizer: Optimizer, settings: OptimizerSettings, total_steps: float, spent: Callable[[], float] | None = None
) -> LambdaLR:
    """The learning-rate schedule, to be stepped after each optimiser step; a cosine needs a known end.

    ``spent`` tells the share of the run so far where steps do not measure it.
    """
    if settings.schedule == "cosine" and spent is None and not math.isfinite(total_steps):
        problem = "needs the number of steps."
        raise SettingError("optimizer.schedule", "cosine", problem, "Set trainer.max_epochs or max_steps, or `spend`.")
    of_steps = partial(lr_factor, schedule=settings.schedule, warmup_steps=settings.warmup_steps)

    def factor(step: int) -> float:
        if spent is None or step < settings.warmup_steps:
            return of_steps(step, total_steps=total_steps)
        return cosine(spent()) if settings.schedule == "cosine" else 1.0

    return LambdaLR(optimizer, factor)


def set_scheduled_rates(schedule: LambdaLR) -> None:
    """Set the learning rates of the present step, where a checkpoint has restored those of its own schedule."""
    groups = schedule.optimizer.param_groups
    for group, base, factor in zip(groups, schedule.base_lrs, schedule.lr_lambdas, strict=True):
        group["lr"] = base * factor(schedule.last_epoch)


@torch.no_grad()
def squared_step_sizes(optimizer: Optimizer, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Factors of the squared derivatives in the squared step of Adam or AdamW, ``1 / (sqrt(v) + eps)^2``.

    They have the parameters' shapes and are relative to the largest learning rate of a group; a parameter before its
    first step has none.
    """
    if not isinstance(optimizer, torch.optim.Adam):  # AdamW is one
        problem = f"{type(optimizer).__name__} does not precondition."
        raise SettingError("allocator.metric", "preconditioned", problem, "Write metric: parameters, or take adam.")
    weights = {}
    largest = max(group.get("initial_lr", group["lr"]) for group in optimizer.param_groups)
    for name, parameter in named.items():
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" not in state:
            continue
        group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
        correction = 1.0 - group["betas"][1] ** float(state["step"])
        share = group.get("initial_lr", group["lr"]) / largest
        weights[name] = share**2 * ((state["exp_avg_sq"] / correction).sqrt() + group["eps"]).pow(-2)
    return weights


def clip_gradients(named_parameters: Iterable[tuple[str, nn.Parameter]], settings: ClipSettings) -> Tensor:
    """Clip in place and return the norm of the whole gradient before clipping."""
    named = [(name, p) for name, p in named_parameters if p.grad is not None]
    total = torch.nn.utils.get_total_norm([p.grad for _, p in named if p.grad is not None])
    for apart, norm in ((True, settings.attention_norm), (False, settings.norm)):
        part = [p for name, p in named if (".attn." in name and settings.attention_norm > 0) is apart]
        if part and norm:
            torch.nn.utils.clip_grad_norm_(part, norm)
    return total
