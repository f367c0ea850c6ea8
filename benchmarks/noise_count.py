"""``python -m benchmarks.noise_count``: what the noise of a step takes on a GPU, by count: launches and bytes moved.

No clock is read, and no network has memory: shapes and passes come from the meta device. *Before*: torch's generator,
a launch for each row. *After*: Philox in kernels. An activation has ``a`` bytes an entry, noise 4.

- Likelihood ratio, before: a launch for each row, and three for each chunk: rows are gathered (``2 a`` bytes an
  entry), noise is written (4), added (``2 a + 4``) and summed by one product (4).
- After: two launches for each chunk, which read and write an activation (``2 a``) and the sums of the samples
  (8 for each entry of a sample that the chunk touches).
- SPSA with factored directions: each antithetic pair draws one vector for its site, written and read (8), at the
  queries and again for the gradient: before by a launch for each pair, after by one for each chunk.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.cases import site_specs, vit
from benchmarks.speed import forward_equivalents
from flops_lightning.network.staging import StagedNetwork, stage_network
from flops_lightning.noise.row_directions import direction_size
from flops_lightning.objectives import cross_entropy
from flops_lightning.strategies import SPSA, LikelihoodRatio

BATCH, QUERIES, ROWS = 128, 20, 256
LAUNCH, BANDWIDTH = 5e-6, 3.35e12
"""Assumed: seconds of a launch and of the call before it, and bytes a second of an H100 with 80 GB."""
OPERATIONS = {"float32": 50e12, "bfloat16": 400e12}
"""Assumed: floating-point operations a second that a well-fed H100 may reach."""
NETWORKS = {"ViT-Base/16": ("vit_base_patch16_224", 3), "ViT-Large/16": ("vit_large_patch16_224", 4)}
"""The paper's, with their groups."""


@dataclass(frozen=True)
class NoiseCount:
    """Launches and bytes of a step's noise and sums."""

    launches: int
    bytes: int

    @property
    def seconds(self) -> float:
        """Launches and bytes one after the other, at the assumed speeds."""
        return self.launches * LAUNCH + self.bytes / BANDWIDTH


@dataclass(frozen=True)
class StepNoise:
    """The noise of a step: ``b`` samples with ``q`` queries at each site, in chunks of ``rows``.

    Attributes:
        activations: Entries of a row's noise at each site.
        directions: Entries of a row's direction at each site.
    """

    activations: Sequence[int]
    directions: Sequence[int]
    batch: int = BATCH
    queries: int = QUERIES
    rows: int = ROWS

    @property
    def chunks(self) -> int:
        """Chunks of a site."""
        return -(-self.batch * self.queries // self.rows)

    def row_by_row(self, size: int) -> NoiseCount:
        """Likelihood ratio from torch's generator; activations have ``size`` bytes an entry."""
        number, sites = self.batch * self.queries, len(self.activations)
        moved = number * sum(self.activations) * (2 * size + 4 + (2 * size + 4) + 4)
        return NoiseCount(sites * (number + 3 * self.chunks), moved)

    def by_kernels(self, size: int) -> NoiseCount:
        """Likelihood ratio by the two kernels; a chunk ends within a sample, at most."""
        number, touched = self.batch * self.queries, self.batch + self.chunks
        moved = sum(self.activations) * (number * 2 * size + touched * 8)
        return NoiseCount(2 * self.chunks * len(self.activations), moved)

    def of_pairs(self, *, launches: int) -> NoiseCount:
        """SPSA with factored directions; ``launches`` at a site for all pairs."""
        moved = 2 * 8 * self.batch * self.queries // 2 * sum(self.directions)
        return NoiseCount(2 * launches * len(self.directions), moved)


def setting(model: str, groups: int) -> tuple[StepNoise, dict[str, float], float]:
    """Noise of a network's step, forward passes of a sample and step by estimator, and FLOPs of one pass."""
    with torch.device("meta"):
        network, image = stage_network(vit(model).eval()), torch.empty(1, 3, 224, 224)
    specs = site_specs(network, QUERIES, groups=groups)
    ratio, spsa = LikelihoodRatio(sites=specs, chunk_rows=ROWS), SPSA(sites=specs, layout="factored", chunk_rows=ROWS)
    for strategy in (ratio, spsa):
        strategy.bind(network, cross_entropy)
    passes = {"LR": forward_equivalents(ratio, image), "SPSA": forward_equivalents(spsa, image)}
    noise = StepNoise(activation_sizes(network, ratio, image), [direction_entries(spsa, site) for site in spsa.sites])
    return noise, passes, flops(partial(network.run, image))


@torch.no_grad()
def activation_sizes(network: StagedNetwork, strategy: LikelihoodRatio, image: Any) -> list[int]:
    """Entries of a row's noise at each site."""
    sizes, h = [], image
    for site in strategy.sites:
        h = network.run(h, site.first, site.last + 1)
        sizes.append(h[:, slice(None) if site.tokens is None else site.tokens].numel())
    return sizes


def direction_entries(strategy: SPSA, site: Any) -> int:
    """Normals that a row's direction at a site takes."""
    layout: Any = strategy.engine.layouts(site)
    parts = layout.parts[site.name]
    of_layers = sum(direction_size(layer.module, layer.trained, layout.rank) for layer in parts.layers)
    return of_layers + sum(site.parameters[name].numel() for name in parts.names)


@torch.no_grad()
def flops(run: Any) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return float(counter.get_total_flops())


def report() -> str:
    """A Markdown table of the paper's four settings: two networks, two estimators."""
    lines = [
        "| setting | activations | passes | launches before | after | GB before | after | share before | after |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, (model, groups) in NETWORKS.items():
        noise, passes, one = setting(model, groups)
        for estimator, each in passes.items():
            for dtype, speed in OPERATIONS.items():
                size = 4 if dtype == "float32" else 2
                counts = [noise.row_by_row(size), noise.by_kernels(size)]
                if estimator == "SPSA":
                    pairs = noise.batch * noise.queries // 2
                    counts = [noise.of_pairs(launches=n) for n in (pairs, noise.chunks)]
                arithmetic = each * noise.batch * one / speed
                launches = " | ".join(f"{count.launches:,}" for count in counts)
                moved = " | ".join(f"{count.bytes / 1e9:.1f}" for count in counts)
                shares = " | ".join(f"{count.seconds / (arithmetic + count.seconds):.1%}" for count in counts)
                lines.append(f"| {name}, {estimator} | {dtype} | {each:.0f} | {launches} | {moved} | {shares} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
