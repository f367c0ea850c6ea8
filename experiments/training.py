"""The network of a configuration, trained with equal counts step by step, for studies that look on."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.optim.optimizers import build_optimizer, build_schedule, clip_gradients
from flops_lightning.queries import CleanPass
from flops_lightning.strategies import LikelihoodRatio
from flops_lightning.strategies.pilots import PilotSpec
from flops_lightning.tasks import ForwardImageClassifier

Batch = tuple[Tensor, Tensor]
ACCURACY_IMAGES = 2000  # of the training set, at most


class EqualCountsRun:
    """Training by the own strategy and optimiser of a configuration, with equal counts and without pilots."""

    def __init__(self, arguments: Sequence[str]) -> None:
        from flops_lightning.cli.command import build

        cli = build(arguments)
        strategy = getattr(cli.model, "strategy", None)
        if not isinstance(cli.model, ForwardImageClassifier) or not isinstance(strategy, LikelihoodRatio):
            problem = f"trains with {type(strategy).__name__}, not with LikelihoodRatio."
            raise SettingError("--config", list(arguments), problem, "Use for example configs/vit_tiny_digits.yaml.")
        self.task, self.data, self.strategy = cli.model, cli.datamodule, strategy
        self.strategy.pilots = PilotSpec()
        self.data.setup("fit")
        self.loader = self.data.train_dataloader()
        self.steps = (cli.trainer.max_epochs or 1) * len(self.loader)
        self.optimizer = build_optimizer(self.task.backbone, self.task.optimizer_settings)
        self.schedule = build_schedule(self.optimizer, self.task.optimizer_settings, self.steps)
        self.task.train()

    def batches(self, start: int) -> Iterator[tuple[int, Batch]]:
        """Steps from ``start`` on, with the batches of the seed's order."""
        for epoch in range(start // len(self.loader), math.ceil((self.steps + 1) / len(self.loader))):
            self.loader.sampler.set_epoch(epoch)
            for step, batch in enumerate(self.loader, epoch * len(self.loader)):
                if step >= start:
                    yield step, batch

    def step(self, clean: CleanPass) -> None:
        for i, names in enumerate(groups := self.strategy.update_groups):
            clean = self.strategy.refresh(clean, groups[i - 1]) if i else clean
            self.optimizer.zero_grad()
            if not self.strategy.estimate(clean, None, names).lost_batch:
                clip_gradients(self.task.backbone.named_parameters(), self.task.clip_settings)
                self.optimizer.step()
        self.schedule.step()

    def images(self, indices: Sequence[int] | Tensor) -> Batch:
        images, labels = zip(*(self.data.train_set[int(i)] for i in indices), strict=True)
        return torch.stack(images), torch.as_tensor(labels)

    def shuffled(self, seed: int) -> Tensor:
        """The training set's indices in an order drawn from ``seed``."""
        return torch.randperm(len(self.data.train_set), generator=torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def train_accuracy(self) -> float:
        """Accuracy on the first images of the training set."""
        number, right = min(ACCURACY_IMAGES, len(self.data.train_set)), 0
        for indices in torch.arange(number).split(200):
            images, labels = self.images(indices)
            with self.task.network.evaluating():
                right += int((self.task(images).argmax(dim=1) == labels).sum())
        return right / number

    @property
    def parts(self) -> dict[str, Any]:
        """All whose state a resumed run needs."""
        return {name: getattr(self, name) for name in ("task", "optimizer", "schedule", "strategy")}
