"""Train a network of your own, a regression, from forward passes: ``python examples/regression.py``.

The network is an ordinary module with skip connections. ``example_input_array`` is all that it takes to find its
stages, into whose outputs noise is added.
"""

import torch
from lightning.pytorch import Trainer, seed_everything
from sklearn.datasets import load_diabetes
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flops_lightning import ForwardModule, LikelihoodRatio


class Block(nn.Module):
    """A layer with a skip connection inside, so that one tensor leaves it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``(b, width) -> (b, width)``."""
        return x + torch.tanh(self.linear(self.norm(x)))


class Network(nn.Module):
    """An embedding, three blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(10, 32), nn.Linear(32, 1)
        self.blocks = nn.ModuleList(Block(32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """``(b, 10) -> (b, 1)``."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Regression(ForwardModule):
    """The network, its strategy and its loss."""

    def __init__(self) -> None:
        super().__init__(strategy=LikelihoodRatio(), optimizer={"lr": 3e-3})
        self.model, self.example_input_array = Network(), torch.randn(2, 10)
        self.stage(self.model)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One squared error a row."""
        return (outputs - targets).square().sum(dim=1)


def main(epochs: int = 20) -> float:
    """Train on 342 patients and return the share of the variance of the other 100 that the model explains."""
    seed_everything(0, verbose=False)
    x, y = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    x, y = x / x.std(0), ((y - y.mean()) / y.std())[:, None]
    task = Regression()
    loader = DataLoader(TensorDataset(x[:342], y[:342]), batch_size=32, shuffle=True)
    Trainer(max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False).fit(task, loader)
    with torch.no_grad():
        return 1.0 - float((task(x[342:]) - y[342:]).square().mean() / y[342:].var())


if __name__ == "__main__":
    print(f"explained variance: {main():.2f}")
