"""What every task shares, on a task that knows no images."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flops_lightning.errors import SettingError
from flops_lightning.strategies import LikelihoodRatio
from flops_lightning.tasks import ForwardModule
from flops_lightning.tasks.trainer_setup import ForwardDDPStrategy, check_trainer, remove_reducer_and_scaler

INPUTS = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
DATA = TensorDataset(INPUTS, INPUTS.sum(dim=1, keepdim=True))


class Regression(ForwardModule):
    def __init__(self):
        super().__init__(strategy=LikelihoodRatio(seed=0), optimizer={"name": "sgd", "lr": 0.1})
        self.net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
        self.stage(self.net)

    def loss(self, outputs, targets):
        return (outputs - targets).square().sum(dim=1)


def test_another_task_learns_and_resumes_bit_by_bit(make_trainer, tmp_path):
    loader, whole, part, resumed = DataLoader(DATA, batch_size=16), Regression(), Regression(), Regression()
    for other in (part, resumed):
        other.load_state_dict(whole.state_dict())
    start = float(whole.loss(whole(INPUTS), DATA.tensors[1]).mean())
    settings = {"limit_train_batches": 1.0, "limit_val_batches": 0}
    make_trainer(max_epochs=6, **settings).fit(whole, loader)
    assert float(whole.loss(whole(INPUTS), DATA.tensors[1]).mean()) < 0.5 * start
    first = make_trainer(max_epochs=3, **settings)
    first.fit(part, loader)
    first.save_checkpoint(tmp_path / "half.ckpt")
    make_trainer(max_epochs=6, **settings).fit(resumed, loader, ckpt_path=tmp_path / "half.ckpt")
    pairs = zip(resumed.parameters(), whole.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert resumed.strategy.meter.total() == whole.strategy.meter.total()


class Forgetful(Regression):
    def stage(self, *_, **__):
        """Forgets to."""


def test_a_network_that_was_not_staged_is_one_line(make_trainer):
    with pytest.raises(SettingError, match=r"has not staged its network. Call self.stage\(network, example\)"):
        Forgetful()(INPUTS)
    with pytest.raises(SettingError, match="has not staged its network"):
        make_trainer(limit_val_batches=0).fit(Forgetful(), DataLoader(DATA))
    with pytest.raises(SettingError, match=r"network = .*tanh.* is not a torch.nn.Module"):
        super(Forgetful, Forgetful()).stage(torch.tanh)


def test_checking_a_trainer_changes_nothing_of_it():
    trainer = SimpleNamespace(
        strategy=DDPStrategy(), precision_plugin=MixedPrecision("16-mixed", "cuda"), precision="16-mixed",
        state=SimpleNamespace(fn=TrainerFn.FITTING), world_size=2, gradient_clip_val=None, accumulate_grad_batches=1,
        gradient_clip_algorithm=None, callbacks=[], _accelerator_connector=SimpleNamespace(_layer_sync=None),
    )  # fmt: skip
    check_trainer(trainer)
    assert type(trainer.strategy) is DDPStrategy
    assert trainer.precision_plugin.scaler is not None
    remove_reducer_and_scaler(trainer)
    assert type(trainer.strategy) is ForwardDDPStrategy
    assert trainer.precision_plugin.scaler is None
