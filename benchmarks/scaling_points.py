"""What the scaling benchmark measures: a base point, and one quantity changed at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.measurement import Setup, row_cross_entropy
from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import LikelihoodRatio
from flops_lightning.strategies.site_specs import default_specs

CLASSES, CHUNK_ROWS = 10, 32


@dataclass(frozen=True)
class Point:
    """A network and a step of it.

    Attributes:
        batch: Samples in a batch.
        queries: Queries of each sample at each site.
        depth: Blocks of the ViT.
        width: Features of a token; heads have 64 features, or all where there are fewer than 128.
        groups: Groups of blocks that noise enters at, beside the head.
        image: Height and width of an image; patches are 8x8 pixels.
    """

    batch: int = 8
    queries: int = 16
    depth: int = 6
    width: int = 192
    groups: int = 3
    image: int = 64

    def network(self) -> nn.Module:
        """The ViT, with random weights."""
        import timm

        return timm.create_model(
            "vit_tiny_patch16_224",
            num_classes=CLASSES,
            img_size=self.image,
            patch_size=8,
            depth=self.depth,
            embed_dim=self.width,
            num_heads=max(1, self.width // 64),
        )


BASE = Point()

SWEEPS: Mapping[str, tuple[int, ...]] = {
    "batch": (2, 4, 8, 16, 32),
    "queries": (4, 8, 16, 32, 64),
    "depth": (3, 6, 12, 24),
    "width": (96, 192, 384, 768),
    "groups": (2, 3, 6),
}
"""By the quantity that is changed: its values, the base point's among them."""


def set_up(point: Point, device: torch.device) -> Setup:
    """Random weights and data from a fixed seed."""
    torch.manual_seed(0)
    network = stage_network(point.network().to(device))
    sites = [replace(spec, queries_per_sample=point.queries) for spec in default_specs(network, point.groups)]
    strategy = LikelihoodRatio(sites=sites, chunk_rows=CHUNK_ROWS, seed=0)
    strategy.bind(network, row_cross_entropy)
    inputs = torch.randn(point.batch, 3, point.image, point.image).to(device)
    return Setup(network, strategy, inputs, torch.randint(CLASSES, (point.batch,)).to(device))
