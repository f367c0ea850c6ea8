"""Query allocation in a LightningModule of your own: ``python examples/allocator_in_your_module.py``.

A small classifier of scikit-learn's handwritten digits that trains itself with forward passes: it adds noise to the
output of each linear layer and correlates the change of the loss with the noise (likelihood ratio). None of that comes
from this package. The lines between the two marks are all that QueryAllocatorCallback needs to allocate the queries.
The example shows the wiring; a problem as easy as this one is learned as well with equal queries.
"""

import lightning.pytorch as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from flops_lightning.allocators import GaussianAllocator, QueryAllocator, SampleStatistics
from flops_lightning.callbacks import QueryAllocatorCallback

SIGMA = 0.01
PILOTS = 4


class TinyClassifier(pl.LightningModule):
    """Two linear layers, trained by perturbing the output of each."""

    def __init__(self) -> None:
        """Build the layers."""
        super().__init__()
        self.automatic_optimization = False
        self.layers = nn.ModuleList([nn.Linear(64, 32), nn.Linear(32, 10)])
        self.counts = torch.empty(0, dtype=torch.int64)

    def forward(self, images: Tensor) -> Tensor:
        """``(b, 10)`` logits of ``(b, 64)`` images."""
        logits: Tensor = self.layers[1](self.layers[0](images).tanh())
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=0.005)

    # ---- what the callback needs: from here ...
    def sample_statistics(self, batch: list[Tensor]) -> SampleStatistics:
        """Clean losses, features, and the variance of the gradient over a few pilot queries, for each sample."""
        images, labels = batch
        pilots = torch.arange(len(images), device=self.device).repeat_interleave(PILOTS)
        change, _ = self.query(0, pilots, batch)
        return SampleStatistics(
            loss=self.losses(images, labels),
            embedding=self.layers[0](images).tanh(),
            trace=change.square().view(-1, PILOTS).mean(dim=1) * (images.square().sum(dim=1) + 1),
        )

    def set_query_counts(self, counts: Tensor) -> None:
        """Queries of each sample in the step that follows, the same for both layers."""
        self.counts = counts[0].to(self.device)

    # ---- ... to here; training_step uses `self.counts` instead of one number for all samples.

    def losses(self, images: Tensor, labels: Tensor, noise: tuple[Tensor | float, ...] = (0.0, 0.0)) -> Tensor:
        """``(b,)`` losses with noise added to the output of each layer."""
        hidden = (self.layers[0](images) + noise[0]).tanh()
        return F.cross_entropy(self.layers[1](hidden) + noise[1], labels, reduction="none")

    def query(self, layer: int, rows: Tensor, batch: list[Tensor]) -> tuple[Tensor, Tensor]:
        """One query for each entry of ``rows``: how the loss changes per unit of noise at a layer, and the noise."""
        images, labels = batch
        noise = torch.randn(len(rows), self.layers[layer].out_features, device=self.device)
        added = (SIGMA * noise, 0.0) if layer == 0 else (0.0, SIGMA * noise)
        change = self.losses(images[rows], labels[rows], added) - self.losses(images, labels)[rows]
        return change / SIGMA, noise

    @torch.no_grad()
    def training_step(self, batch: list[Tensor]) -> None:
        """Estimate the gradient of each layer and take a step."""
        images, size = batch[0], len(batch[0])
        rows = torch.arange(size, device=self.device).repeat_interleave(self.counts)
        # Each sample is averaged over its own queries, whose number differs, before the samples are averaged.
        weights = 1.0 / (size * self.counts[rows])
        layer_inputs = (images, self.layers[0](images).tanh())
        for index, (layer, inputs) in enumerate(zip(self.layers, layer_inputs, strict=True)):
            change, noise = self.query(index, rows, batch)
            delta = torch.zeros(size, noise.shape[1], device=self.device)
            delta.index_add_(0, rows, (weights * change)[:, None] * noise)
            layer.weight.grad, layer.bias.grad = delta.T @ inputs, delta.sum(dim=0)
        self.optimizers().step()


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,500 images for training and 297 for testing, pixels from 0 to 1."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    inputs, targets = torch.tensor(images / 16.0, dtype=torch.float32)[order], torch.tensor(labels)[order]
    return TensorDataset(inputs[:1500], targets[:1500]), TensorDataset(inputs[1500:], targets[1500:])


def accuracy(model: TinyClassifier, data: TensorDataset) -> float:
    """Share of images classified correctly."""
    images, labels = data.tensors
    with torch.no_grad():
        return float((model(images).argmax(dim=1) == labels).float().mean())


def main(*, epochs: int = 10, allocator: QueryAllocator | None = None) -> dict[str, float]:
    """Train, print the accuracy before and after, and return both."""
    pl.seed_everything(0, verbose=False)
    training, testing = digits()
    model = TinyClassifier()
    start = accuracy(model, testing)
    callback = QueryAllocatorCallback(allocator=allocator or GaussianAllocator(), queries_per_sample=20)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[callback], logger=False, enable_checkpointing=False
    )
    trainer.fit(model, DataLoader(training, batch_size=50, shuffle=True))
    result = {"start_accuracy": start, "test_accuracy": accuracy(model, testing)}
    print(" ".join(f"{name}={value:.1%}" for name, value in result.items()))
    return result


if __name__ == "__main__":
    main()
