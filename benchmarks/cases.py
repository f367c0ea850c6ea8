"""What is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn

PILOTS = 4
"""Queries of a sample that are pilots, where an allocator chooses the counts."""


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        model: Name in table and records.
        build: Makes the network; weights are random, speed does not depend on them.
        image: ``(channels, height, width)`` of an input.
        classes: Number of classes.
        batch: Samples in a batch.
        queries: Queries of each sample at each site.
        chunk_rows: Upper bound of rows in one forward pass, the same for every contender; near the fastest for plain
            inference on a CPU, where activations that leave the cache cost more than small products.
        rounds: Timed rounds.
        strategy: ``LikelihoodRatio``, or ``SPSA`` with factored directions.
        kind: Kind of the likelihood ratio's sites: ``group`` (the paper's three groups and the head) or ``block``.
        references: Whether the plain reference steps are timed as well, by far the slowest.
        allocation: ``equal`` counts, or those that a ``GaussianAllocator`` chooses anew at every step from pilots (4 of
            the queries, at the highest group) and predictions, all of it part of the step.
        suffixes_only: Time nothing but the queries and inference of the same suffixes.
        compiled: Compile the suffixes, and all that inference runs but the embedding.
    """

    model: str
    build: Callable[[], nn.Module]
    image: tuple[int, int, int]
    classes: int
    batch: int
    queries: int
    chunk_rows: int
    rounds: int
    strategy: Literal["LikelihoodRatio", "SPSA"] = "LikelihoodRatio"
    kind: Literal["group", "block"] = "group"
    references: bool = True
    allocation: Literal["equal", "gaussian"] = "equal"
    suffixes_only: bool = False
    compiled: bool = False


def tiny_digits_vit() -> nn.Module:
    """The quickstart's network: 5 tokens of width 64, 6 blocks, images of 8x8 pixels."""
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=10,
        img_size=8,
        patch_size=4,
        in_chans=1,
        embed_dim=64,
        depth=6,
        num_heads=4,
        mlp_ratio=2.0,
    )


def vit_micro() -> nn.Module:
    """The ViT of ``configs/vit_micro_cifar10.yaml``: 65 tokens of width 192, 6 blocks, images of 32x32 pixels."""
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=10,
        img_size=32,
        patch_size=4,
        depth=6,
        num_heads=6,
        mlp_ratio=2.0,
        pre_norm=True,
    )


def vit_tiny() -> nn.Module:
    """ViT-Tiny/16 at 224 pixels: 197 tokens of width 192, 12 blocks."""
    import timm

    return timm.create_model("vit_tiny_patch16_224")


DIGITS = Case(
    "tiny ViT, digits 8x8", tiny_digits_vit, (1, 8, 8), 10, batch=64, queries=20, chunk_rows=128, rounds=15
)  # fmt: skip
VIT_MICRO = Case(
    "ViT-Micro/4, 32 px", vit_micro, (3, 32, 32), 10, batch=64, queries=20, chunk_rows=64, rounds=5
)  # fmt: skip
VIT_TINY = Case(
    "ViT-Tiny/16, 224 px", vit_tiny, (3, 224, 224), 1000, batch=8, queries=20, chunk_rows=16, rounds=5
)  # fmt: skip


def vit_base() -> nn.Module:
    """ViT-Base/16 at 224 pixels: 197 tokens of width 768, 12 blocks."""
    import timm

    return timm.create_model("vit_base_patch16_224")


VIT_BASE = Case(
    "ViT-Base/16, 224 px", vit_base, (3, 224, 224), 1000, batch=1, queries=20, chunk_rows=10, rounds=3, references=False
)  # fmt: skip


def full_cases() -> tuple[Case, ...]:
    """All cases at their full size; an hour on two cores."""
    ways: tuple[dict[str, Any], ...] = (
        {"allocation": "gaussian"},
        {"kind": "block", "suffixes_only": True, "rounds": 3},
        {"strategy": "SPSA"},
    )
    others = [replace(case, **way, references=False) for case in (VIT_TINY, VIT_BASE) for way in ways]
    return DIGITS, VIT_TINY, VIT_BASE, *others


def quick_cases() -> tuple[Case, ...]:
    """Two networks with fewer rows and rounds; below a minute on two cores."""
    return replace(DIGITS, batch=8, rounds=3), replace(VIT_TINY, batch=1, queries=8, rounds=3, references=False)
