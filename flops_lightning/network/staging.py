"""A network as a list of stages, so that a prefix runs once and each query pays only for its suffix.

Stages reference the modules of the network they were made from: nothing is copied and no ``state_dict`` key changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # the common base of BatchNorm1d/2d/3d and SyncBatchNorm
from torch.utils.flop_counter import FlopCounterMode

from flops_lightning.errors import SettingError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer


@dataclass(frozen=True, eq=False)
class Stage:
    """One step of the forward pass: a tensor in, a tensor out.

    Attributes:
        name: How settings refer to it.
        run: The computation.
        members: Dotted names (of modules or parameters of the network) that it owns.
        reads: Tokens ``t`` of its input ``(r, t, d)`` on which its output depends; None means all of them.
        narrows: It may be called with only the tokens in ``reads`` and returns the same.
        tokenwise: Submodules whose output at a token reaches that same token of the stage's output and no other (where
            ``reads`` is set: that reach the output at these tokens alone).
    """

    name: str
    run: Callable[[Tensor], Tensor]
    members: tuple[str, ...]
    reads: slice | None = None
    narrows: bool = False
    tokenwise: tuple[str, ...] = ()

    def owns(self, name: str) -> bool:
        """Whether the dotted ``name`` of a parameter or module belongs to this stage."""
        return any(name == member or name.startswith(member + ".") for member in self.members)


class StagedNetwork:
    """A network cut into stages that run one after the other.

    ``run(x, 0)`` equals ``module(x)``. An activation with index ``i`` is the input of stage ``i``; the one with index
    ``len(stages)`` is the network's output.
    """

    def __init__(self, module: nn.Module, stages: tuple[Stage, ...]) -> None:
        """Check that the stages own every parameter of ``module`` exactly once.

        Raises:
            SettingError: the network has batch normalisation, a parameter without a stage, or weights tied across
                stages.
        """
        self.module = module
        self.stages = stages
        self.index = {stage.name: i for i, stage in enumerate(stages)}
        _refuse_batch_norm(module)
        owners: dict[int, set[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            owner = [stage.name for stage in stages if stage.owns(name)]
            if len(owner) != 1:
                raise SettingError(
                    "network", type(module).__name__, f"parameter {name!r} belongs to the stages {owner}, not to one.",
                    "Build the StagedNetwork by hand with stages whose `members` cover every parameter once.",
                )  # fmt: skip
            owners.setdefault(id(parameter), set()).add(owner[0])
        for name, parameter in module.named_parameters():
            if len(owners[id(parameter)]) > 1:
                raise SettingError(
                    "network", type(module).__name__, f"{name!r} is tied across {sorted(owners[id(parameter)])}.",
                    "Untie the weights, or put the modules that share them into one stage.",
                )  # fmt: skip

    def __len__(self) -> int:
        """Number of stages."""
        return len(self.stages)

    def with_all_tokens(self) -> StagedNetwork:
        """The same network, where every stage computes all tokens of its output, whether they are read or not."""
        return StagedNetwork(self.module, tuple(replace(s, run=getattr(s.run, "whole", s.run)) for s in self.stages))

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Run stages ``start`` to ``stop`` (exclusive; to the end by default) on ``x``."""
        for stage in self.stages[start:stop]:
            x = stage.run(x)
        return x

    def run_suffix(self, x: Tensor, start: int) -> Tensor:
        """The same from ``start`` to the end, for queries: their chunks have one shape, which a compiler can use."""
        return self.run(x, start)

    def parameters_of(self, first: int, last: int) -> dict[str, nn.Parameter]:
        """Trainable parameters owned by stages ``first`` to ``last`` (inclusive), by name."""
        stages = self.stages[first : last + 1]
        return {name: p for name, p in self.trainable().items() if any(stage.owns(name) for stage in stages)}

    def trainable(self) -> dict[str, nn.Parameter]:
        """All parameters that require a gradient, by name."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def frozen(self) -> tuple[str, ...]:
        """Names of the parameters that require no gradient."""
        return tuple(name for name, p in self.module.named_parameters() if not p.requires_grad)

    def modules_of(self, stage: int) -> Iterator[tuple[str, nn.Module]]:
        """Named submodules owned by one stage."""
        owner = self.stages[stage]
        return ((name, module) for name, module in self.module.named_modules() if name and owner.owns(name))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Eval mode (no dropout, no drop-path) for the duration, then every module's own mode again.

        A query differs from the clean pass by its noise alone: dropout would drown the difference of their losses.
        """
        modes = [(module, module.training) for module in self.module.modules()]
        self.module.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def flops(run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, Tensor]:
    """Floating-point operations of matrix products, convolutions and attention in ``run(x)``, and its output."""
    # Fused attention is not counted on every device and by every version of torch; as plain products it is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = run(x)
    return float(counter.get_total_flops()), output


