"""Muon against its singular values moved one by one, AdamW against torch's."""

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from flops_lightning.errors import SettingError
from flops_lightning.optim.muon import hidden_matrices, newton_schulz
from flops_lightning.optim.optimizers import OptimizerSettings, build_optimizer, build_schedule, squared_step_sizes
from tests.reference.networks import normal, tiny_vit
from tests.reference.orthogonal import orthogonalised


def with_gradients(module, step):
    for i, p in enumerate(module.parameters()):
        p.grad = normal(*p.shape, seed=100 * step + i)
    return module


def convolutional():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3), nn.LayerNorm(3), nn.Linear(3, 2)).double()


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (5, 5)])
def test_newton_schulz_moves_singular_values_alone(shape):
    g = normal(*shape)
    torch.testing.assert_close(newton_schulz(g, 5), orthogonalised(g, 5), rtol=0, atol=1e-12)
    assert newton_schulz(torch.zeros(shape)).eq(0).all()


def test_orthogonalising_in_a_subspace_is_orthogonalising_what_lies_in_it():
    p = torch.linalg.qr(normal(12, 3)).Q
    g = normal(3, 8, seed=1)
    torch.testing.assert_close(newton_schulz(p @ g), p @ newton_schulz(g), rtol=0, atol=1e-12)
    single = newton_schulz((p @ g).float())
    torch.testing.assert_close(single, (p @ newton_schulz(g)).float(), rtol=0, atol=1e-5)
    outside = single - p.float() @ (p.float().mT @ single)
    assert outside.abs().max() < 1e-5, "rounding is multiplied by 485"


@pytest.mark.parametrize(
    ("scale", "factor"),
    [
        ("none", lambda m, n: 1.0),
        ("original", lambda m, n: math.sqrt(max(1, m / n))),
        ("rms", lambda m, n: 0.2 * math.sqrt(max(m, n))),
    ],
)
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, True), (0.9, True), (0.9, False)])
def test_steps_are_those_of_the_formulas(scale, factor, momentum, nesterov):
    arguments = {"scale": scale, "nesterov": nesterov, "adamw_ratio": 0.5}
    settings = OptimizerSettings("muon", arguments, lr=0.1, weight_decay=0.2, momentum=momentum)
    module, slow = convolutional(), convolutional()
    slow.load_state_dict(module.state_dict())
    optimizer = build_optimizer(module, settings)
    matrices, others = (slow[0].weight, slow[2].weight), (slow[0].bias, slow[2].bias, *slow[3:].parameters())
    decays = [{"params": [slow[4].weight]}, {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0}]
    adamw, buffers = torch.optim.AdamW(decays, lr=0.05, weight_decay=0.2), dict.fromkeys(matrices, 0.0)
    for step in range(3):
        with_gradients(module, step)
        with_gradients(slow, step)
        optimizer.step()
        adamw.step()
        for w in matrices:
            g = w.grad.flatten(1)
            buffers[w] = momentum * buffers[w] + g
            update = g + momentum * buffers[w] if nesterov else buffers[w]
            move = 0.1 * factor(*g.shape) * orthogonalised(update, 5)
            w.data = w.data * (1 - 0.1 * 0.2) - move.view_as(w)
        for found, expected in zip(module.parameters(), slow.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_steps_are_those_of_torch_up_to_its_bfloat16():
    ours, theirs = (nn.Parameter(torch.zeros(16, 8)) for _ in range(2))
    module = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 2))
    module[0].weight = ours
    optimizer = build_optimizer(module, OptimizerSettings("muon", {"scale": "original"}, lr=0.1, momentum=0.9))
    reference = torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.0)
    for step in range(3):
        ours.grad = theirs.grad = normal(16, 8, seed=step).float()
        optimizer.step()
        reference.step()
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_hidden_matrices_are_orthogonalised_and_the_rest_is_not():
    vit = tiny_vit()
    names = {id(p): name for name, p in vit.named_parameters()}
    chosen = [names[id(p)] for p in hidden_matrices(vit)]
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert chosen == ["patch_embed.proj.weight", *(f"blocks.{i}.{layer}.weight" for i in range(3) for layer in layers)]
    vit.blocks[0].requires_grad_(False)
    assert len(hidden_matrices(vit)) == 9
    text = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    assert [id(p) for p in hidden_matrices(text)] == [id(text[1].weight)]
    ending_in_a_norm = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2), nn.LayerNorm(2))
    assert [id(p) for p in hidden_matrices(ending_in_a_norm)] == [id(ending_in_a_norm[0].weight)]
    assert hidden_matrices(nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 4), nn.Linear(4, 2))) == [], "a vector each"


