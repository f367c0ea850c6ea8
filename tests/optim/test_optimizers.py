import math

import pytest
import torch
from torch import nn

from flops_lightning.errors import SettingError
from flops_lightning.optim.optimizers import (
    OptimizerSettings,
    build_optimizer,
    build_schedule,
    lr_factor,
    squared_step_sizes,
)
from tests.reference.networks import tiny_vit


def test_schedule_rises_linearly_and_falls_as_half_a_cosine():
    factors = [lr_factor(step, schedule="cosine", warmup_steps=4, total_steps=14) for step in range(15)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[9] == pytest.approx(0.5)
    assert factors[14] == pytest.approx(0.0)
    assert factors[6] == pytest.approx(0.5 * (1 + math.cos(0.2 * math.pi)))
    assert lr_factor(1000, schedule="constant", warmup_steps=4, total_steps=math.inf) == 1.0


def test_settings_that_cannot_work_are_refused():
    settings, layer = OptimizerSettings(schedule="cosine"), nn.Linear(2, 2)
    with pytest.raises(SettingError, match=r"Set trainer.max_epochs or max_steps"):
        build_schedule(build_optimizer(layer, settings), settings, math.inf)
    with pytest.raises(SettingError, match=r"allocator.metric = 'preconditioned': SGD does not precondition"):
        squared_step_sizes(build_optimizer(layer, OptimizerSettings(name="sgd")), {})
    for setting, value in (
        ("layer_decay", 0.0),
        ("layer_decay", 1.1),
        ("accumulate_grad_batches", 0),
        ("bias_lr_factor", 0.0),
    ):
        with pytest.raises(SettingError, match=setting):
            OptimizerSettings(**{setting: value}).check()


@pytest.mark.parametrize(
    ("name", "family"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)]
)
def test_decay_spares_vectors_and_frozen_parameters_are_left_out(name, family):
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    module[0].weight.requires_grad_(False)
    optimizer = build_optimizer(nn.Sequential(module, nn.Linear(2, 2)), OptimizerSettings(name=name, weight_decay=0.1))
    assert type(optimizer) is family
    decays = {tuple(p.shape): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decays == {(2, 2): 0.1, (2,): 0.0}


def test_squared_step_sizes_are_those_of_the_step():
    layer = torch.nn.Linear(3, 2, dtype=torch.float64)
    optimizer = build_optimizer(layer, OptimizerSettings(lr=1.0))
    assert squared_step_sizes(optimizer, dict(layer.named_parameters())) == {}
    layer(torch.randn(5, 3, dtype=torch.float64)).square().sum().backward()
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    optimizer.step()
    sizes = squared_step_sizes(optimizer, dict(layer.named_parameters()))
    for name, parameter in layer.named_parameters():
        # The first step of Adam has no memory of another gradient.
        assert parameter.grad is not None
        torch.testing.assert_close((parameter - before[name]).square(), sizes[name] * parameter.grad.square())


def test_layers_decay_from_the_head_down():
    vit = tiny_vit()
    settings = OptimizerSettings(lr=0.1, weight_decay=0.2, layer_decay=0.5)
    optimizer = build_optimizer(vit, settings)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    by_name = {name: rates[id(p)] for name, p in vit.named_parameters()}
    assert by_name["head.weight"] == pytest.approx(0.1)
    for block in range(3):
        assert by_name[f"blocks.{block}.mlp.fc1.weight"] == pytest.approx(0.1 * 0.5 ** (3 - block))
    assert by_name["pos_embed"] == by_name["patch_embed.proj.weight"] == pytest.approx(0.1 * 0.5**4)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decays[id(p)] for p in vit.parameters() if p.ndim <= 1} == {0.0}
    assert decays[id(vit.blocks[0].mlp.fc1.weight)] == 0.2
    schedule = build_schedule(optimizer, OptimizerSettings(lr=0.1, warmup_steps=4), 100)
    assert max(schedule.get_last_lr()) == pytest.approx(0.02), "the schedule scales every layer's own rate"


def test_biases_have_a_rate_of_their_own():
    vit = tiny_vit()
    for name, plain in (
        ("adamw", {"layer_decay": 0.5, "weight_decay": 0.2}),
        ("muon", {"layer_decay": 0.5}),
        ("adam", {}),
    ):
        found = []
        for factor in (1.0, 3.0):
            optimizer = build_optimizer(vit, OptimizerSettings(name, lr=0.1, bias_lr_factor=factor, **plain))
            groups = [(p, group) for group in optimizer.param_groups for p in group["params"]]
            found.append({id(p): (group["lr"], group["weight_decay"]) for p, group in groups})
        for parameter, p in vit.named_parameters():
            (before, decay), (rate, same) = (each[id(p)] for each in found)
            assert rate / before == pytest.approx(3.0 if parameter.endswith("bias") else 1.0), parameter
            assert decay == same
    with pytest.raises(SettingError, match="has no effect: no bias is trained"):
        build_optimizer(nn.Linear(2, 2, bias=False), OptimizerSettings(bias_lr_factor=3.0))


def test_squared_step_sizes_know_the_rates_of_layers():
    vit = tiny_vit()
    optimizer = build_optimizer(vit, OptimizerSettings(lr=0.1, layer_decay=0.5))
    for p in vit.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    weights = squared_step_sizes(optimizer, dict(vit.named_parameters()))
    head, block = weights["head.weight"], weights["blocks.2.mlp.fc1.weight"]
    assert float(block.mean() / head.mean()) == pytest.approx(0.25)


def test_any_optimiser_is_built_by_its_path():
    settings = OptimizerSettings(name="torch.optim.RMSprop", lr=0.5, arguments={"alpha": 0.9}, weight_decay=0.1)
    optimizer = build_optimizer(nn.Linear(2, 2), settings)
    assert type(optimizer) is torch.optim.RMSprop
    assert [(g["lr"], g["alpha"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.5, 0.9, 0.1),
        (0.5, 0.9, 0.0),
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "lion"}, r"name = 'lion': is neither one of adam, adamw, muon, sgd nor the path"),
        ({"name": "torch.nn.Linear"}, r"nor the path of an optimiser. Write, for example, torch.optim.RMSprop"),
        ({"name": "torch.optim.LBFGS"}, r"evaluates the loss several times in a step"),
        ({"arguments": {"lr": 1.0}}, r"has lr, which are settings of their own"),
        ({"arguments": {"gamma": 1.0}}, r"optimizer.arguments = .*unexpected keyword argument 'gamma'"),
    ],
)
def test_optimisers_that_cannot_be_built(settings, message):
    with pytest.raises(SettingError, match=message):
        build_optimizer(nn.Linear(2, 2), OptimizerSettings(**settings))
