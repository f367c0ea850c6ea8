"""Gradients of prompts from losses alone: what they cost, that they are unbiased, and how they scatter.

Three images, text draws shared by all of them, image draws of each one's own.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.meter import CLEAN
from flops_lightning.noise.keys import NoiseKey
from flops_lightning.noise.kinds import NoiseSpec, draw_noise
from flops_lightning.plan.stopwatch import independent
from flops_lightning.resume.run_settings import _strategy
from flops_lightning.strategies import SPSA, EvolutionStrategies, LikelihoodRatio, WeightForwardMode
from tests.reference.clip import prompted
from tests.reference.networks import cross_entropy

DIM = 5  # of either prompt
RTOL = 0.25  # of a trace: 3.5 times sqrt(2 / 400) of shared draws, sqrt(210 / 36 / 1200) of own ones (w^2 (|v|^2 - 1))
SIGMA = 1e-5  # where losses are linear; float64 tells them apart
SPLIT = [["image_prompt"], ["scores"]]
JOINT = [["image_prompt", "scores"]]
NAMES_OF = ("image_prompt.z", "text_prompt.z")
pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect. derivatives are exact")


def tuner(
    kind: Any = EvolutionStrategies, sites: Any = SPLIT, specs: Any = None, **settings: Any
) -> tuple[Any, Tensor, Tensor]:
    """A bound strategy that spends 4 queries a site, three images and their classes."""
    network, images, targets = prompted(dim=DIM)
    specs = specs or [{"stages": stages, "sigma": SIGMA, "queries_per_sample": 4} for stages in sites]
    strategy = kind(sites=specs, seed=0, **settings)
    strategy.bind(network, cross_entropy)
    return strategy, images, targets


def table(strategy: Any, *lines: list[int]) -> Tensor:
    return torch.tensor(lines)[: len(strategy.sites)]


def take_gradients(strategy: Any) -> list[Tensor]:
    found = []
    for name in NAMES_OF:
        parameter = strategy.network.module.get_parameter(name)
        found.append(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
        parameter.grad = None
    return found


def exact(strategy: Any, images: Tensor, targets: Tensor) -> list[list[Tensor]]:
    """Each sample's gradient in either prompt, by autograd."""
    parameters = [strategy.network.module.get_parameter(name) for name in NAMES_OF]
    losses = cross_entropy(strategy.network.module(images), targets)
    of_samples = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    return [list(of_parameter) for of_parameter in zip(*of_samples, strict=True)]


class Passes:
    """Prompts through the text tower, images through the patch embedding, token rows through the first block."""

    def __init__(self, strategy: Any) -> None:
        module, self.texts, self.patches, self.images = strategy.network.module, 0, 0, 0

        def count(name: str) -> Any:
            return lambda _, args: setattr(self, name, getattr(self, name) + len(args[0]))

        module.texts.transformer.register_forward_pre_hook(count("texts"))
        module.visual.conv1.register_forward_pre_hook(count("patches"))
        module.visual.transformer.resblocks[0].register_forward_pre_hook(count("images"))


@pytest.mark.parametrize("chunk_rows", [2, 256])
def test_a_split_step_makes_m_plus_1_text_passes_and_b_plus_sum_k_image_passes(chunk_rows):
    strategy, images, targets = tuner(chunk_rows=chunk_rows)
    strategy.clean_pass(images, targets)  # counts the costs
    z = strategy.network.module.text_prompt.z
    z.data.copy_(z + 1.0)  # an optimiser's step
    torch.autograd.graph.increment_version(z)
    passes = Passes(strategy)
    clean = strategy.clean_pass(images, targets)
    assert (passes.texts, passes.patches, passes.images) == (1, 3, 3)
    strategy.sample_statistics(clean, ("predictors.head_gradient",))
    strategy.estimate(clean, table(strategy, [4, 0, 8], [5, 5, 5]))
    assert (passes.texts, passes.patches, passes.images) == (1 + 5, 3, 3 + 12)


def test_a_joint_step_pays_a_text_pass_for_every_row():
    strategy, images, targets = tuner(sites=JOINT, chunk_rows=2)
    strategy.clean_pass(images, targets)
    passes = Passes(strategy)
    clean = strategy.clean_pass(images, targets)
    strategy.estimate(clean, table(strategy, [4, 0, 8]))
    assert (passes.texts, passes.patches, passes.images) == (12, 3, 3 + 12)


