"""An ordinary module and a task of one network; ``python -m tests.callbacks.unchanged SIZE FOLDER`` trains both."""

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torchdata.stateful_dataloader import StatefulDataLoader

from flops_lightning.callbacks import ForwardOnly
from flops_lightning.strategies import MeZO
from flops_lightning.tasks import ForwardModule
from tests.digits import quiet_trainer

BATCHES = 4
FAILS_AT = 5


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lower, self.upper = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.upper(torch.tanh(self.lower(x)))


class Plain(pl.LightningModule):
    """As in a tutorial."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.register_buffer("seen", torch.zeros(1))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.seen += x.mean()
        loss = F.cross_entropy(self.net(x), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Task(ForwardModule):
    def __init__(self, strategy: MeZO, *, accumulate: int = 1, clip: float = 0.0) -> None:
        sgd = {"name": "sgd", "lr": 0.05, "momentum": 0.9, "accumulate_grad_batches": accumulate}
        super().__init__(strategy=strategy, optimizer=sgd, clip={"norm": clip})
        self.net = Net()
        self.stage(self.net)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")


class Fails(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_step == FAILS_AT:
            raise RuntimeError("stopped here")


def batches(ranks: int = 1, rank: int = 0) -> list[tuple[Tensor, Tensor]]:
    """The batches of an epoch, of one rank: each has 8 samples of its own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCHES, ranks, 8, 6, generator=generator, dtype=torch.float64)
    return list(zip(x[:, rank], torch.randint(3, (BATCHES, ranks, 8), generator=generator)[:, rank], strict=True))


def parameters(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def fit(module: pl.LightningModule, *callbacks: pl.Callback, ckpt: Path | None = None, **settings: Any) -> pl.Trainer:
    """Two epochs in float64 unless the settings say otherwise."""
    usual = {"max_epochs": 2, "precision": "64-true", "use_distributed_sampler": False}
    trainer = quiet_trainer(*callbacks, **{**usual, **settings})
    data = StatefulDataLoader(batches(trainer.world_size, trainer.global_rank), batch_size=None)
    if trainer.precision == "64-true":
        module.double()  # before Lightning does, which would load a checkpoint into float32
    trainer.fit(module, data, ckpt_path=ckpt)
    return trainer


def trained(strategy: MeZO, *, task: bool, **settings: Any) -> Tensor:
    """Parameters after training the task, or the ordinary module."""
    torch.manual_seed(0)
    module: pl.LightningModule = Task(strategy) if task else Plain()
    fit(module, *([] if task else [ForwardOnly(strategy)]), **settings)
    return parameters(module)


def resumed(strategy: Any, folder: Path, **settings: Any) -> Tensor:
    """Parameters of the ordinary module after a run that fails in the middle of the second epoch and goes on."""
    torch.manual_seed(0)
    saver = ModelCheckpoint(folder, filename="only", every_n_train_steps=1, enable_version_counter=False)
    failed = False
    try:
        fit(Plain(), ForwardOnly(strategy()), saver, Fails(), enable_checkpointing=True, **settings)
    except RuntimeError as error:
        failed = "stopped here" in str(error)
    assert failed
    module = Plain()
    fit(module, ForwardOnly(strategy()), ckpt=folder / "only.ckpt", **settings)
    return parameters(module)


if __name__ == "__main__":
    torch.set_num_threads(1)
    devices, folder = int(sys.argv[1]), Path(sys.argv[2])
    found = {}
    for exchange in ("gradients", "losses"):

        def strategy(exchange: Any = exchange) -> MeZO:
            return MeZO(queries=4, seed=0, exchange=exchange)

        found[f"{exchange} task"] = trained(strategy(), task=True, devices=devices)
        found[exchange] = trained(strategy(), task=False, devices=devices)
        found[f"{exchange} resumed"] = resumed(strategy, folder / exchange, devices=devices)
    module = Plain()
    fit(module, ForwardOnly(strategy()), devices=devices)
    found["buffer"] = module.seen
    torch.save(found, folder / f"{torch.distributed.get_rank()}.pt")
