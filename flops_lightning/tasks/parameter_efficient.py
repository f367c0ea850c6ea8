"""Which parameters of a backbone learn: all, or the few of a parameter-efficient target.

The variance of a forward-only estimate grows with the number of directions that are perturbed, so few parameters suit
it. What a target adds to a network (LoRA, prompts) folds into plain timm weights again: :func:`plain_weights`.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from flops_lightning.errors import SettingError, check_choice, check_positive, import_extra

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

TargetKind = Literal["all", "bias", "norm", "head", "lora", "visual_prompt"]

HEAD = "head."
PROMPT = "norm_pre.tokens"
ADDED = (".base_layer.", ".lora_", PROMPT)
"""Parts of the names that only a network with LoRA or prompts has."""
_ONLY_FOR = {"rank": "lora", "alpha": "lora", "modules": "lora", "tokens": "visual_prompt"}


@dataclass
class TargetSettings:
    """Setting: which parameters learn; ``freeze`` takes away from them.

    Attributes:
        kind: ``all``. ``bias``: the biases, those of the norms included (BitFit, Ben Zaken et al., ACL 2022).
            ``norm``: weights and biases of the normalisation layers. ``head``: the head. ``lora``: low-rank additions
            to linear layers and convolutions (Hu et al., ICLR 2022), by the library peft. ``visual_prompt``: tokens
            put between class token and patches (VPT-shallow, Jia et al., ECCV 2022).
        head: The head learns as well.
        rank: ``lora`` only: rank of each addition.
        alpha: ``lora`` only: an addition is scaled by ``alpha / rank``.
        modules: ``lora`` only: patterns (as in a shell) of the full names of the linear and convolution modules that
            get an addition. The head never gets one.
        tokens: ``visual_prompt`` only: number of prompts.

    Example:
        >>> from flops_lightning.tasks import TargetSettings
        >>> TargetSettings(kind="bias", head=False).check()
        >>> TargetSettings(kind="bias", rank=2).check()
        Traceback (most recent call last):
        ...
        flops_lightning.errors.SettingError: target.rank = 2: has no effect with kind: bias. Remove it.
    """

    kind: TargetKind = "all"
    head: bool = True
    rank: int = 4
    alpha: float = 8.0
    modules: list[str] = field(default_factory=lambda: ["blocks.*.attn.qkv", "blocks.*.attn.proj"])
    tokens: int = 8

    def check(self) -> None:
        """Raise a :class:`SettingError` for values out of range or without effect."""
        check_choice("target.kind", self.kind, get_args(TargetKind))
        if self.kind == "head" and not self.head:
            raise SettingError("target.head", False, "leaves nothing to train with kind: head.", "Write true.")
        for name, kind in _ONLY_FOR.items():
            value = getattr(self, name)
            if self.kind != kind and value != getattr(TargetSettings(), name):
                raise SettingError(f"target.{name}", value, f"has no effect with kind: {self.kind}.", "Remove it.")
        if isinstance(self.modules, str) or not self.modules:
            problem = "must be a list of patterns."
            raise SettingError("target.modules", self.modules, problem, 'Write, for example, ["blocks.*.attn.*"].')
        for name in ("rank", "tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise SettingError(f"target.{name}", value, "must be a positive integer.", "Write, for example, 4.")
        check_positive("target.alpha", self.alpha, "Write, for example, 8.0.")


class VisualPrompt(nn.Module):
    """Puts learned tokens between the prefix tokens (class, registers) and the patches, in front of a ViT's blocks.

    It takes the place of ``norm_pre``, which most ViTs lack and which sees the prompts as it sees all other tokens. So
    the prompts are what timm calls register tokens, with a position embedding of zero.
    """

    def __init__(self, norm: nn.Module, *, tokens: int, prefix: int, width: int, std: float) -> None:
        super().__init__()
        self.norm, self.prefix = norm, prefix
        self.tokens = nn.Parameter(std * torch.randn(1, tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        """``(b, t + tokens, d)`` from ``(b, t, d)``."""
        prompts = self.tokens.to(x.dtype).expand(len(x), -1, -1)
        out: Tensor = self.norm(torch.cat((x[:, : self.prefix], prompts, x[:, self.prefix :]), dim=1))
        return out


def apply_target(backbone: nn.Module, settings: TargetSettings) -> None:
    """Add what the target adds and freeze what it does not train; refuse a network without any of its parameters."""
    settings.check()
    if settings.kind == "lora":
        _inject_lora(backbone, settings)
    elif settings.kind == "visual_prompt":
        _insert_prompts(backbone, settings.tokens)
    trained = set(target_parameters(backbone, settings.kind))
    if not trained:
        problem = f"{type(backbone).__name__} has no such parameters."
        raise SettingError("target.kind", settings.kind, problem, "Choose another kind.")
    for name, parameter in backbone.named_parameters():
        in_head = name.startswith(HEAD)
        if settings.kind != "all" or in_head:  # of all, a backbone may hold some fixed itself
            parameter.requires_grad_(settings.head if in_head else name in trained)


def check_target_learns(backbone: nn.Module, kind: TargetKind, freeze: Sequence[str]) -> None:
    """Raise a :class:`SettingError` if ``freeze`` leaves nothing of a target to train."""
    trainable = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    if kind != "all" and trainable.isdisjoint(target_parameters(backbone, kind)):
        problem = f"leaves nothing of target.kind = {kind!r} to train."
        raise SettingError("freeze", list(freeze), problem, "Write freeze: [].")


def target_parameters(backbone: nn.Module, kind: TargetKind) -> list[str]:
    """Names of a target's parameters, trained or not; without the head, unless it is the target."""
    norms = {  # torch and timm have many, without a common base
        f"{name}.{leaf}"
        for name, module in backbone.named_modules()
        if "norm" in type(module).__name__.lower()
        for leaf, _ in module.named_parameters(recurse=False)
    }
    belongs: dict[TargetKind, Callable[[str], bool]] = {
        "all": bool,
        "bias": lambda name: name.endswith((".bias", "_bias")),
        "norm": norms.__contains__,
        "lora": lambda name: ".lora_" in name,
        "visual_prompt": PROMPT.__eq__,
    }
    names = [name for name, _ in backbone.named_parameters()]
    if kind == "head":
        return [name for name in names if name.startswith(HEAD)]
    return [name for name in names if belongs[kind](name) and not name.startswith(HEAD)]