def stage_network(module: nn.Module) -> StagedNetwork:
    """Cut a timm ``VisionTransformer`` or an ``nn.Sequential`` into stages.

    A ViT becomes ``embed``, ``blocks.0`` ... ``blocks.N``, ``pool`` (final norm and pooling) and ``head``; a
    ``Sequential`` becomes its children under their own names.

    Raises:
        SettingError: the network is neither, or has something that cannot be staged; the message says what to do.
    """
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        _refuse_lazy(module)
        # Unlike `named_children`, this lists a module twice that runs twice.
        children = [item for item in module.named_modules(remove_duplicate=False) if item[0] and "." not in item[0]]
        return StagedNetwork(module, tuple(Stage(name, child, (name,)) for name, child in children))
    if "timm" in sys.modules:
        from timm.models.vision_transformer import VisionTransformer

        if isinstance(module, VisionTransformer):
            return _stage_timm_vit(module)
    raise SettingError(
        "network", type(module).__name__, "is neither an nn.Sequential nor a timm VisionTransformer.",
        "Write its forward pass as an nn.Sequential, or build a StagedNetwork by hand for a strategy without a task.",
    )  # fmt: skip


def _refuse_batch_norm(module: nn.Module) -> None:
    for name, child in module.named_modules():
        if isinstance(child, BatchNorm):
            raise SettingError(
                "network", f"{name}: {type(child).__name__}",
                "batch normalisation ties the loss of a sample to the other rows of its chunk in train mode, and its "
                "statistics never adapt in eval mode, in which queries run.",
                "Use GroupNorm or LayerNorm, or torchvision.ops.FrozenBatchNorm2d for pretrained statistics.",
            )  # fmt: skip


