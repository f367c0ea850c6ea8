"""Minimise the error rate itself, which has no derivative: ``python examples/zero_one_error.py``.

A small classifier of scikit-learn's handwritten digits learns only from whether each perturbed answer is right. It uses
a strategy, a network in stages and an optimiser, without Lightning. The objective that is minimised is the error rate
under noise. Narrow noise rarely turns a wrong answer into a right one, and queries that change nothing carry no
information, so the noise is wide.

Measured over seeds 0 to 2: 94, 91 and 77 % test accuracy with ``sigma=2.0``, and 22, 72 and 36 % with ``sigma=0.05``.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from flops_lightning import LikelihoodRatio, SiteSpec, stage_network
from flops_lightning.objectives import zero_one_error


def digits() -> tuple[Tensor, Tensor]:
    """``(1797, 64)`` images, pixels from 0 to 1, in random order, and their labels."""
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return torch.tensor(images / 16.0, dtype=torch.float32)[order], torch.tensor(labels)[order]


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images classified correctly."""
    return 1.0 - float(zero_one_error(network(images), labels).mean())


def main(*, epochs: int = 10, sigma: float = 2.0, seed: int = 0) -> dict[str, float]:
    """Train on 1,500 images; print and return the accuracy on the other 297 before and after."""
    torch.manual_seed(seed)
    images, labels = digits()
    network = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    result = {"start_accuracy": accuracy(network, images[1500:], labels[1500:])}
    strategy = LikelihoodRatio(
        sites=[SiteSpec(stages=["0", "2"], kind="linear", sigma=sigma, queries_per_sample=20)], seed=seed
    )
    strategy.bind(stage_network(network), zero_one_error)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(epochs):
        for batch in torch.randperm(1500).split(50):
            optimizer.zero_grad()
            strategy.estimate(strategy.clean_pass(images[batch], labels[batch]))
            optimizer.step()
    result["test_accuracy"] = accuracy(network, images[1500:], labels[1500:])
    print(" ".join(f"{name}={value:.1%}" for name, value in result.items()))
    return result


if __name__ == "__main__":
    main()
