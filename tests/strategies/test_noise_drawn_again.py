"""Noise that is drawn again after the suffix, instead of being kept through it, gives the same estimate bit for bit."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import ForwardMode, LikelihoodRatio, perturbation
from tests.reference.networks import cross_entropy, tiny_vit

SITES = [
    {"name": "lower", "stages": ["embed", "blocks.0"], "sigma": 0.05, "queries_per_sample": 4},
    {"name": "upper", "stages": ["blocks.1", "blocks.2"], "sigma": 0.05, "queries_per_sample": 4},
    {"name": "head", "stages": ["pool", "head"], "sigma": 0.05, "queries_per_sample": 4},
]
SETTINGS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "antithetic": {"variant": "antithetic"},
    "leave-one-out": {"variant": "leave_one_out"},
    "all tokens": {"sites": [{**site, "active_tokens": False} for site in SITES]},
    "token widths": {"token_sigma": True, "learn_sigma": 0.01},
    "factored": {"noise": {"layout": "factored"}},
    "orthogonal": {"noise": {"orthogonal": True}},
}


def two_steps(strategy: LikelihoodRatio) -> list[Tensor]:
    network = stage_network(tiny_vit())
    strategy.bind(network, cross_entropy)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        inputs = torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64)
        strategy.estimate(strategy.clean_pass(inputs, torch.tensor([0, 1, 2])), traces=True)
    return [p.grad for p in network.module.parameters() if p.grad is not None]


@pytest.mark.filterwarnings("ignore:model.strategy.sites")
@pytest.mark.parametrize(("kind", "name"), [*((LikelihoodRatio, name) for name in SETTINGS), (ForwardMode, "baseline")])
def test_the_estimate_is_the_same_to_the_last_bit(kind, name, monkeypatch):
    settings = {"sites": SITES, "chunk_rows": 5, "seed": 0, **SETTINGS[name]}
    kept = two_steps(kind(**settings))
    monkeypatch.setattr(perturbation, "DRAWN_AGAIN", 0)
    torch.testing.assert_close(two_steps(kind(**settings)), kept, rtol=0, atol=0)
    assert max(float(gradient.abs().max()) for gradient in kept) > 1e-3


@pytest.mark.parametrize(("least", "held"), [(0, 0), (2**30, 1)])
def test_nothing_holds_it_while_the_suffix_runs(least, held, monkeypatch):
    monkeypatch.setattr(perturbation, "DRAWN_AGAIN", least)
    network = stage_network(tiny_vit())
    strategy = LikelihoodRatio(sites=SITES[:1], chunk_rows=7, seed=0)
    for name, parameter in network.module.named_parameters():
        parameter.requires_grad_(name.startswith(("patch_embed", "cls_token", "pos_embed", "blocks.0")))
    strategy.bind(network, cross_entropy)
    clean = strategy.clean_pass(torch.randn(7, 1, 8, 8, dtype=torch.float64), torch.arange(7) % 5)
    found: list[int] = []
    real = network.stages[2].run

    def watched(x: Tensor) -> Tensor:
        shape = (7, *x.shape[1:])  # noise of a chunk: as large as what enters, and not it
        alive = [t for t in gc.get_objects() if type(t) is Tensor and t.shape == shape and t.dtype == x.dtype]
        known = {id(h) for h in clean.activations.values()} | {id(x)}
        found.append(sum(id(t) not in known for t in alive))
        return real(x)

    object.__setattr__(network.stages[2], "run", watched)
    strategy.estimate(clean)
    # Beside the noise, the block below may still hold its output, which is what enters here.
    assert found[0] == held
