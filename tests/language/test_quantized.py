"""A language model in eight bits by torch's own means: counted, never differentiated by mistake, and its noise told."""

import warnings
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from flops_lightning.errors import SettingError
from flops_lightning.language import CaptionLoss
from flops_lightning.language.loss_noise import check_sigma, loss_noise
from flops_lightning.language.quantized import followed_by_autograd, quantized
from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import Backprop, LikelihoodRatio
from flops_lightning.suffix_loss import PaddedTargets
from tests.reference.language import WIDTH, caption_ids, tiny_llama
from tests.reference.networks import gradients, normal

CAPTIONS = caption_ids(3, 1, 9, 4, 2, 6, 5, 7, 2, 8, 3, 4)


@pytest.fixture(scope="module")
def llm() -> Any:
    return tiny_llama().float()


@pytest.fixture(scope="module")
def eight_bits(llm) -> Any:
    """Weights and activations of every linear layer."""
    quantization = pytest.importorskip("torch.ao.quantization")
    if torch.backends.quantized.engine == "none":
        pytest.skip("torch has no quantised products on this machine")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch wants torchao in its place
        return quantization.quantize_dynamic(deepcopy(llm), {nn.Linear}, dtype=torch.qint8)


def adapter() -> nn.Sequential:
    """Its weight holds each sample's vectors, so that its gradient is that of each sample."""
    layer = nn.Linear(len(CAPTIONS), 2 * WIDTH, bias=False)
    layer.weight.data = (0.3 * normal(len(CAPTIONS), 2 * WIDTH, seed=1)).float().T.contiguous()
    return nn.Sequential(layer)


def bound(model: Any, network: nn.Sequential, sigma: float, queries: int = 10) -> LikelihoodRatio:
    sites = [{"stages": ["0"], "kind": "linear", "sigma": sigma, "queries_per_sample": queries}]
    strategy = LikelihoodRatio(sites=sites, seed=0)
    strategy.bind(stage_network(network), CaptionLoss(model, visual_tokens=2))
    return strategy


def test_it_is_known_and_its_operations_are_those_of_whole_precision(llm, eight_bits):
    assert [quantized(llm), quantized(eight_bits)] == [False, True]
    found, expected = (CaptionLoss(model, visual_tokens=2).flops(CAPTIONS) for model in (eight_bits, llm))
    np.testing.assert_array_equal(found, expected)


def test_the_gradient_of_its_losses_is_estimated_from_queries_alone(llm, eight_bits):
    """Cosine with autograd's gradient in whole precision; 2,400 queries of 32 dimensions would have 0.99."""
    network = adapter()
    z = network[0].weight.detach().T.clone().requires_grad_(True)
    (exact,) = torch.autograd.grad(CaptionLoss(llm, visual_tokens=2)(z, CAPTIONS).mean(), z)
    strategy = bound(eight_bits, network, sigma=0.06, queries=2400)
    strategy.estimate(strategy.clean_pass(torch.eye(len(CAPTIONS)), CAPTIONS))
    estimate = gradients(network)["0.weight"].T
    assert torch.cosine_similarity(estimate.flatten(), exact.flatten(), dim=0) > 0.9


def test_backprop_through_it_is_refused_instead_of_being_zero(eight_bits):
    message = r"has no derivative, since autograd cannot differentiate its quantised products\. Use .* LikelihoodRatio"
    with pytest.raises(SettingError, match=message):
        Backprop().bind(stage_network(adapter()), CaptionLoss(eight_bits, visual_tokens=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_derivative_is_told_from_one_that_leaves_out_a_part(llm, dtype):
    model = deepcopy(llm).to(dtype)
    assert followed_by_autograd(model)
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: output.detach())
    assert not followed_by_autograd(model)


def test_a_sigma_that_drowns_in_its_steps_is_refused(llm, eight_bits):
    network, eye = adapter(), torch.eye(len(CAPTIONS))
    with pytest.raises(SettingError, match=r"sigma = 0\.003: .*the quantised model rounds it by") as refusal:
        bound(eight_bits, network, 0.003).clean_pass(eye, CAPTIONS)
    assert "with nothing but its weights quantised" in str(refusal.value)
    workable = float(str(refusal.value).split("Write ")[1].split(" ")[0])
    for model, sigma in ((eight_bits, workable), (llm, 0.003)):
        bound(model, network, sigma).clean_pass(eye, CAPTIONS)


def test_the_rounding_of_a_loss_is_told_from_its_curvature():
    """Of a cubic with known noise, both to their standard errors: 16 samples and four directions."""
    z, ids = normal(16, 8, seed=2), PaddedTargets.of([torch.zeros(1)] * 16)
    generator = torch.Generator().manual_seed(3)

    def score(noise: float) -> Any:
        def losses(x: torch.Tensor, _: Any) -> torch.Tensor:
            errors = torch.randn(len(x), generator=generator, dtype=x.dtype)
            return x.sum(1) + 5 * x.square().sum(1) + x.pow(3).sum(1) + noise * errors

        return losses

    smooth, rounded = (loss_noise(score(noise), z, ids, 0.1) for noise in (0.0, 0.2))
    assert smooth.rounding < 1e-12
    assert rounded.rounding == pytest.approx(0.2, rel=3 / (2 * 16) ** 0.5)
    assert rounded.signal == pytest.approx(smooth.signal, rel=0.1)


def test_a_smooth_loss_is_not_taken_for_steps_at_wide_noise():
    z, ids = normal(16, 8, seed=2), PaddedTargets.of([torch.zeros(1)] * 16)

    def waves(x: torch.Tensor, _: Any) -> torch.Tensor:
        return torch.sin(5 * x).sum(1)

    def steps(x: torch.Tensor, _: Any) -> torch.Tensor:
        return (2 * waves(x, _)).round() / 2

    for sigma in (1e-4, 0.5):
        check_sigma(waves, z, ids, sigma, torch.float32, quantized=True)
    check_sigma(steps, z, ids, 0.5, torch.float32, quantized=True)
    with pytest.raises(SettingError, match="the quantised model rounds it"):
        check_sigma(steps, z, ids, 0.01, torch.float32, quantized=True)
