"""Prompts whose rows run elsewhere: the same estimates as in one process, what they cost, and what is lost."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy as mean_cross_entropy

from flops_lightning.errors import SettingError, SpentQueriesError
from flops_lightning.meter import CLEAN
from flops_lightning.prompts import ClassTexts, IntrinsicPrompt, PromptSpec, image_start, stage_clip, text_start
from flops_lightning.queries import plan_rows
from flops_lightning.service import (
    ClipAnswers,
    HttpScorer,
    LocalScorer,
    service_image_start,
    service_text_start,
    stage_service,
)
from flops_lightning.strategies import SPSA, Backprop, EvolutionStrategies, LikelihoodRatio, WeightForwardMode
from tests.reference.clip import NAMES, tiny_clip
from tests.reference.networks import cross_entropy
from tests.reference.scoring_server import ScoringServer

DIM, SIGMA = 5, 0.02
SPLIT = [["image_prompt"], ["scores"]]
SPECS = {"text_prompt": PromptSpec(tokens=4, dim=DIM), "image_prompt": PromptSpec(tokens=2, dim=DIM, seed=1)}


def batch(size=3):
    images = torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return images, torch.tensor([0, 1, 3, 2, 0, 1])[:size]


@pytest.fixture(scope="module")
def server():
    with ScoringServer() as running:
        yield running


def local(**settings):
    clip = tiny_clip().float()
    return LocalScorer(clip, ClassTexts(clip, NAMES), **settings)


@pytest.fixture(params=["local", "http"])
def scorer(request, server):
    if request.param == "local":
        yield local()
    else:
        made = HttpScorer(server.url, NAMES, connections=4, max_rows=5, timeout=10.0, wait=0.001)
        yield made
        made.client.close()


def moved(prompts):
    """Prompts that have left their start."""
    for prompt in prompts.values():
        torch.nn.init.normal_(prompt.z, generator=torch.Generator().manual_seed(2))
    return prompts


def remote(scorer, answer="features", text=True, image=True):
    starts = {"text_prompt": lambda spec: service_text_start(scorer, spec)} if text else {}
    starts |= {"image_prompt": lambda spec: service_image_start(scorer, batch()[0], spec)} if image else {}
    return stage_service(scorer, answer=answer, **moved({name: make(SPECS[name]) for name, make in starts.items()}))


def in_process(text=True, image=True):
    """The same network without a scorer."""
    clip = tiny_clip().float()
    texts = ClassTexts(clip, NAMES)
    starts = {"text_prompt": text_start(texts, SPECS["text_prompt"])} if text else {}
    starts |= {"image_prompt": image_start(clip, batch()[0], SPECS["image_prompt"])} if image else {}
    return stage_clip(clip, texts, **moved(starts))


def loss_of(outputs, targets):
    return outputs[:, 0] if outputs.shape[1] == 1 else cross_entropy(outputs, targets)


def bound(network, sites=SPLIT, kind=EvolutionStrategies, queries=4, sigma=SIGMA, **settings):
    specs = [{"stages": stages, "sigma": sigma, "queries_per_sample": queries} for stages in sites]
    strategy = kind(sites=specs, seed=0, **settings)
    strategy.bind(network, loss_of)
    return strategy


def taken(network):
    found = {}
    for name, parameter in network.trainable().items():
        found[name], parameter.grad = parameter.grad, None
    return found


def estimated(network, inputs=None, counts=None, **settings):
    images, labels = batch()
    strategy = bound(network, **settings)
    inputs = images if inputs is None else inputs
    estimate = strategy.estimate(strategy.clean_pass(inputs, labels), counts)
    return taken(network), estimate, strategy


@pytest.mark.parametrize("kind", [EvolutionStrategies, SPSA])
def test_split_estimates_are_those_of_one_process(scorer, kind):
    counts = torch.tensor([[4, 0, 8], [4, 4, 4]])
    found, _, strategy = estimated(remote(scorer), counts=counts, kind=kind)
    expected, _, reference = estimated(in_process(), counts=counts, kind=kind)
    assert [site.directions for site in strategy.sites] == [site.directions for site in reference.sites]
    assert [site.per_batch for site in strategy.sites] == [False, True]
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("answer", ["losses", "logits"])
def test_joint_estimates_move_both_prompts_of_a_row(scorer, answer):
    images, labels = batch()
    network = remote(scorer, answer)
    assert [stage.name for stage in network.stages] == ["images", "scores", "answer"]
    inputs = {"images": images, "labels": labels} if answer == "losses" else images
    counts = torch.tensor([4, 0, 8])
    found, _, strategy = estimated(network, inputs, counts, sites=[["scores"]])
    reference = in_process()
    reference_strategy = bound(reference, [["image_prompt", "scores"]])
    z = {name: p.detach().clone() for name, p in reference.trainable().items()}
    expected = {name: torch.zeros(DIM) for name in z}
    (site,) = strategy.sites
    assert site.directions == "own"
    layout = strategy.engine.layouts(site)
    plan, clean = plan_rows(counts.numpy(), 256), reference_strategy.clean_pass(images, labels)
    (chunk,) = plan
    directions = layout._directions(site, clean, chunk, torch.from_numpy(chunk.samples), {})
    for row, sample in enumerate(plan.samples):
        with torch.no_grad():
            for name, p in reference.trainable().items():
                p.copy_(z[name] + SIGMA * directions[name].weight[row])
            value = cross_entropy(reference.run(images[sample : sample + 1]), labels[sample : sample + 1])[0]
        for name in z:
            weight = (value - clean.loss[sample]) / SIGMA / int(counts[sample]) / 3
            expected[name] += weight * directions[name].weight[row]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-3)


def test_a_split_step_asks_for_m_plus_1_texts_and_b_plus_sum_k_images(scorer):
    network = remote(scorer)
    strategy, (images, labels) = bound(network, chunk_rows=5), batch()
    before = copy.copy(scorer.usage)
    clean = strategy.clean_pass(images, labels)  # counts the costs too, at no expense
    assert (scorer.usage.rows - before.rows, scorer.usage.text_passes - before.text_passes) == (3 + 1, 1)
    strategy.sample_statistics(clean, ("predictors.head_gradient", "counted_costs"))
    # 13 rows in three chunks of 5: the two that fill up the last one are not paid.
    strategy.estimate(clean, torch.tensor([[4, 0, 9], [5, 5, 5]]))
    assert scorer.usage.rows - before.rows == 3 + 1 + 13 + 5
    assert scorer.usage.text_passes - before.text_passes == 1 + 5
    strategy.clean_pass(images, labels)  # the text prompt is the same
    assert scorer.usage.rows - before.rows == 22 + 3


def test_costs_are_those_that_the_service_tells(scorer):
    strategy, (images, labels) = bound(remote(scorer)), batch()
    clean = strategy.clean_pass(images, labels)
    image, text = strategy.sample_statistics(clean, ("counted_costs",)).counted_costs.tolist()
    info = scorer.info
    assert image == pytest.approx(1.0)
    assert text == pytest.approx(4 * info.class_flops / info.image_flops / 3)
    assert strategy.meter.sites[CLEAN].forward_equivalents == pytest.approx(3 + 3 * text)


def test_without_an_image_prompt_each_image_is_encoded_once(scorer):
    network, (images, labels) = remote(scorer, image=False), batch()
    strategy = bound(network, [["scores"]])
    rows = scorer.usage.rows
    for _ in range(3):
        strategy.estimate(strategy.clean_pass(images, labels))
    assert scorer.usage.rows - rows == 3 + 1 + 3 * 4  # the prompt does not move in between
    expected, _, _ = estimated(in_process(image=False), sites=[["scores"]])
    found, _, _ = estimated(remote(scorer, image=False), sites=[["scores"]])
    torch.testing.assert_close(found["text_prompt.z"], expected["text_prompt.z"], rtol=2e-3, atol=2e-4)


@torch.no_grad()
def test_without_a_text_prompt_the_texts_are_encoded_once(scorer):
    network, (images, labels) = remote(scorer, text=False), batch()
    strategy = bound(network, [["image_prompt"]])
    texts = scorer.usage.text_passes
    for _ in range(3):
        strategy.estimate(strategy.clean_pass(images, labels))
    assert scorer.usage.text_passes - texts == 1
    reference = in_process(text=False)
    torch.testing.assert_close(network.run(images), reference.run(images), rtol=1e-2, atol=0.02)  # of W: n - 1 or n


def test_starts_are_those_of_the_model(scorer):
    clip, images = tiny_clip().float(), batch()[0]
    expected = (
        text_start(ClassTexts(clip, NAMES), SPECS["text_prompt"]),
        image_start(clip, images, SPECS["image_prompt"]),
    )
    found = (
        service_text_start(scorer, SPECS["text_prompt"]),
        service_image_start(scorer, images, SPECS["image_prompt"]),
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.start, b.start, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.directions, b.directions, rtol=1e-2, atol=1e-3)  # of 3 images: n - 1 or n
    assert not service_image_start(scorer, images, PromptSpec(tokens=2, dim=3, init="zeros")).start.any()


def test_a_lost_text_draw_is_lost_for_all_samples_and_counts_once(server):
    scorer = HttpScorer(server.url, NAMES, timeout=10.0, wait=0.001, attempts=1, max_rows=1)
    network = remote(scorer)
    keep = lambda key: "scores" in key and key.split("-")[4] == "2"  # noqa: E731
    whole, _, _ = estimated(network)
    server.fault = lambda key, attempt: (503, {}, b"") if keep(key) else None
    try:
        with pytest.warns(RuntimeWarning, match=r"1 of 4 requests"):
            rest, report, strategy = estimated(network)
    finally:
        server.fault = lambda key, attempt: None
    assert (report.lost, report.queries) == (1, 16)
    assert strategy.meter.sites["scores"].lost == 1
    assert torch.equal(whole["image_prompt.z"], rest["image_prompt.z"])
    assert not torch.allclose(whole["text_prompt.z"], rest["text_prompt.z"])
    scorer.client.close()


def test_a_lost_image_draw_takes_its_antithetic_partner_along_and_no_other(server):
    scorer = HttpScorer(server.url, NAMES, timeout=10.0, wait=0.001, attempts=1, max_rows=1)
    lost = lambda key: "image_prompt" in key and key.split("-")[4] == "2"  # noqa: E731
    server.fault = lambda key, attempt: (503, {}, b"") if lost(key) else None
    try:
        with pytest.warns(RuntimeWarning, match=r"1 of 12 requests"):
            _, report, _ = estimated(remote(scorer), kind=SPSA)
    finally:
        server.fault = lambda key, attempt: None
    assert (report.lost, report.silent_samples) == (2, 0)
    scorer.client.close()


def test_a_lost_clean_image_makes_its_sample_silent_and_lost_texts_are_encoded_anew(server):
    scorer = HttpScorer(server.url, NAMES, timeout=10.0, wait=0.001, attempts=1, max_rows=1)
    network, (images, labels) = remote(scorer), batch()
    strategy = bound(network)
    try:
        server.fault = lambda key, attempt: (503, {}, b"") if "-clean-0-1-" in key else None
        with pytest.warns(RuntimeWarning, match=r"given up after 2 attempts"):
            clean = strategy.clean_pass(images, labels)
        assert clean.loss.isfinite().tolist() == [True, False, True]
        server.fault = lambda key, attempt: (503, {}, b"") if "-clean-0-3-" in key else None  # the texts
        network.module.text_prompt.z.data.add_(0.1)
        torch.autograd.graph.increment_version(network.module.text_prompt.z)
        with pytest.warns(RuntimeWarning):
            assert strategy.clean_pass(images, labels).loss.isnan().all()
    finally:
        server.fault = lambda key, attempt: None
    assert strategy.clean_pass(images, labels).loss.isfinite().all()
    scorer.client.close()


@torch.no_grad()
def test_a_server_that_has_lost_everything_is_told_again(server):
    scorer = HttpScorer(server.url, NAMES, timeout=10.0, wait=0.001)
    network, (images, _) = remote(scorer), batch()
    first = network.run(images)
    handed = sum(request["kind"] in ("images", "classes") for request in server.requests)
    server.answers = ClipAnswers(tiny_clip().float(), model="tiny", max_rows=16)
    network.module.stages[2].run.forget()
    rows = scorer.usage.rows
    assert torch.equal(network.run(images), first)
    assert scorer.usage.rows - rows == 3 + 1
    assert handed == 0  # only answers with rows are counted there
    scorer.client.close()


def test_images_that_are_no_longer_kept_are_missed_with_the_setting_to_raise(server):
    scorer = HttpScorer(server.url, NAMES, timeout=10.0, images_mb=1)
    many = torch.randn(1400, 3, 8, 8, generator=torch.Generator().manual_seed(8))  # 1.03 MiB, and always all of a batch
    first = scorer.keep(many)[:2]
    assert len(scorer.images) == 1400
    scorer.keep(many[:10] + 1)
    assert len(scorer.images) < 1400
    with pytest.raises(SettingError, match=r"service.images_mb = 1: does not hold the 13\d\d images of a step"):
        scorer.encode_image(first, None)
    scorer.client.close()


def test_nothing_is_asked_beyond_max_queries(scorer):
    network, (images, labels) = remote(scorer), batch()
    strategy = bound(network)
    scorer.max_queries = scorer.usage.rows + 4
    clean, calls = strategy.clean_pass(images, labels), scorer.usage.calls
    with pytest.raises(SpentQueriesError, match=r"max_queries = \d+: \d+ are spent and the next step takes 12\.$"):
        strategy.estimate(clean)
    assert scorer.usage.calls == calls
    assert pickle.loads(pickle.dumps(SpentQueriesError(1, 2, 3))).args == SpentQueriesError(1, 2, 3).args


@pytest.mark.parametrize("kind", [Backprop, LikelihoodRatio, WeightForwardMode])
def test_strategies_that_need_derivatives_are_refused(scorer, kind):
    network, (images, labels) = remote(scorer), batch()
    strategy = Backprop() if kind is Backprop else kind(sites=[{"stages": s} for s in SPLIT], seed=0)
    strategy.bind(network, loss_of)
    with pytest.raises(SettingError, match=r"returns only numbers.*Use EvolutionStrategies or SPSA"):
        strategy.estimate(strategy.clean_pass(images, labels))


@torch.no_grad()
def test_copies_ask_the_same_scorer_and_keep_their_own_prompts(scorer):
    network, (images, _) = remote(scorer), batch()
    expected = network.run(images)
    copied = copy.deepcopy(network)
    assert copied.module.scorer is scorer
    network.module.text_prompt.z.data.add_(1.0)
    torch.testing.assert_close(copied.run(images), expected)
    if isinstance(scorer, HttpScorer):
        again = pickle.loads(pickle.dumps(network))
        assert not torch.allclose(again.run(images), expected)
        assert again.module.scorer.usage is again.module.scorer.client.usage
        again.module.scorer.client.close()


def test_what_cannot_be_put_together_is_refused():
    scorer, spec = local(answers=("losses",)), SPECS["text_prompt"]
    prompt = service_text_start(scorer, spec)
    with pytest.raises(SettingError, match=r"answer = 'features': is not among .* losses. Write pairing: joint"):
        stage_service(scorer, text_prompt=prompt)
    with pytest.raises(SettingError, match=r"nothing would be trained"):
        stage_service(scorer)
    with pytest.raises(SettingError, match=r"image_prompt = .*another width than the service's tower, 16"):
        stage_service(local(), image_prompt=text_start_of_width(4))
    network = stage_service(scorer, text_prompt=prompt, answer="losses")
    with pytest.raises(SettingError, match=r"must be mappings of `images` and `labels`"):
        network.run(batch()[0])
    with pytest.raises(SettingError, match=r"data = \(3, 3, 4, 4\).*Resize them"):
        stage_service(local(), text_prompt=prompt).run(torch.zeros(3, 3, 4, 4))


def text_start_of_width(width):
    return IntrinsicPrompt(torch.zeros(2, width), PromptSpec(2, 5), std=1.0)


QUESTIONS = {
    "features of texts": lambda each, names, text, image, labels: each.encode_text(text),
    "features of images": lambda each, names, text, image, labels: each.encode_image(names, image),
    "plain images": lambda each, names, text, image, labels: each.encode_image(names, None),
    "logits": lambda each, names, text, image, labels: each.logits(names, text, image),
    "one text for all": lambda each, names, text, image, labels: each.logits(names, text[:1], image),
    "losses": lambda each, names, text, image, labels: each.losses(names, labels, text, image),
    "losses at the template": lambda each, names, text, image, labels: each.losses(names, labels, None, image),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_answers_are_in_order_and_those_of_the_model(server, question):
    scorer, reference = HttpScorer(server.url, NAMES, max_rows=3, connections=8, timeout=10.0), local()
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(20, 3, 8, 8, generator=generator)
    text, image = torch.randn(20, 4, 16, generator=generator), torch.randn(20, 2, 16, generator=generator)
    given = (scorer.keep(images), text, image, torch.arange(20) % 4)
    assert torch.equal(given[0], reference.keep(images))
    found, expected = (QUESTIONS[question](each, *given) for each in (scorer, reference))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert scorer.usage.rows == reference.usage.rows == 20
    scorer.client.close()


def test_losses_are_cross_entropies():
    scorer, (images, labels) = local(), batch()
    names = scorer.keep(images)
    prompts = torch.randn(3, 4, 16), torch.randn(3, 2, 16)
    expected = mean_cross_entropy(scorer.logits(names, *prompts), labels, reduction="none")
    torch.testing.assert_close(scorer.losses(names, labels, *prompts), expected)
    assert np.isclose(float(scorer.info.logit_scale), 1 / 0.07)
