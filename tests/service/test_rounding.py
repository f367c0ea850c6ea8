"""A scorer that rounds is found out by its answers to queries."""

import warnings

import pytest
import torch

from flops_lightning.service import LocalScorer
from flops_lightning.service.rounding import rounding_step, spread
from tests.service.test_network import SPLIT, batch, bound, local, remote

JOINT = [["scores"]]


def test_the_step_of_decimals_and_of_half_precision_is_found():
    values = torch.randn(200, generator=torch.Generator().manual_seed(0))
    assert rounding_step(values) == 0
    for decimals in (0, 1, 2, 3, 4):
        assert rounding_step(values.double().round(decimals=decimals).float()) == pytest.approx(10.0**-decimals)
    root = float(values.square().mean().sqrt())
    assert rounding_step(values.bfloat16().float()) == pytest.approx(2**-7 * root, rel=0.01)
    assert rounding_step(values.half().float()) == pytest.approx(2**-10 * root, rel=0.01)
    few = torch.tensor([1.0, 2.0, float("nan"), 0.0] * 7)  # 14 numbers that tell something
    assert rounding_step(few) == 0


def test_rows_of_the_same_image_are_compared():
    names = torch.tensor([[1], [2], [1], [2], [3]])
    values = torch.tensor([[1.0, 4.0], [10.0, 0.0], [3.0, 4.0], [10.0, 0.0], [99.0, 99.0]])
    assert spread(names, values) == pytest.approx((2.0 / 2 / 2) ** 0.5)  # 1 and 3: squares 2; 2 free rows of 2 values
    assert spread(names[3:], values[3:]) != spread(names[3:], values[3:])  # nan
    assert spread(None, values[:, 0]) == pytest.approx(float(values[:, 0].std()))


def rounding(decimals):
    scorer = local()

    class Rounds(LocalScorer):
        def _answers(self, kind, count, asked):
            return super()._answers(kind, count, asked).double().round(decimals=decimals).float()

    scorer.__class__ = Rounds
    return scorer


@pytest.mark.parametrize(
    ("answer", "sites", "decimals", "message"),
    [
        ("losses", JOINT, 2, r"answers to 'losses' are rounded to steps of 0.01, .* float32, or write a larger sigma"),
        ("logits", JOINT, 1, r"answers to 'logits' are rounded to steps of 0.1, "),
        ("features", SPLIT, 2, r"answers to '(image|text)' are .* float32, write pairing: crossed, or write a larger"),
    ],
)
def test_a_step_wider_than_queries_differ_is_warned_of_once(answer, sites, decimals, message):
    (images, labels), scorer = batch(), rounding(decimals)
    strategy = bound(remote(scorer, answer), sites, queries=8, sigma=1e-3)
    inputs = {"images": images, "labels": labels} if answer == "losses" else images
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a clean pass alone tells nothing
        clean = strategy.clean_pass(inputs, labels)
    with pytest.warns(RuntimeWarning, match=message) as told:
        strategy.estimate(clean)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strategy.estimate(strategy.clean_pass(inputs, labels))


@pytest.mark.parametrize(("decimals", "sigma"), [(2, 0.5), (6, 1e-3)])
def test_wide_noise_and_fine_answers_are_not_warned_of(decimals, sigma):
    (images, labels), scorer = batch(), rounding(decimals)
    strategy = bound(remote(scorer, "losses"), JOINT, queries=8, sigma=sigma)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        strategy.estimate(strategy.clean_pass({"images": images, "labels": labels}, labels))
