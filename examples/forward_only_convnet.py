"""Train an ordinary LightningModule without a backward pass: ``python examples/forward_only_convnet.py``.

A torchvision ConvNet, with batch normalisation and a metric, learns scikit-learn's handwritten digits. Nothing in the
module is about this project; without the line that adds the callback, Lightning trains the same module by backprop.
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.models import ShuffleNetV2

from flops_lightning import MeZO
from flops_lightning.callbacks import ForwardOnly


class Digits(LightningModule):
    """As in a tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.model = ShuffleNetV2([1, 1, 1], [8, 16, 32, 64, 128], num_classes=10)
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Mean cross-entropy of a batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Accuracy."""
        images, labels = batch
        self.accuracy(self.model(images), labels)
        self.log("val/accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main(epochs: int = 10) -> float:
    """Train on 1500 digits, and return the accuracy on the others."""
    seed_everything(0, verbose=False)
    pictures, labels = load_digits(return_X_y=True)
    images = torch.tensor(pictures, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    images = nn.functional.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    data = TensorDataset(images, torch.from_numpy(labels))
    train, test = (torch.utils.data.Subset(data, part) for part in (range(1500), range(1500, len(data))))
    trainer = Trainer(
        callbacks=[ForwardOnly(MeZO(queries=10, sigma=1e-2))],
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(Digits(), DataLoader(train, batch_size=100, shuffle=True), DataLoader(test, batch_size=100))
    return float(trainer.callback_metrics["val/accuracy"])


if __name__ == "__main__":
    print(f"accuracy: {main():.3f}")
