"""The small CLIP moved to grey images of CIFAR-10, and ways to train its prompts, for :mod:`experiments.prompts`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments.mini_clip import load, normalized, pixels
from flops_lightning.datamodules import CIFAR10DataModule
from flops_lightning.network.staging import StagedNetwork
from flops_lightning.prompts import ClassTexts, PromptSpec, class_features, image_start, stage_clip, text_start
from flops_lightning.search import CMASearch
from flops_lightning.strategies import EvolutionStrategies
from flops_lightning.strategies.factored_directions import Directions, FactoredDirections
from flops_lightning.strategies.parameter_queries import ParameterQueries

SHOTS, TEST_IMAGES, SIGMA, RATE = 16, 2000, 0.02, 0.2
GRAY = (0.299, 0.587, 0.114)


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="none")


def rounded(logits: Tensor, labels: Tensor) -> Tensor:
    """As a service may print them."""
    return losses(logits, labels).mul(100).round().div(100)


class JointWithSharedText(EvolutionStrategies):
    """A joint site at which query ``q`` of every sample moves the text by one draw, and the image by its own."""

    @property
    def engine(self) -> ParameterQueries:
        own: Any = super().engine.layouts(self.sites[0])
        layout = _SharedText(**{each.name: getattr(own, each.name) for each in fields(own)})
        return ParameterQueries(lambda _: layout)


class _SharedText(FactoredDirections):
    def _directions(self, site: Any, clean: Any, chunk: Any, index: Tensor, bases: Any) -> Directions:
        own = super()._directions(site, clean, chunk, index, bases)
        of_first = replace(chunk, samples=np.zeros_like(chunk.samples))
        shared = super()._directions(site, clean, of_first, index, bases)
        return {name: shared[name] if name.startswith("text_prompt") else d for name, d in own.items()}


@dataclass
class Problem:
    """Grey images of a seed, and the prompts that it draws."""

    clip: Path
    root: str
    seed: int
    dim: int = 500
    image: bool = True

    def __post_init__(self) -> None:
        data = CIFAR10DataModule(root=self.root, images_per_class=SHOTS, test_images=TEST_IMAGES, split_seed=self.seed)
        parts = data.check()
        self.names = data.class_names
        (self.train, self.labels), (self.test, self.truth) = (self._gray(parts[part]) for part in ("train", "test"))

    @staticmethod
    def _gray(listing: Any) -> tuple[Tensor, Tensor]:
        images, labels = pixels(listing)
        gray = torch.einsum("nchw,c->nhw", images.float(), torch.tensor(GRAY))
        return normalized(gray[:, None].expand_as(images)), labels

    @cached_property
    def network(self) -> StagedNetwork:
        clip = load(self.clip)
        texts = ClassTexts(clip, self.names)
        own: dict[str, Any] = {"dim": self.dim, "seed": self.seed}
        image = image_start(clip, self.train, PromptSpec(tokens=10, **own)) if self.image else None
        return stage_clip(clip, texts, text_prompt=text_start(texts, PromptSpec(tokens=12, **own)), image_prompt=image)

    @property
    def prompts(self) -> list[torch.nn.Parameter]:
        return [p for p in self.network.module.parameters() if p.requires_grad]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Mean loss of the training images and test accuracy."""
        right = sum(
            int(self.network.run(x).argmax(1).eq(y).sum())
            for x, y in zip(self.test.split(500), self.truth.split(500), strict=True)
        )
        loss = float(losses(self.network.run(self.train), self.labels).mean())
        return {"loss": loss, "accuracy": right / len(self.truth)}

    @torch.no_grad()
    def manual(self) -> dict[str, float]:
        """Without prompts, by the template alone."""
        clip = load(self.clip)
        features, scale = class_features(clip, self.names), clip.logit_scale.exp()
        found = [clip.encode_image(x, normalize=True) @ features.T for x in (self.train, self.test)]
        accuracy = float(found[1].argmax(1).eq(self.truth).float().mean())
        return {"loss": float(losses(scale * found[0], self.labels).mean()), "accuracy": accuracy}

    def batches(self, size: int, steps: int) -> list[Tensor]:
        generator, order = torch.Generator().manual_seed(self.seed), torch.zeros(0, dtype=torch.long)
        found = []
        for _ in range(steps):
            if len(order) < size:
                order = torch.cat([order, torch.randperm(len(self.train), generator=generator)])
            found.append(order[:size])
            order = order[size:]
        return found

    def strategy(
        self, kind: Any = EvolutionStrategies, queries: tuple[int, int] = (10, 10), loss: Any = losses,
        joint: bool = False, directions: str = "own", **settings: Any,
    ) -> Any:  # fmt: skip
        spec: dict[str, Any] = {"sigma": SIGMA}
        image = {"stages": ["image_prompt"], "queries_per_sample": queries[0], "directions": directions, **spec}
        text = {"stages": ["scores"], "queries_per_sample": queries[1], **spec}
        both = {"stages": ["image_prompt", "scores"], "queries_per_sample": queries[0], **spec}
        sites = [both] if joint else [image, text] if self.image else [text]
        strategy = kind(sites=sites, seed=self.seed, chunk_rows=512, **settings)
        strategy.bind(self.network, loss)
        return strategy

    def gradients_of_samples(self, index: Tensor, name: str) -> Tensor:
        """``(b, d)`` exact gradients in one prompt's numbers."""
        z = self.network.module.get_parameter(f"{name}.z")
        found = losses(self.network.run(self.train[index]), self.labels[index])
        return torch.stack([torch.autograd.grad(each, z, retain_graph=True)[0] for each in found])


def descend(problem: Problem, step: Callable[[Tensor], None], batches: Sequence[Tensor]) -> None:
    optimizer = torch.optim.Adam(problem.prompts, lr=RATE)
    for index in batches:
        optimizer.zero_grad()
        step(index)
        optimizer.step()


def query_step(problem: Problem, strategy: Any, allocator: Any = None) -> Callable[[Tensor], None]:
    """Fills ``.grad`` of a batch by queries."""

    def step(index: Tensor) -> None:
        clean, counts = strategy.clean_pass(problem.train[index], problem.labels[index]), None
        if allocator is not None:
            counts = allocator.allocate(strategy.sample_statistics(clean, allocator.requests), strategy.budget).counts
        seen = strategy.estimate(clean, counts, traces=allocator is not None).observation
        if allocator is not None:
            allocator.observe(seen)

    return step


def backprop_step(problem: Problem) -> Callable[[Tensor], None]:
    def step(index: Tensor) -> None:
        losses(problem.network.run(problem.train[index]), problem.labels[index]).mean().backward()

    return step


@torch.no_grad()
def search(problem: Problem, batches: Sequence[Tensor]) -> None:
    """CMA-ES over both prompts at once; a generation a batch, fitness its mean loss."""
    start = torch.cat([p.detach() for p in problem.prompts])
    sizes = [p.numel() for p in problem.prompts]
    found = CMASearch(start.tolist(), {"population": 30, "sigma": 1.0, "seed": problem.seed + 1})

    def put(candidate: Any) -> None:
        parts = torch.from_numpy(np.asarray(candidate)).float().split(sizes)
        for parameter, part in zip(problem.prompts, parts, strict=True):
            parameter.copy_(part)

    for index in batches:
        fitness = []
        for candidate in found.ask():
            put(candidate)
            fitness.append(float(losses(problem.network.run(problem.train[index]), problem.labels[index]).mean()))
        found.tell(fitness)
    put(found.mean)