def drawn(strategy: Any, site: str, sample: int, query: int, numbers: int) -> Tensor:
    """The noise of a query, from its key alone; of a pair, that of its plus row."""
    place = (np.array([sample]), np.array([query // strategy.unit]))
    key = NoiseKey(strategy.seed, strategy.draw - 1, site)
    shape = {"device": torch.device("cpu"), "dtype": torch.float64}
    return draw_noise(NoiseSpec(), key, *place, (numbers,), **shape)[0]


def expected_estimate(gradients: Tensor, noise: list[list[Tensor]], variant: str) -> Tensor:
    """``1/B sum_b 1/K_b sum_k (g_b . v_bk) v_bk``; leave-one-out less the mean over the sample's other queries."""
    total = torch.zeros_like(gradients[0])
    for g, rows in zip(gradients, noise, strict=True):
        slopes = [float(g @ v) for v in rows]
        for i, v in enumerate(rows):
            others = [slope for j, slope in enumerate(slopes) if j != i]
            control = sum(others) / len(others) if variant == "leave_one_out" else 0.0
            total += (slopes[i] - control) * v / len(rows) / len(gradients)
    return total


KINDS = {
    "baseline": (EvolutionStrategies, {}),
    "leave_one_out": (EvolutionStrategies, {"variant": "leave_one_out"}),
    "antithetic": (SPSA, {}),
    "forward": (WeightForwardMode, {}),
}


@pytest.mark.parametrize("variant", KINDS)
def test_split_estimates_are_sums_over_shared_text_draws_and_own_image_draws(variant):
    kind, settings = KINDS[variant]
    strategy, images, targets = tuner(kind, chunk_rows=4, **settings)
    counts = [6, 2, 4]
    strategy.estimate(strategy.clean_pass(images, targets), table(strategy, counts, [6, 6, 6]))
    of_image, of_text = (torch.stack(each) for each in exact(strategy, images, targets))
    own = [[drawn(strategy, "image_prompt", b, k, DIM) for k in range(n)] for b, n in enumerate(counts)]
    shared = [[drawn(strategy, "scores/scores", 0, m, DIM) for m in range(6)]] * 3
    image, text = take_gradients(strategy)
    torch.testing.assert_close(image, expected_estimate(of_image, own, variant), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(text, expected_estimate(of_text, shared, variant), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("variant", KINDS)
def test_joint_estimates_move_both_prompts_of_a_row_at_once(variant):
    kind, settings = KINDS[variant]
    strategy, images, targets = tuner(kind, JOINT, chunk_rows=4, **settings)
    counts = [6, 2, 4]
    strategy.estimate(strategy.clean_pass(images, targets), table(strategy, counts))
    image, text = (torch.stack(each) for each in exact(strategy, images, targets))
    (site,) = strategy.sites
    assert list(site.parameters) == ["text_prompt.z", "image_prompt.z"]
    own = [[drawn(strategy, site.name, b, k, 2 * DIM) for k in range(n)] for b, n in enumerate(counts)]
    expected = expected_estimate(torch.cat([text, image], 1), own, variant)
    torch.testing.assert_close(torch.cat(take_gradients(strategy)[::-1]), expected, rtol=1e-3, atol=1e-5)


def test_traces_are_those_of_the_formulas_and_the_same_for_all_samples_where_draws_are_shared():
    strategy, images, targets = tuner(chunk_rows=1000)
    counts = table(strategy, [1200, 1200, 1200], [400, 400, 400])
    observed = strategy.estimate(strategy.clean_pass(images, targets), counts, traces=True).observation
    of_image, of_text = (torch.stack(each) for each in exact(strategy, images, targets))
    torch.testing.assert_close(observed.trace[0], (DIM + 1) * of_image.square().sum(1), rtol=RTOL, atol=0)
    expected = (3 * (DIM + 1) * of_text.mean(0).square().sum()).expand(3)
    torch.testing.assert_close(observed.trace[1], expected, rtol=RTOL, atol=0)


def test_the_budget_tells_that_text_draws_are_shared_and_what_they_cost():
    strategy, images, targets = tuner()
    assert strategy.budget.shared == (False, True)
    clean = strategy.clean_pass(images, targets)
    image, text = strategy.sample_statistics(clean, ("counted_costs",)).counted_costs.tolist()
    costs = strategy._known_costs
    assert text == pytest.approx(costs.query["scores"] + costs.context["scores"] / 3)
    assert costs.context["scores"] > costs.query["image_prompt"] > 100 * costs.query["scores"]
    strategy.meter.load_state_dict(type(strategy.meter)().state_dict())
    strategy.estimate(strategy.clean_pass(images, targets), table(strategy, [4, 0, 8], [5, 5, 5]))
    spent = strategy.meter.sites
    assert (spent["scores"].queries, spent["image_prompt"].queries) == (5, 12)
    assert spent[CLEAN].forward_equivalents == pytest.approx(3 + costs.context["scores"])
    expected = 5 * costs.context["scores"] + 15 * costs.query["scores"]
    assert spent["scores"].forward_equivalents == pytest.approx(expected)
    assert spent["image_prompt"].forward_equivalents == pytest.approx(12 * image)


def test_a_lost_text_draw_is_lost_for_all_samples_and_counts_once(monkeypatch):
    gradients, texts = [], None
    for lose in (False, True):
        strategy, images, targets = tuner()
        clean, texts = strategy.clean_pass(images, targets), strategy.network.module.texts
        encode, drawn = texts.encode, []

        def broken(prompts, encode=encode, drawn=drawn, lose=lose):
            drawn.append(encode(prompts).clone())
            if lose:
                drawn[-1][2] = torch.nan
            return drawn[-1]

        monkeypatch.setattr(texts, "encode", broken)
        report = strategy.estimate(clean, table(strategy, [4, 4, 4], [4, 4, 4]), traces=True)
        assert (report.lost, report.queries) == (int(lose), 16)
        assert report.observation.queries.tolist() == [[4.0] * 3, [4.0 - lose] * 3]
        assert strategy.meter.sites["scores"].lost == int(lose)
        gradients.append(take_gradients(strategy))
    (image, whole), (same, rest) = gradients
    assert torch.equal(image, same)
    assert not torch.allclose(whole, rest)


def test_directions_of_a_site_can_be_chosen():
    sites = [
        {"stages": ["image_prompt"], "directions": "shared", "sigma": SIGMA, "queries_per_sample": 4},
        {"stages": ["scores"], "directions": "own", "sigma": SIGMA, "queries_per_sample": 4},
    ]
    strategy, images, targets = tuner(specs=sites)
    assert [(site.directions, site.per_batch) for site in strategy.sites] == [("shared", False), ("own", False)]
    assert strategy.budget.shared == ()
    strategy.clean_pass(images, targets)
    passes = Passes(strategy)
    strategy.estimate(strategy.clean_pass(images, targets))
    assert (passes.texts, passes.images) == (12, 3 + 12)


def test_a_draw_made_once_for_the_batch_is_every_samples():
    strategy, images, targets = tuner()
    clean = strategy.clean_pass(images, targets)
    uneven, message = table(strategy, [4, 0, 8], [4, 4, 2]), r"counts = \[4, 4, 2\]: differ between samples at 'scores'"
    with pytest.raises(SettingError, match=message):
        strategy.estimate(clean, uneven)
    with pytest.raises(SettingError, match=message):
        strategy.observe_traces(clean, uneven, first_query=8)


def test_directions_that_cannot_be_had_are_refused():
    sites = [{"stages": ["image_prompt"], "directions": "own"}, {"stages": ["scores"]}]
    for kind, settings, message in (
        (LikelihoodRatio, {}, "no effect where noise enters activations"),
        (EvolutionStrategies, {"layout": "subspace"}, "cannot be chosen at 'image_prompt' with layout: subspace"),
        (EvolutionStrategies, {"exchange": "losses"}, "rows have their own at 'image_prompt'"),
    ):
        with pytest.raises(SettingError, match=message):
            tuner(kind, specs=sites, **settings)


def test_plans_and_checkpoints_know_that_draws_are_shared():
    strategy, images, targets = tuner(layout="factored", specs=[{"stages": ["image_prompt"]}, {"stages": ["scores"]}])
    assert independent(strategy, strategy.network.module)
    specs = [{"stages": ["image_prompt"]}, {"stages": ["scores"], "directions": "shared"}]
    strategy, images, targets = tuner(layout="factored", specs=specs)
    assert not independent(strategy, strategy.network.module)
    assert _strategy(strategy)["strategy.sites.scores.directions"] == "shared"
    strategy.clean_pass(images, targets)
    paid = strategy._known_costs.of(strategy.sites[1], 1, 3)
    assert strategy.query_costs(len(images))["scores"] == pytest.approx(paid)