def _inject_lora(backbone: nn.Module, settings: TargetSettings) -> None:
    peft = import_extra("peft", extra="peft", setting="target.kind", value="lora")
    layers = {
        name: module
        for name, module in backbone.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d)) and not f"{name}.".startswith(HEAD)
    }
    for pattern in settings.modules:
        if not any(fnmatchcase(name, pattern) for name in layers):
            problem = "matches no linear or convolution module outside the head."
            remedy = f"Write a pattern for names like {list(layers)[:4]}."
            raise SettingError("target.modules", pattern, problem, remedy)
    chosen = [name for name in layers if any(fnmatchcase(name, pattern) for pattern in settings.modules)]
    for name in chosen:
        full = min(len(layers[name].weight), layers[name].weight[0].numel())
        if settings.rank > full:
            problem = f"{name} has no more than rank {full}."
            raise SettingError("target.rank", settings.rank, problem, f"Write {full} or less.")
    exactly = "|".join(re.escape(name) for name in chosen)  # peft takes names in a list for endings of names
    alpha: Any = settings.alpha  # declared as an integer, and only ever divided by the rank
    config = peft.LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=exactly)
    peft.inject_adapter_in_model(config, backbone)


def _insert_prompts(backbone: nn.Module, tokens: int) -> None:
    vit = cast("VisionTransformer", backbone)
    if not hasattr(vit, "norm_pre") or not hasattr(vit, "num_prefix_tokens"):
        problem = f"{type(vit).__name__} is not a ViT."
        raise SettingError("target.kind", "visual_prompt", problem, "Take one, or another kind of target.")
    if vit.dynamic_img_size and vit.pos_embed is not None and not vit.no_embed_class:
        # It would count the prompts among the prefix tokens that have a position embedding.
        raise SettingError(
            "target.kind", "visual_prompt", "a ViT with dynamic_img_size resizes its position embedding without regard "
            "to prompts.", "Leave model_kwargs.dynamic_img_size out, or choose another kind of target.",
        )  # fmt: skip
    # Glorot's rule for the patch embedding, as in the paper.
    std = math.sqrt(2.0 / (vit.patch_embed.proj.weight[0].numel() + vit.embed_dim))
    vit.norm_pre = VisualPrompt(vit.norm_pre, tokens=tokens, prefix=vit.num_prefix_tokens, width=vit.embed_dim, std=std)
    vit.num_prefix_tokens += tokens  # pooling over the patches leaves them out


def plain_weights(backbone: nn.Module) -> dict[str, Tensor]:
    """The weights under timm's own names, LoRA merged into its layers and prompts turned into register tokens.

    A file with prompts is that of the same timm model with ``reg_tokens`` raised by their number.
    """
    state = {name: tensor.detach() for name, tensor in backbone.state_dict().items()}
    for name, module in backbone.named_modules():
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            weight = f"{name}.base_layer.weight"
            state[weight] = state[weight] + sum(module.get_delta_weight(a).detach() for a in module.active_adapters)
    state = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    return _as_registers(backbone, state) if PROMPT in state else state


def _as_registers(backbone: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    vit = cast("VisionTransformer", backbone)
    tokens, prefix = state.pop(PROMPT), vit.norm_pre.prefix
    state = {name.replace("norm_pre.norm.", "norm_pre."): tensor for name, tensor in state.items()}
    state["reg_token"] = torch.cat([*(state[name] for name in ("reg_token",) if name in state), tokens], dim=1)
    if "pos_embed" in state and not vit.no_embed_class:  # it has an entry for each register token
        parts = (state["pos_embed"][:, :prefix], torch.zeros_like(tokens), state["pos_embed"][:, prefix:])
        state["pos_embed"] = torch.cat(parts, dim=1)
    total = state["reg_token"].shape[1]
    rank_zero_info(f"prompts are written as register tokens: load the weights with model_kwargs.reg_tokens = {total}.")
    return state