def test_rates_of_groups_follow_ratio_layer_decay_and_schedule():
    vit = tiny_vit()
    settings = OptimizerSettings("muon", {"adamw_ratio": 0.1}, lr=0.2, layer_decay=0.5, warmup_steps=1)
    optimizer = build_optimizer(vit, settings)
    schedule = build_schedule(optimizer, settings, 10)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(vit.parameters()))
    block = vit.blocks[2]
    assert [rates[id(p)] for p in (vit.head.weight, block.mlp.fc1.weight, block.mlp.fc1.bias)] == pytest.approx(
        [0.01, 0.05, 0.005], rel=1e-9
    )
    optimizer.step()
    schedule.step()
    assert max(group["lr"] for group in optimizer.param_groups) == pytest.approx(0.1)


def test_a_resumed_optimiser_goes_on_with_the_same_bits():
    settings = OptimizerSettings("muon", lr=0.1, momentum=0.9, weight_decay=0.1)
    module = convolutional()
    optimizer = build_optimizer(module, settings)
    with_gradients(module, 0)
    optimizer.step()
    again = deepcopy(module)
    resumed = build_optimizer(again, settings)
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    for network, own in ((module, optimizer), (again, resumed)):
        with_gradients(network, 1)
        own.step()
    assert all(a.equal(b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def test_a_closure_makes_the_gradient_and_a_path_is_as_good_as_the_name():
    module, by_path = convolutional(), convolutional()
    by_path.load_state_dict(module.state_dict())
    x = normal(2, 2, 4, 4)
    for network, name in ((module, "muon"), (by_path, "flops_lightning.optim.muon.Muon")):
        optimizer = build_optimizer(network, OptimizerSettings(name, lr=1e-3))

        def closure(network=network):
            loss = network(x).square().sum()
            loss.backward()
            return loss

        before = optimizer.step(closure)
        assert before > network(x).square().sum()
    assert all(a.equal(b) for a, b in zip(module.parameters(), by_path.parameters(), strict=True))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arguments": {"scale": "big"}}, r"optimizer.arguments = .*muon: scale='big' is out of range"),
        ({"arguments": {"adamw_ratio": 0.0}}, r"muon: adamw_ratio=0.0 is out of range"),
        ({"momentum": 1.0}, r"muon: momentum=1.0 is out of range"),
        ({"arguments": {"gamma": 1}}, r"unexpected keyword argument 'gamma'"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        build_optimizer(convolutional(), OptimizerSettings("muon", **settings))


def test_what_muon_cannot_do_is_told():
    with pytest.raises(
        SettingError, match=r"optimizer.name = 'muon': has no matrix to train other than embeddings and"
    ):
        build_optimizer(nn.Linear(3, 2), OptimizerSettings("muon"))
    with pytest.raises(SettingError, match=r"Muon does not precondition. Write metric: parameters"):
        squared_step_sizes(build_optimizer(convolutional(), OptimizerSettings("muon")), {})
    if hasattr(torch.optim, "Muon"):
        with pytest.raises(SettingError, match=r"only supports 2D .*torch.optim.Muon: write name: muon"):
            build_optimizer(convolutional(), OptimizerSettings("torch.optim.Muon"))
