"""Every text draw beside every image draw: equal to split where losses are linear, and without a clean loss."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flops_lightning.errors import SettingError
from flops_lightning.strategies import SPSA, EvolutionStrategies, WeightForwardMode
from flops_lightning.strategies.crossed import pair_means
from tests.prompts.test_estimates import JOINT, SIGMA, SPLIT, Passes, exact, table, take_gradients, tuner
from tests.reference.clip import prompted
from tests.reference.networks import cross_entropy

LOO = {"variant": "leave_one_out"}
CROSSED = {"pairing": "crossed", **LOO}
NAN = torch.nan


def gradients(kind: Any, counts: list[list[int]], **settings: Any) -> list[Tensor]:
    strategy, images, targets = tuner(kind, **settings)
    strategy.estimate(strategy.clean_pass(images, targets), table(strategy, *counts))
    return take_gradients(strategy)


@pytest.mark.parametrize(("kind", "settings"), [(EvolutionStrategies, LOO), (SPSA, {})])
@pytest.mark.parametrize("chunk_rows", [4, 256])
def test_in_the_linear_range_it_is_split(kind, settings, chunk_rows):
    counts = [[6, 2, 4], [6, 6, 6]]
    split = gradients(kind, counts, chunk_rows=chunk_rows, **settings)
    crossed = gradients(kind, counts, chunk_rows=chunk_rows, pairing="crossed", **settings)
    for a, b in zip(split, crossed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
        assert not torch.equal(a, b)


def test_both_sides_are_means_over_all_pairs():
    """By hand, with noise so wide that the other side's draws matter."""
    specs = [{"stages": stages, "sigma": 0.5, "queries_per_sample": 3} for stages in SPLIT]
    strategy, images, targets = tuner(specs=specs, **CROSSED)
    clean = strategy.clean_pass(images, targets)
    module = strategy.network.module
    z_image, z_text = (prompt.z.detach().clone() for prompt in (module.image_prompt, module.text_prompt))
    u, v = directions(strategy, clean, [3, 3, 3])
    losses = torch.zeros(3, 3, 3, dtype=torch.float64)  # sample, image draw, text draw
    with torch.no_grad():
        for b, k, m in torch.cartesian_prod(*[torch.arange(3)] * 3).tolist():
            module.text_prompt.z.copy_(z_text + 0.5 * u[m])
            module.image_prompt.z.copy_(z_image + 0.5 * v[b][k])
            losses[b, k, m] = cross_entropy(module(images[b : b + 1]), targets[b : b + 1])[0]
        module.text_prompt.z.copy_(z_text)
        module.image_prompt.z.copy_(z_image)
    strategy.estimate(clean, table(strategy, [3, 3, 3], [3, 3, 3]))
    image, text = take_gradients(strategy)
    torch.testing.assert_close(image, sum(centred(losses[b].mean(1), v[b]) for b in range(3)) / 3)
    torch.testing.assert_close(text, centred(losses.mean((0, 1)), u))


