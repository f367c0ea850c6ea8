"""Estimates through either scorer: unbiased against autograd in every pairing, with the variance of the formulas."""

import pytest
import torch
from torch import Tensor

from flops_lightning.service import ClipAnswers, HttpScorer
from tests.reference.clip import NAMES, tiny_clip
from tests.reference.moments import COUNTS, MANY, PAIRED, VARIANTS, chi_square, formulas, trace
from tests.reference.networks import cross_entropy
from tests.reference.scoring_server import ScoringServer
from tests.service.test_network import SPLIT, batch, bound, in_process, local, remote, taken

ANSWERS = {"split": "features", "crossed": "features", "joint": "losses"}
CASES = [(*each, ANSWERS[each[0]]) for each in PAIRED] + [("joint", "baseline", "logits")]
SIDES = ("image_prompt.z", "text_prompt.z")


@pytest.fixture(scope="module", params=["local", "http"])
def scorer(request):
    if request.param == "local":
        yield local()
        return
    with ScoringServer(ClipAnswers(tiny_clip().float(), model="tiny", max_rows=128)) as server:
        made = HttpScorer(server.url, NAMES, connections=2, timeout=30.0, wait=0.001)
        yield made
        made.client.close()


def estimates(scorer, pairing: str, variant: str, answer: str, number: int, counts: Tensor):
    """``(number, d)`` estimates at the image and the text prompt, and each sample's gradients by autograd."""
    (images, labels), reference = batch(), in_process()
    losses = cross_entropy(reference.run(images), labels)
    z = [reference.trainable()[side] for side in SIDES]
    of_samples = [torch.autograd.grad(loss, z, retain_graph=True) for loss in losses]
    kind, settings = VARIANTS[variant]
    own = {**settings, "pairing": "crossed"} if pairing == "crossed" else settings
    network = remote(scorer, answer)
    sites = [["scores"]] if pairing == "joint" else SPLIT
    strategy = bound(network, sites, kind, sigma=5e-3, chunk_rows=128, **own)  # in float32 and nearly linear
    inputs = {"images": images, "labels": labels} if answer == "losses" else images
    lines: list[list[Tensor]] = [[], []]
    for _ in range(number):
        strategy.estimate(strategy.clean_pass(inputs, labels), counts[: len(sites)])
        found = taken(network)
        for line, side in zip(lines, SIDES, strict=True):
            line.append(found[side])
    return [torch.stack(each) for each in lines], [torch.stack(each) for each in zip(*of_samples, strict=True)]


@pytest.mark.parametrize(("pairing", "variant", "answer"), CASES)
def test_estimates_through_a_scorer_are_unbiased(scorer, pairing, variant, answer):
    lines, gradients = estimates(scorer, pairing, variant, answer, 12, 2 * COUNTS)
    # Ten coordinates of t^2 with 11 degrees of freedom: 1e-3 of such sums are above 50.
    assert chi_square(torch.cat(lines, 1), torch.cat([of.mean(0) for of in gradients])) < 50


@pytest.mark.statistical_heavy
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    ("pairing", "variant", "answer"),
    [("split", "leave_one_out", "features"), ("crossed", "antithetic", "features"), ("joint", "baseline", "losses")],
)
def test_the_variance_through_a_scorer_is_within_five_percent_of_the_formulas(scorer, pairing, variant, answer):
    lines, gradients = estimates(scorer, pairing, variant, answer, 2400, MANY)
    for line, expected in zip(lines, formulas(pairing, variant, MANY, *gradients), strict=True):
        found, error = trace(line)
        assert error < 0.03 * expected  # or the next line would fail by chance
        assert found == pytest.approx(expected, rel=0.05)
