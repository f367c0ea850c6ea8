"""A CLIP with prompts in a task: staged already, trained by the Trainer with an allocator."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flops_lightning.allocators import EqualAllocator
from flops_lightning.callbacks import QueryAllocatorCallback
from flops_lightning.errors import SettingError
from flops_lightning.network import Stage, StagedNetwork
from flops_lightning.strategies import EvolutionStrategies
from flops_lightning.tasks import ForwardModule
from tests.digits import quiet_trainer
from tests.reference.clip import prompted
from tests.reference.networks import cross_entropy


class Prompts(ForwardModule):
    def __init__(self, network):
        sites = [{"stages": [s], "sigma": 0.02, "queries_per_sample": 4} for s in ("image_prompt", "scores")]
        super().__init__(strategy=EvolutionStrategies(sites=sites, seed=0), optimizer={"name": "sgd", "lr": 0.1})
        self.clip = network.module
        self.stage(network)

    def loss(self, outputs, targets):
        return cross_entropy(outputs, targets)


def test_prompts_train_in_a_task_with_an_allocator_and_nothing_else_of_clip_moves():
    network, images, targets = prompted()
    task, loader = Prompts(network), DataLoader(TensorDataset(images, targets), batch_size=3)
    start = copy.deepcopy(task.state_dict())
    trainer = quiet_trainer(max_steps=2, max_epochs=2, callbacks=[QueryAllocatorCallback(allocator=EqualAllocator())])
    trainer.fit(task, loader)
    assert task.network is network
    assert trainer.global_step == 2
    moved = [name for name, value in task.state_dict().items() if not torch.equal(value, start[name])]
    assert sorted(moved) == ["clip.image_prompt.z", "clip.text_prompt.z"]
    assert {name: count.queries for name, count in task.strategy.meter.sites.items() if name != "clean"} == {
        "image_prompt": 2 * 3 * 4, "scores": 2 * 4,
    }  # fmt: skip


def test_a_task_keeps_the_module_that_it_trains():
    network, images, targets = prompted()
    task = Prompts(network)
    task.clip = None
    with pytest.raises(SettingError, match=r"network = 'text_prompt.z': is trained but .* Keep the network's module"):
        quiet_trainer(max_steps=1).fit(task, DataLoader(TensorDataset(images, targets), batch_size=3))


def test_batch_normalisation_of_a_network_that_is_cut_already_is_refused():
    layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    network = StagedNetwork(layers, tuple(Stage(name, each, (name,)) for name, each in layers.named_children()))
    task = Prompts(prompted()[0])
    with pytest.raises(SettingError, match="Write batch_norm: frozen"):
        task.stage(network)
