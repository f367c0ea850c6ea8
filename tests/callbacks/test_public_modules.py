"""Modules that never heard of this project learn from forward passes: a run differs from backprop's by a callback."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, DemoModel, RandomDataset
from torch import Tensor

from examples import forward_only_convnet
from flops_lightning import MeZO
from flops_lightning.callbacks import ForwardOnly
from tests.digits import quiet_trainer


def boring() -> tuple[pl.LightningModule, Any]:
    return BoringModel(), RandomDataset(32, 128).data.split(8)


def demo() -> tuple[pl.LightningModule, Any]:
    return DemoModel(), RandomDataset(32, 128).data.split(8)


def hugging_face() -> tuple[pl.LightningModule, Any]:
    transformers = pytest.importorskip("transformers")

    class Classifier(pl.LightningModule):
        """As in Lightning's tutorial on text classification."""

        def __init__(self) -> None:
            super().__init__()
            sizes = {
                "hidden_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "max_position_embeddings": 8,
            }
            config = transformers.BertConfig(vocab_size=12, num_labels=2, **sizes)
            self.model = transformers.BertForSequenceClassification(config)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            outputs = self.model(**batch)
            self.log("train_loss", outputs.loss)
            return outputs.loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    words = torch.randint(12, (4, 16, 5), generator=torch.Generator().manual_seed(0))
    labels = (words < 6).float().mean(2).round().long()  # whether most words are of one half
    given = zip(words, labels, strict=True)
    return Classifier(), [{"input_ids": w, "attention_mask": torch.ones_like(w), "labels": y} for w, y in given]


DIRECTIONS = 100


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        self.seen.append(float(outputs["loss"]))

    def ratio(self) -> float:
        """Loss of the last 16 steps over that of the first 16."""
        return sum(self.seen[-16:]) / sum(self.seen[:16])


def trained(make: Callable[[], Any], *callbacks: pl.Callback, epochs: int) -> float:
    pl.seed_everything(0, verbose=False)
    losses = Losses()
    module, data = make()
    loader = (
        data if isinstance(data, torch.utils.data.DataLoader) else torch.utils.data.DataLoader(data, batch_size=None)
    )
    quiet_trainer(*callbacks, losses, max_epochs=epochs, limit_val_batches=0).fit(module, loader)
    return losses.ratio()


@pytest.mark.parametrize(
    ("make", "queries", "epochs", "highest"),
    [
        (boring, 64, 3, 0.6),  # 0.46 here
        (demo, 32, 3, 0.75),  # 0.62
        pytest.param(hugging_face, 10, 60, 0.95, marks=pytest.mark.slow),  # 0.91: from random weights it learns slowly
    ],
)
def test_the_loss_falls_as_it_does_with_backprop(make, queries, epochs, highest):
    assert trained(make, ForwardOnly(MeZO(queries=queries, sigma=1e-2, seed=0)), epochs=epochs) < highest
    assert trained(make, epochs=epochs) < highest


class Gradient(pl.Callback):
    def on_before_optimizer_step(self, trainer: Any, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.seen = torch.cat([p.grad.flatten() for p in pl_module.parameters()]).double()


def convnet() -> tuple[pl.LightningModule, Any]:
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(16, 3, 32, 32, generator=generator), torch.randint(10, (16,), generator=generator)
    return forward_only_convnet.Digits(), [batch]


@pytest.mark.parametrize("make", [boring, demo, hugging_face, convnet])
def test_the_gradient_is_that_of_backprop_through_dropout_and_batch_normalisation(make):
    found = []
    for callbacks in ([ForwardOnly(MeZO(queries=2 * DIRECTIONS, sigma=1e-3, seed=0))], []):
        pl.seed_everything(0, verbose=False)
        module, data = make()
        gradient = Gradient()
        settings = {"max_steps": 1, "limit_val_batches": 0, "precision": "64-true"}
        loader = torch.utils.data.DataLoader(data, batch_size=None)
        quiet_trainer(*callbacks, gradient, **settings).fit(module, loader)
        found.append(gradient.seen)
    estimate, exact = found
    size = exact.norm()
    # Along the gradient the estimate is the mean of squares of normal numbers: 1, with a variance of 2 / directions.
    assert abs(estimate @ exact / size**2 - 1) < 3 * (2 / DIRECTIONS) ** 0.5
    # Across it, as long as that many numbers of this variance.
    across = (estimate - exact * (estimate @ exact) / size**2).norm()
    assert across / size == pytest.approx((len(exact) / DIRECTIONS) ** 0.5, rel=0.2)


def test_one_line_of_the_example_is_about_this_project():
    lines = Path(forward_only_convnet.__file__).read_text(encoding="utf-8").splitlines()
    named = [line.strip() for line in lines if "MeZO" in line or "ForwardOnly" in line]
    assert [line for line in named if "import" not in line] == [
        "callbacks=[ForwardOnly(MeZO(queries=10, sigma=1e-2))],"
    ]


@pytest.mark.slow
def test_a_convnet_of_torchvision_learns_with_batch_normalisation():
    assert forward_only_convnet.main() > 0.3  # 0.41 here, by chance 0.1