def directions(strategy: Any, clean: Any, counts: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Shared text draws and each sample's own image draws."""
    from tests.prompts.test_estimates import DIM, drawn

    assert clean.draw == strategy.draw - 1
    text = torch.stack([drawn(strategy, "scores/scores", 0, m, DIM) for m in range(3)])
    return text, [
        torch.stack([drawn(strategy, "image_prompt", b, k, DIM) for k in range(n)]) for b, n in enumerate(counts)
    ]


def centred(losses: Tensor, noise: Tensor) -> Tensor:
    n = len(losses)
    others = (losses.sum() - losses) / (n - 1)
    return ((losses - others) / 0.5) @ noise / n


def test_a_crossed_step_makes_no_more_passes_than_a_split_one():
    strategy, images, targets = tuner(chunk_rows=2, **CROSSED)
    clean = strategy.clean_pass(images, targets)
    passes = Passes(strategy)
    strategy.estimate(clean, table(strategy, [4, 0, 8], [5, 5, 5]))
    assert (passes.texts, passes.patches, passes.images) == (5, 0, 12)
    costs, spent = strategy._known_costs, strategy.meter.sites["scores"]
    assert spent.forward_equivalents == pytest.approx(
        5 * costs.context["scores"] + 5 * (3 + 12) * costs.query["scores"]
    )


@pytest.mark.parametrize("counts", [[[4, 0, 8], [4, 4, 4]], [[4, 4, 4], [0, 0, 0]], [[0, 0, 0], [4, 4, 4]]])
def test_samples_and_sites_without_queries(counts):
    """A sample without image queries is read as it is; where one site has none, the other is split."""
    split, crossed = gradients(EvolutionStrategies, counts, **LOO), gradients(EvolutionStrategies, counts, **CROSSED)
    for a, b in zip(split, crossed, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_means_of_pairs_leave_out_what_is_lost():
    losses = torch.tensor([[1.0, 2.0, NAN], [3.0, 4.0, NAN], [NAN, 9.0, NAN], [5.0, 7.0, NAN], [8.0, 8.0, NAN]])
    # Rows of samples 0, 0 and 1, then the clean rows of both; the last draw is lost, and with it nothing else.
    of_rows, of_draws = pair_means(losses, torch.tensor([0, 0, 1, 0, 1]), 2)
    torch.testing.assert_close(of_rows, torch.tensor([1.5, 3.5, NAN]), equal_nan=True)
    torch.testing.assert_close(of_draws, torch.tensor([[2.0, 3.0, NAN], [8.0, 8.0, NAN]]), equal_nan=True)


def test_nothing_is_left_where_every_pair_is_lost():
    of_rows, of_draws = pair_means(torch.full((3, 2), NAN), torch.tensor([0, 0, 0]), 1)
    assert of_rows.isnan().all()
    assert of_draws.isnan().all()


def test_a_lost_text_draw_takes_no_image_query_with_it(monkeypatch):
    strategy, images, targets = tuner(**CROSSED)
    clean, texts = strategy.clean_pass(images, targets), strategy.network.module.texts
    encode = texts.encode

    def broken(prompts):
        found = encode(prompts).clone()
        found[2] = NAN
        return found

    monkeypatch.setattr(texts, "encode", broken)
    report = strategy.estimate(clean, table(strategy, [4, 4, 4], [4, 4, 4]), traces=True)
    assert (report.lost, report.silent_samples) == (1, 0)
    assert report.observation.queries.tolist() == [[4.0] * 3, [3.0] * 3]
    assert strategy.meter.sites["scores"].lost == 1
    assert all(g.isfinite().all() and g.any() for g in take_gradients(strategy))


class LosesClean:
    """Cross-entropy whose first answer has no number for one sample, as a service may."""

    def __init__(self, sample: int) -> None:
        self.sample, self.first = sample, True

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        losses = cross_entropy(output, target)
        if self.first:
            losses[self.sample], self.first = NAN, False
        return losses


@pytest.mark.parametrize("pairing", ["split", "crossed"])
def test_leave_one_out_does_not_need_the_clean_loss(pairing):
    found = []
    for loss in (cross_entropy, LosesClean(1)):
        network, images, targets = prompted(dim=5)
        specs = [{"stages": stages, "sigma": SIGMA, "queries_per_sample": 4} for stages in SPLIT]
        strategy = EvolutionStrategies(sites=specs, seed=0, pairing=pairing, **LOO)
        strategy.bind(network, cross_entropy)
        clean = strategy.clean_pass(images, targets)  # counts the costs
        strategy.draw = 0
        strategy.loss = loss
        clean = strategy.clean_pass(images, targets)
        report = strategy.estimate(clean, traces=True)
        assert clean.loss.isnan().tolist() == [False, loss is not cross_entropy, False]
        assert (report.lost, report.silent_samples) == (0, 0)
        found.append([*take_gradients(strategy), report.observation.trace])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_with_the_clean_loss_as_baseline_a_sample_without_it_is_silent():
    network, images, targets = prompted(dim=5)
    specs = [{"stages": stages, "sigma": SIGMA, "queries_per_sample": 4} for stages in SPLIT]
    strategy = EvolutionStrategies(sites=specs, seed=0)
    strategy.bind(network, LosesClean(1))
    with pytest.warns(RuntimeWarning, match="lost every query"):
        assert strategy.estimate(strategy.clean_pass(images, targets)).silent_samples == 2


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, CROSSED, {"kind": SPSA}])
def test_the_sharing_ratio_of_a_step_is_right_in_the_mean(settings):
    strategy, images, targets = tuner(**settings)
    found = []
    for _ in range(100):
        counts = table(strategy, [8, 12, 8], [24, 24, 24])
        clean = strategy.clean_pass(images, targets)
        found.append(strategy.estimate(clean, counts, traces=True).observation.sharing)
        take_gradients(strategy)
    expected = torch.stack([ratio(torch.stack(of)) for of in exact(strategy, images, targets)])
    error = torch.stack(found).std(0) / len(found) ** 0.5
    # A ratio of two estimates has a bias of the order of 1 / (queries of the step), which 10 % covers.
    assert bool(((torch.stack(found).mean(0) - expected).abs() < 4 * error + 0.1 * expected).all())
    assert bool((error < 0.2 * expected).all())


def ratio(gradients: Tensor) -> Tensor:
    return len(gradients) * gradients.mean(0).square().sum() / gradients.square().sum(1).mean()


def test_the_sharing_ratio_is_unknown_where_samples_have_no_estimate():
    strategy, images, targets = tuner()
    clean = strategy.clean_pass(images, targets)
    seen = strategy.estimate(clean, table(strategy, [8, 0, 8], [8, 8, 8]), traces=True).observation
    assert seen.sharing.isnan().tolist() == [True, False]


def test_queries_that_cannot_be_crossed_are_refused():
    spec = {"sigma": SIGMA, "queries_per_sample": 4}
    own = [{"stages": ["image_prompt"], **spec}, {"stages": ["scores"], "directions": "own", **spec}]
    for settings, message in (
        ({"pairing": "crossed"}, r"'crossed': compares queries .*variant: leave_one_out"),
        ({**CROSSED, "sites": JOINT}, "needs two sites, .* here are 1"),
        ({**CROSSED, "specs": own}, "draws that are made once for the batch"),
        ({**CROSSED, "update": "site_by_site"}, "moves both sites at once"),
        ({**CROSSED, "pilots": {"queries": 2, "sites": "lowest"}}, "does not cross pilots"),
        ({"pairing": "both", **LOO}, "pairing = 'both'"),
    ):
        with pytest.raises(SettingError, match=message):
            tuner(**settings)
    with pytest.raises(TypeError, match="pairing"):
        tuner(WeightForwardMode, pairing="crossed")
    strategy, images, targets = tuner(**CROSSED)
    clean = strategy.clean_pass(images, targets)
    with pytest.raises(SettingError, match="pairs the queries of both sites"):
        strategy.estimate(clean, sites=["scores"])
