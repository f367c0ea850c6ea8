"""What the benchmarks run: networks, their inputs, and the strategy at its sites."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flops_lightning.network.staging import StagedNetwork, stage_network
from flops_lightning.noise.generators import GeneratorSetting
from flops_lightning.strategies import SPSA, LikelihoodRatio, PilotSpec, SiteSpec
from flops_lightning.strategies.site_specs import default_specs

PILOTS = 4
"""Queries of a sample that are pilots, where an allocator chooses the counts."""


def site_specs(network: StagedNetwork, queries: int, kind: str = "group", *, groups: int = 3) -> list[SiteSpec]:
    """The paper's groups and the head, or every ``block``, with so many queries per sample at each."""
    ends = [network.stages[0].name, network.stages[-1].name]
    specs = [SiteSpec(stages=ends, kind="block")] if kind == "block" else default_specs(network, groups)
    return [replace(spec, queries_per_sample=queries) for spec in specs]


@dataclass(frozen=True)
class Case:
    model: str
    build: Callable[[], nn.Module]  # weights are random, speed does not depend on them
    image: tuple[int, int, int]  # channels, height, width
    classes: int
    batch: int
    queries: int  # of each sample at each site
    # Rows of a forward pass at most, for every contender; near the fastest for plain inference on a CPU, where
    # activations that leave the cache cost more than small products.
    chunk_rows: int
    rounds: int
    strategy: Literal["LikelihoodRatio", "SPSA"] = "LikelihoodRatio"  # SPSA: with factored directions
    kind: Literal["group", "block"] = "group"  # of the sites: the paper's groups and the head, or blocks
    groups: int = 3
    references: bool = True  # also time the plain reference steps, by far the slowest
    # Gaussian: counts from pilots (at the highest group) and predictions anew at every step, all of it in the step.
    allocation: Literal["equal", "gaussian"] = "equal"
    suffixes_only: bool = False  # time only the queries, and inference of the same suffixes
    compiled: bool = False  # compile the suffixes, and all that inference runs but the embedding
    generator: GeneratorSetting = "auto"

    def load(self, device: torch.device, rows: int = 0) -> tuple[StagedNetwork, Tensor, Tensor]:
        """Network, inputs and targets from a fixed seed; ``rows`` samples instead of a batch."""
        torch.manual_seed(0)
        network, rows = stage_network(self.build().to(device).eval()), rows or self.batch
        return network, torch.randn(rows, *self.image).to(device), torch.randint(self.classes, (rows,)).to(device)

    def make_strategy(self, network: StagedNetwork) -> LikelihoodRatio | SPSA:
        sites = site_specs(network, self.queries, self.kind, groups=self.groups)
        settings: dict[str, Any] = {"chunk_rows": self.chunk_rows, "compile_suffixes": self.compiled, "seed": 0}
        settings["generator"] = self.generator
        if self.allocation == "gaussian":
            settings["pilots"] = PilotSpec(sites[-2].name, queries=PILOTS)  # the highest group
        if self.strategy == "SPSA":
            return SPSA(sites=sites, layout="factored", **settings)
        return LikelihoodRatio(sites=sites, **settings)


def vit(name: str = "vit_tiny_patch16_224", **settings: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **settings)


tiny_digits_vit = partial(
    vit, num_classes=10, img_size=8, patch_size=4, in_chans=1, embed_dim=64, depth=6, num_heads=4, mlp_ratio=2.0
)
"""The quickstart's network: 5 tokens of width 64, 6 blocks."""

vit_micro = partial(vit, num_classes=10, img_size=32, patch_size=4, depth=6, num_heads=6, mlp_ratio=2.0, pre_norm=True)
"""The ViT of ``configs/vit_micro_cifar10.yaml``: 65 tokens of width 192, 6 blocks."""

DIGITS = Case("tiny ViT, digits 8x8", tiny_digits_vit, (1, 8, 8), 10, batch=64, queries=20, chunk_rows=128, rounds=15)
VIT_MICRO = Case("ViT-Micro/4, 32 px", vit_micro, (3, 32, 32), 10, batch=64, queries=20, chunk_rows=64, rounds=5)
VIT_TINY = Case("ViT-Tiny/16, 224 px", vit, (3, 224, 224), 1000, batch=8, queries=20, chunk_rows=16, rounds=5)
VIT_BASE = Case(
    "ViT-Base/16, 224 px", partial(vit, "vit_base_patch16_224"), (3, 224, 224), 1000, batch=1, queries=20,
    chunk_rows=10, rounds=3, references=False,
)  # fmt: skip


FULL_CASES = (DIGITS, VIT_TINY, VIT_BASE, *(
    replace(case, **way, references=False)
    for case in (VIT_TINY, VIT_BASE)
    for way in ({"allocation": "gaussian"}, {"kind": "block", "suffixes_only": True, "rounds": 3}, {"strategy": "SPSA"})
))  # fmt: skip
"""All cases at their full size; an hour on two cores."""
QUICK_CASES = (replace(DIGITS, batch=8, rounds=3), replace(VIT_TINY, batch=1, queries=8, rounds=3, references=False))
"""Two networks with fewer rows and rounds; below a minute on two cores."""
