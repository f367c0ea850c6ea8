"""The stages of timm's ``VisionTransformer``."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from timm.layers.attention import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

from flops_lightning.network.staging import Stage, StagedNetwork

METHODS = ("forward", "forward_features", "forward_head", "pool")

# The stages of a timm ViT are small objects and partials instead of closures, so that a network survives pickling and
# deepcopy together with its stages.


def _embed(vit: VisionTransformer, x: Tensor) -> Tensor:
    # `_pos_embed` is private, but nothing public of timm adds class, register and position tokens alone.
    return vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(x))))


def _pool(vit: VisionTransformer, x: Tensor) -> Tensor:
    return vit.forward_head(vit.norm(x), pre_logits=True)


def _head(vit: VisionTransformer, x: Tensor) -> Tensor:
    return vit.head(x)


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
    if type(block) is not Block or type(block.attn) is not Attention:
        return False
    # Options that not all versions of timm have.
    scaled = not isinstance(getattr(block.attn, "norm", nn.Identity()), nn.Identity)
    return not scaled and getattr(block.attn, "gate", None) is None


def is_plain(vit: VisionTransformer) -> bool:
    """Whether its forward pass is that of timm's ``VisionTransformer``."""
    return all(getattr(type(vit), name) is getattr(VisionTransformer, name) for name in METHODS)


def stage_vit(vit: VisionTransformer) -> StagedNetwork:
    """Cut a ViT that :func:`is_plain` into ``embed``, ``blocks.0`` ... ``blocks.N``, ``pool`` and ``head``."""
    last = len(vit.blocks) - 1

    def tokenwise(i: int) -> tuple[str, ...]:
        # After the attention's mixing, the standard block treats tokens one by one.
        parts = ("attn.proj", "norm2", "mlp") if type(vit.blocks[i]) is Block else ()
        return tuple(f"blocks.{i}.{part}" for part in parts)

    reads, narrows = None, False
    if vit.attn_pool is None:
        if vit.global_pool == "token":
            reads, narrows = slice(0, 1), True
        elif vit.global_pool in ("avg", "max", "avgmax") and not vit.pool_include_prefix:
            reads = slice(vit.num_prefix_tokens, None)

    def block(i: int) -> Callable[[Tensor], Tensor]:
        narrow = i == last and narrows and reads is not None and _narrows(vit.blocks[i])
        return _LastBlock(vit, i, reads) if narrow and reads is not None else _Block(vit, i)

    embed = Stage("embed", partial(_embed, vit), ("patch_embed", "cls_token", "reg_token", "pos_embed", "norm_pre"))
    blocks = [Stage(f"blocks.{i}", block(i), (f"blocks.{i}",), tokenwise=tokenwise(i)) for i in range(last + 1)]
    members, normed = ("norm", "fc_norm", "attn_pool"), ("norm",) if reads else ()
    pool = Stage("pool", partial(_pool, vit), members, reads=reads, narrows=narrows, tokenwise=normed)
    return StagedNetwork(vit, (embed, *blocks, pool, Stage("head", partial(_head, vit), ("head",))))
