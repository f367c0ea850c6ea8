"""SPSA training with allocated queries: ``python examples/spsa_with_allocator.py``.

This is ``spsa_before.py`` with QueryAllocatorCallback; ``diff`` shows the added lines. Samples that the network has
learned have small gradients, and their queries go to the others.

The trace that the allocator asks for is the variance of the gradient of one query. With random signs it is proportional
to the squared norm of the sample's gradient, and the main factor of that norm is ``1 - p``, where ``p = exp(-loss)`` is
the probability of the right class under cross-entropy. So the loss alone gives the trace, up to a scale that does not
matter, and no pilot queries are spent: ``source="pilots"`` tells the allocator to take the trace as given.

Each sample is averaged over its own queries before the samples are averaged, and the counts depend on losses alone,
never on the queries that they count. So the estimate stays unbiased.

Measured over seeds 0 to 9, at the same 20 queries and the same learning rate: the final training loss is 0.20 instead
of 0.31 and the test accuracy 93.6 instead of 90.1 % (standard errors 0.01 and 0.5 %). In the last third of training
the gradient's variance is 0.34 to 0.37 of that with equal queries, where 0.33 to 0.36 is the least possible (seeds 0 to
2). The clean losses cost one more forward pass of each sample.
"""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from flops_lightning.allocators import OptimalAllocator, SampleStatistics, TraceSettings
from flops_lightning.callbacks import QueryAllocatorCallback

QUERIES = 20  # perturbed forward passes of a sample in a step; they come in pairs
WIDTH = 0.01


class DigitClassifier(pl.LightningModule):
    """A network of two linear layers, trained by perturbing its parameters."""

    def __init__(self) -> None:
        """Build the network."""
        super().__init__()
        self.automatic_optimization = False
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=0.03)

    def sample_statistics(self, batch: list[Tensor]) -> SampleStatistics:
        """Clean losses, and the variance of the gradient of one query, for each sample."""
        loss = self.losses(*batch)
        return SampleStatistics(loss=loss, trace=(1 - (-loss).exp()).square())

    def set_query_counts(self, counts: Tensor) -> None:
        """Queries of each sample in the step that follows."""
        self.pairs = counts[0].to(self.device) // 2

    def losses(self, images: Tensor, labels: Tensor) -> Tensor:
        """``(b,)`` losses."""
        return F.cross_entropy(self.net(images), labels, reduction="none")

    def moved_losses(self, moves: dict[str, Tensor], images: Tensor, labels: Tensor) -> Tensor:
        """``(r,)`` losses of rows, each with parameters moved by its own line of ``moves``."""

        def loss(move: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            parameters = {name: value + move[name] for name, value in self.net.named_parameters()}
            return F.cross_entropy(functional_call(self.net, parameters, image), label)

        return vmap(loss)(moves, images, labels)

    def estimate_gradient(self, batch: list[Tensor]) -> None:
        """Write the SPSA estimate of the mean loss's gradient into ``.grad``."""
        images, labels = batch
        rows = torch.arange(len(images), device=self.device).repeat_interleave(self.pairs)
        signs = {
            name: torch.randint(0, 2, (len(rows), *value.shape), device=self.device) * 2.0 - 1.0
            for name, value in self.net.named_parameters()
        }
        up, down = (
            self.moved_losses({name: width * sign for name, sign in signs.items()}, images[rows], labels[rows])
            for width in (WIDTH, -WIDTH)
        )
        slopes = (up - down) / (2 * WIDTH)
        for name, parameter in self.net.named_parameters():
            parameter.grad = torch.einsum("r,r...->...", slopes / self.pairs[rows], signs[name]) / len(images)

    @torch.no_grad()
    def training_step(self, batch: list[Tensor]) -> None:
        """Estimate the gradient and take a step."""
        self.estimate_gradient(batch)
        self.optimizers().step()


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,500 images for training and 297 for testing, pixels from 0 to 1."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    inputs, targets = torch.tensor(images / 16.0, dtype=torch.float32)[order], torch.tensor(labels)[order]
    return TensorDataset(inputs[:1500], targets[:1500]), TensorDataset(inputs[1500:], targets[1500:])


@torch.no_grad()
def accuracy(model: DigitClassifier, data: TensorDataset) -> float:
    """Share of images classified correctly."""
    images, labels = data.tensors
    return float((model.net(images).argmax(dim=1) == labels).float().mean())


def main(*, epochs: int = 10, seed: int = 0) -> dict[str, float]:
    """Train; print and return the test accuracy before and after, and the final mean loss of the training images."""
    pl.seed_everything(seed, verbose=False)
    training, testing = digits()
    model = DigitClassifier()
    result = {"start_accuracy": accuracy(model, testing)}
    allocator = OptimalAllocator(traces=TraceSettings(source="pilots"))
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[QueryAllocatorCallback(allocator=allocator, queries_per_sample=QUERIES, multiple=2)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, DataLoader(training, batch_size=50, shuffle=True))
    result["test_accuracy"] = accuracy(model, testing)
    with torch.no_grad():
        result["train_loss"] = float(model.losses(*training.tensors).mean())
    print(" ".join(f"{name}={value:.3f}" for name, value in result.items()))
    return result


if __name__ == "__main__":
    main()
