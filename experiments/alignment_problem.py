"""A small language model learns to name CIFAR-10 photos, or captioned ones, for :mod:`experiments.alignment`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flops_lightning.allocators import OptimalAllocator, TraceSettings
from flops_lightning.datamodules import CaptionDataModule
from flops_lightning.language import CaptionLoss, load_language_model
from flops_lightning.network.staging import stage_network
from flops_lightning.optim.optimizers import OptimizerSettings, build_optimizer, build_schedule
from flops_lightning.queries import row_losses
from flops_lightning.strategies import LikelihoodRatio
from flops_lightning.suffix_loss import PaddedTargets
from flops_lightning.tasks.adapters import make_adapter, start_adapter
from flops_lightning.tasks.vision_encoder import VisionEncoder

TOKENS, BATCH, RELATIVE_SIGMA = 4, 32, 0.1
LEARNED, HELD_OUT = 300, 60  # photos of each class
VIT: dict[str, Any] = {"img_size": 32, "patch_size": 4, "depth": 6, "num_heads": 6, "mlp_ratio": 2.0, "pre_norm": True}


@dataclass(frozen=True)
class Photos:
    """Features of norm 1 and captions of a part; rows of one photo have one ``photo``."""

    features: Tensor
    captions: PaddedTargets
    photo: Tensor

    def at(self, index: Tensor) -> tuple[Tensor, PaddedTargets]:
        """The shortest caption first, as data modules sort batches."""
        index = index[torch.from_numpy(np.argsort(self.captions.lengths[index.numpy()], kind="stable"))]
        return self.features[index], self.captions.take(index)

    def shuffled(self, seed: int) -> "Photos":
        """Every photo with the features of another."""
        photos, own = self.photo.unique(return_inverse=True)
        draw = torch.randperm(len(photos), generator=torch.Generator().manual_seed(seed))
        other = torch.empty_like(draw)
        other[draw] = draw.roll(1)  # one cycle: none keeps its own
        first = torch.tensor([int((own == place).nonzero()[0]) for place in range(len(photos))])
        return Photos(self.features[first[other[own]]], self.captions, self.photo)


@dataclass
class Problem:
    """Photos of CIFAR-10 with a caption of each class, or those of a file; ``seed`` draws batches and noise.

    ``folder`` keeps features of the photos.
    """

    llm: str
    encoder: str
    root: str
    folder: Path
    seed: int = 0
    captions: str | None = None
    relative_sigma: float = RELATIVE_SIGMA

    @cached_property
    def language_model(self) -> tuple[Any, Any]:
        return load_language_model(self.llm)

    @cached_property
    def loss(self) -> CaptionLoss:
        return CaptionLoss(self.language_model[0], visual_tokens=TOKENS)

    @cached_property
    def data(self) -> CaptionDataModule:
        classes = {"template": "a {} .", "images_per_class": LEARNED, "val_share": 0.012}  # 600 of 50,000
        photos = {"captions": self.captions, "all_captions": True, "val_share": 0.2, "test_share": 0.0}
        data = CaptionDataModule(
            root=self.root, image_size=VIT["img_size"], normalization="imagenet", cache_dir=str(self.folder),
            **(photos if self.captions else classes),
        )  # fmt: skip
        data.tokenizer = _Tokens(self.language_model[1])
        data.setup("fit")
        encoder = VisionEncoder("vit_tiny_patch16_224", self.encoder, VIT, "pooled")
        for stage in ("fit",) if self.captions else ("fit", "test"):
            data.keep_features(stage, encoder, encoder=encoder.name, feature="pooled")
        return data

    @cached_property
    def class_captions(self) -> PaddedTargets:
        """A line a class, in the order of the labels."""
        return self.data.tokens.targets(torch.arange(len(self.data.class_captions)))

    def part(self, name: str) -> Photos:
        """``train``, ``val`` or ``test``; of a test part as many photos of each class as are held out for rates."""
        found = getattr(self.data, f"{name}_set")
        index = torch.arange(len(found))
        if name == "test":
            drawn = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
            index = torch.cat([drawn[found.captions[drawn] == c][:HELD_OUT] for c in range(len(self.class_captions))])
        features = nn.functional.normalize(found.features[found.places[index]], dim=-1)
        return Photos(features, self.data.tokens.targets(found.captions[index]), found.places[index])

    def adapter(self) -> nn.Sequential:
        torch.manual_seed(self.seed)
        adapter = make_adapter("linear", self.part("train").features.shape[1], self.loss.width, visual_tokens=TOKENS)
        start_adapter(adapter, "embedding", self.loss.llm.get_input_embeddings().weight.mean(0))
        return adapter

    @torch.no_grad()
    def held_out(self, adapter: nn.Sequential, photos: Photos) -> dict[str, Tensor]:
        """``loss`` of each caption, that with another photo (``shuffled``), and whether the likeliest is ``right``."""
        found = {}
        for name, part in (("loss", photos), ("shuffled", photos.shuffled(0))):
            found[name] = row_losses(self.loss, adapter(part.features), part.captions)
        if self.captions is None:
            vectors, classes = adapter(photos.features), self.class_captions
            own = [bool(torch.equal(a, b)) for a in photos.captions.trimmed() for b in classes.trimmed()]
            label = torch.tensor(own).view(len(vectors), len(classes)).int().argmax(1)
            total = torch.stack(
                [
                    row_losses(self.loss, vectors, classes.take(torch.full((len(vectors),), c))) * classes.lengths[c]
                    for c in range(len(classes))
                ],
                1,
            )
            found["right"] = (total.argmin(1) == label).float()
        return found

    def train(
        self, adapter: nn.Sequential, step: Callable[[Tensor, PaddedTargets], Any], *, steps: int, lr: float,
        bias: float, images: bool = True,
    ) -> float:  # fmt: skip
        """Adam with a cosine; CPU seconds of a step. Without ``images`` the bias alone learns, a prompt."""
        settings = OptimizerSettings(lr=lr, schedule="cosine", bias_lr_factor=bias)
        optimizer = build_optimizer(adapter, settings)
        schedule, train = build_schedule(optimizer, settings, steps), self.part("train")
        generator = torch.Generator().manual_seed(self.seed)
        size, spent = len(train.features), 0.0
        order = torch.cat([torch.randperm(size, generator=generator) for _ in range(-(-steps * BATCH // size))])
        for index in order[: steps * BATCH].split(BATCH):
            features, captions = train.at(index)
            start = time.process_time()
            optimizer.zero_grad()
            step(features if images else torch.zeros_like(features), captions)
            optimizer.step()
            schedule.step()
            spent += time.process_time() - start
        return spent / steps

    def backprop_step(self, adapter: nn.Sequential) -> Callable[[Tensor, PaddedTargets], Any]:
        def step(features: Tensor, captions: PaddedTargets) -> None:
            self.loss(adapter(features), captions).mean().backward()

        return step

    def query_step(
        self,
        adapter: nn.Sequential,
        queries: int,
        *,
        allocated: bool,
        ratios: list[dict[str, float]] | None = None,
        rows: int = 640,
    ) -> Callable[[Tensor, PaddedTargets], Any]:
        """Fills ``.grad`` by likelihood ratios; every tenth step notes ``J`` over that of equal counts in ``ratios``.

        ``allocated``: the optimal allocator, which predicts traces from losses alone.
        """
        with torch.no_grad():
            sigma = self.relative_sigma * float(adapter(self.part("train").features[:BATCH]).square().mean().sqrt())
        sites = [{"stages": ["adapter"], "name": "adapter", "sigma": sigma, "queries_per_sample": queries}]
        strategy: Any = LikelihoodRatio(sites=sites, seed=self.seed, chunk_rows=rows)
        strategy.bind(stage_network(adapter), self.loss)
        allocator = OptimalAllocator(traces=TraceSettings(predictors=["loss"]), min_queries=1) if allocated else None
        done = 0

        def step(features: Tensor, captions: PaddedTargets) -> None:
            nonlocal done
            clean, counts = strategy.clean_pass(features, captions), None
            if allocator is not None:
                known = strategy.sample_statistics(clean, allocator.requests)
                counts = allocator.allocate(known, strategy.budget).counts
                done += 1
                if ratios is not None and done % 10 == 0:
                    ratios.append(self._ratio(adapter(features).detach(), captions, counts[0]))
            seen = strategy.estimate(clean, counts, traces=allocator is not None).observation
            if allocator is not None:
                allocator.observe(seen)

        return step

    def _ratio(self, vectors: Tensor, captions: PaddedTargets, counts: Tensor) -> dict[str, float]:
        """``J / J_equal`` of counts, and the least there is; a query's trace is ``|dL/dz|^2`` up to a factor."""
        vectors.requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(vectors, captions).sum(), vectors)
        trace = gradient.square().sum(1).double()  # features have norm 1
        equal = float(trace.sum() / counts.double().mean())
        return {
            "J / J equal": float((trace / counts).sum()) / equal,
            "at best": float(trace.sqrt().mean().square() / trace.mean()),
        }


class _Tokens:
    caption_context = 0
    reads_instructions = False

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def caption_ids(self, captions: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._tokenizer(list(captions), add_special_tokens=False)["input_ids"]
        return ids
