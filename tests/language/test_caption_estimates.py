"""Likelihood ratios at an adapter before a language model: unbiased, counted, and refused where losses are rounded."""

from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import nn

from flops_lightning.allocators import OptimalAllocator, TraceSettings
from flops_lightning.errors import SettingError
from flops_lightning.language import CaptionLoss, load_language_model
from flops_lightning.language.loss_noise import loss_noise
from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import ForwardMode, LikelihoodRatio
from flops_lightning.suffix_loss import PaddedTargets
from tests.reference.language import WIDTH, caption_ids, one_loss, tiny_llama
from tests.reference.networks import gradients, normal

LENGTHS = (3, 1, 9, 4, 2, 6)
SITE = {"stages": ["0"], "kind": "linear", "queries_per_sample": 10}


def table_of_vectors(vectors: torch.Tensor) -> nn.Sequential:
    """An adapter whose weight holds each sample's vectors, so that its gradient is that of each sample."""
    layer = nn.Linear(len(vectors), vectors[0].numel(), bias=False)
    layer.weight.data = vectors.flatten(1).T.contiguous()
    return nn.Sequential(layer)


@pytest.mark.parametrize("settings", [{}, {"pilots": {"sites": ["0"], "queries": 4}}, {"variant": "antithetic"}])
def test_estimates_are_unbiased_for_every_sample(settings):
    """Slope on the gradients of single captions, with counts that differ from sample to sample."""
    llm, captions = tiny_llama(), caption_ids(*LENGTHS)
    vectors = 0.3 * normal(len(LENGTHS), 2, WIDTH, seed=1)
    exact = []
    for own, values, n in zip(vectors, captions.values, captions.lengths, strict=True):
        z = own.clone().requires_grad_(True)
        exact.append(torch.autograd.grad(one_loss(llm, z, values[:n]), z)[0].flatten())
    exact = torch.stack(exact) / len(LENGTHS)
    adapter = table_of_vectors(vectors)
    sigma = 0.004 * float(vectors.square().mean().sqrt())
    strategy = LikelihoodRatio(sites=[{**SITE, "sigma": sigma}], seed=3, **settings)
    strategy.bind(stage_network(adapter), CaptionLoss(llm, visual_tokens=2))
    counts, found = torch.tensor([4, 8, 6, 12, 2, 6]), []
    for _ in range(100):
        clean = strategy.clean_pass(torch.eye(6, dtype=torch.float64), captions)
        if strategy.pilots.queries:
            strategy.sample_statistics(clean)
        strategy.estimate(clean, counts)
        found.append(gradients(adapter)["0.weight"].T)
    slopes = (torch.stack(found) * exact).sum(2) / exact.square().sum(1)  # (draws, b)
    error = slopes.std(0) / len(slopes) ** 0.5
    assert error.max() < 0.2
    assert ((slopes.mean(0) - 1).abs() < 3 * error).all(), (slopes.mean(0), error)
    whole = (torch.stack(found) * exact).sum((1, 2)) / exact.square().sum()
    assert abs(whole.mean() - 1) < 3 * whole.std() / len(whole) ** 0.5


@pytest.mark.slow
def test_a_real_model_in_float32_has_slope_one(shared_data):
    """At sigma 0.004 of the vectors' size, in 200 draws of 20 queries."""
    llm, tokenizer = load_language_model(str(shared_data("models/stories260k")))
    texts = ["a ship .", "a dog .", "a cat and a dog play in the park", "Lily was happy"]
    captions = PaddedTargets.of([torch.tensor(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in texts])
    vectors = 0.28 * normal(4, 1, 64, seed=1).float()
    adapter = table_of_vectors(vectors)
    loss = CaptionLoss(llm)
    z = vectors[:, 0].clone().requires_grad_(True)
    (exact,) = torch.autograd.grad(loss(z, captions).mean(), z)
    sites = [{**SITE, "sigma": 0.004 * 0.28, "queries_per_sample": 20}]
    strategy = LikelihoodRatio(sites=sites, seed=0)
    strategy.bind(stage_network(adapter), loss)
    slopes = []
    for _ in range(200):
        strategy.estimate(strategy.clean_pass(torch.eye(4), captions))
        slopes.append(float((gradients(adapter)["0.weight"].T * exact).sum() / exact.square().sum()))
    assert abs(np.mean(slopes) - 1) < 3 * np.std(slopes) / len(slopes) ** 0.5


def test_half_precision_tells_its_rounding_and_a_sigma_that_stands_out():
    llm, captions = tiny_llama(), caption_ids(*LENGTHS, *LENGTHS)
    vectors = 0.3 * normal(12, 2, WIDTH, seed=1)
    half = CaptionLoss(deepcopy(llm).bfloat16(), visual_tokens=2)
    outputs = vectors.flatten(1).float()
    measured = loss_noise(half, outputs, captions, 0.01)
    # Of the model in float64 the same input has no rounding: what differs is bfloat16's own.
    true = loss_noise(CaptionLoss(llm, visual_tokens=2), outputs.double(), captions, 1e-5)
    assert true.rounding < 1e-6
    assert 1e-3 < measured.rounding < 0.1
    adapter = table_of_vectors(vectors.float())

    def clean(sigma: float) -> None:
        strategy = LikelihoodRatio(sites=[{**SITE, "sigma": sigma}], seed=0)
        strategy.bind(stage_network(adapter), half)
        strategy.clean_pass(torch.eye(12), captions)

    with pytest.raises(SettingError, match=r"sigma = 1e-05: changes a loss by .*bfloat16 rounds it by") as refusal:
        clean(1e-5)
    workable = float(str(refusal.value).split("Write ")[1].split(" ")[0])
    clean(workable)
    found = loss_noise(half, outputs, captions, workable)
    assert found.signal > 3 * found.rounding
    strategy = LikelihoodRatio(sites=[{**SITE, "sigma": 1e-5}], seed=0)
    strategy.bind(stage_network(table_of_vectors(vectors)), CaptionLoss(llm, visual_tokens=2))
    strategy.clean_pass(torch.eye(12, dtype=torch.float64), captions)  # full precision resolves it


def test_nothing_differentiates_the_language_model():
    loss, adapter = CaptionLoss(tiny_llama()), nn.Sequential(nn.Linear(3, WIDTH), nn.Identity()).double()
    with pytest.raises(SettingError, match="exact_head = True: would differentiate the language model"):
        LikelihoodRatio(sites=[SITE], exact_head=True).bind(stage_network(adapter), loss)
    with pytest.raises(SettingError, match="would differentiate the language model"):
        ForwardMode(sites=[{**SITE}]).bind(stage_network(adapter), loss)
    strategy = LikelihoodRatio(sites=[SITE], seed=0)
    strategy.bind(stage_network(adapter), loss)
    clean = strategy.clean_pass(normal(4, 3), caption_ids(3, 1, 9, 4))
    wanted = OptimalAllocator(traces=TraceSettings(source="prediction", predictors=["output_gradient"]))
    with pytest.raises(SettingError, match=r"output_gradient.*would differentiate the language model"):
        strategy.sample_statistics(clean, wanted.requests)
    told = strategy.sample_statistics(clean, OptimalAllocator().requests)
    counts = OptimalAllocator().allocate(told, strategy.budget).counts
    assert counts.sum() == 4 * 10