def _refuse_lazy(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise SettingError(
                "network", name, "is a lazy parameter without a shape.", "Run one forward pass before staging it."
            )


# The stages of a timm ViT are small objects instead of closures, so that a network survives pickling and deepcopy
# together with its stages.


@dataclass(frozen=True, eq=False)
class _Embed:
    vit: VisionTransformer

    def __call__(self, x: Tensor) -> Tensor:
        # `_pos_embed` is private, but nothing public of timm adds class, register and position tokens alone.
        return self.vit.norm_pre(self.vit.patch_drop(self.vit._pos_embed(self.vit.patch_embed(x))))


@dataclass(frozen=True, eq=False)
class _Block:
    vit: VisionTransformer
    index: int

    @property
    def block(self) -> nn.Module:
        return self.vit.blocks[self.index]

    def __call__(self, x: Tensor) -> Tensor:
        output: Tensor = self.block(x)
        return output


@dataclass(frozen=True, eq=False)
class _LastBlock:
    """The last block at the tokens that are read of it: queries, projection and MLP of the others are left out.

    The arithmetic of timm's ``Block`` and ``Attention``, module by module, so that hooks on them and replaced
    parameters work as ever.
    """

    vit: VisionTransformer
    index: int
    tokens: slice

    @property
    def whole(self) -> _Block:
        """The block at all tokens."""
        return _Block(self.vit, self.index)

    def __call__(self, x: Tensor) -> Tensor:
        block = cast("Any", self.vit.blocks[self.index])
        h = x[:, self.tokens]
        h = h + block.drop_path1(block.ls1(self._attention(block.attn, block.norm1(x))))
        return h + block.drop_path2(block.ls2(block.mlp(block.norm2(h))))

    def _attention(self, attn: Any, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        q, k, v = attn.qkv(x).reshape(rows, tokens, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = attn.q_norm(q[:, :, self.tokens]), attn.k_norm(k)
        if attn.fused_attn:
            dropped = attn.attn_drop.p if attn.training else 0.0
            mixed = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropped)
        else:
            mixed = attn.attn_drop((q * attn.scale @ k.transpose(-2, -1)).softmax(dim=-1)) @ v
        mixed = mixed.transpose(1, 2).flatten(2)
        return attn.proj_drop(attn.proj(mixed))


def _narrows(block: nn.Module) -> bool:
    """Whether :class:`_LastBlock` knows the block's arithmetic."""
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block

    if type(block) is not Block or type(block.attn) is not Attention:
        return False
    # Options that not all versions of timm have.
    scaled = not isinstance(getattr(block.attn, "norm", nn.Identity()), nn.Identity)
    return not scaled and getattr(block.attn, "gate", None) is None


@dataclass(frozen=True, eq=False)
class _Pool:
    vit: VisionTransformer

    def __call__(self, x: Tensor) -> Tensor:
        return self.vit.forward_head(self.vit.norm(x), pre_logits=True)


@dataclass(frozen=True, eq=False)
class _Head:
    vit: VisionTransformer

    def __call__(self, x: Tensor) -> Tensor:
        return self.vit.head(x)


def _stage_timm_vit(vit: VisionTransformer) -> StagedNetwork:
    from timm.models.vision_transformer import Block, VisionTransformer

    for method in ("forward", "forward_features", "forward_head", "pool"):
        if getattr(type(vit), method) is not getattr(VisionTransformer, method):
            raise SettingError(
                "model_name", type(vit).__name__, f"has its own `{method}`: its stages are not those of a plain ViT.",
                "Use a model whose class is timm's VisionTransformer, or build a StagedNetwork by hand for a strategy "
                "without a task.",
            )  # fmt: skip
    last = len(vit.blocks) - 1

    def tokenwise(i: int) -> tuple[str, ...]:
        # After the attention's mixing, the standard block treats tokens one by one.
        return (
            tuple(f"blocks.{i}.{part}" for part in ("attn.proj", "norm2", "mlp"))
            if type(vit.blocks[i]) is Block
            else ()
        )

    reads, narrows = None, False
    if vit.attn_pool is None:
        if vit.global_pool == "token":
            reads, narrows = slice(0, 1), True
        elif vit.global_pool in ("avg", "max", "avgmax") and not vit.pool_include_prefix:
            reads = slice(vit.num_prefix_tokens, None)

    def block(i: int) -> Callable[[Tensor], Tensor]:
        narrow = i == last and narrows and reads is not None and _narrows(vit.blocks[i])
        return _LastBlock(vit, i, reads) if narrow and reads is not None else _Block(vit, i)

    blocks = tuple(Stage(f"blocks.{i}", block(i), (f"blocks.{i}",), tokenwise=tokenwise(i)) for i in range(last + 1))
    return StagedNetwork(
        vit,
        (
            Stage("embed", _Embed(vit), ("patch_embed", "cls_token", "reg_token", "pos_embed", "norm_pre")),
            *blocks,
            Stage(
                "pool",
                _Pool(vit),
                ("norm", "fc_norm", "attn_pool"),
                reads=reads,
                narrows=narrows,
                tokenwise=("norm",) if reads else (),
            ),
            Stage("head", _Head(vit), ("head",)),
        ),
    )
