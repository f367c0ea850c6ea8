"""Every pairing and variant is unbiased against autograd, with the variance of its formula, where the loss is linear.

Three images with different numbers of queries, text draws shared by all of them.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.prompts.test_estimates import JOINT, SPLIT, exact, table, take_gradients, tuner
from tests.reference.moments import COUNTS, MANY, PAIRED, VARIANTS, chi_square, formulas, trace


def estimates(pairing: str, variant: str, number: int, counts: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """``(number, d)`` estimates at the image and the text prompt, and each sample's gradients by autograd."""
    kind, settings = VARIANTS[variant]
    own: dict[str, Any] = {**settings, **({"pairing": "crossed"} if pairing == "crossed" else {})}
    strategy, images, targets = tuner(kind, JOINT if pairing == "joint" else SPLIT, chunk_rows=512, **own)
    lines: list[list[Tensor]] = [[], []]
    for _ in range(number):
        strategy.estimate(strategy.clean_pass(images, targets), table(strategy, *counts.tolist()))
        for line, gradient in zip(lines, take_gradients(strategy), strict=True):
            line.append(gradient)
    return [torch.stack(line) for line in lines], [torch.stack(of) for of in exact(strategy, images, targets)]


@pytest.mark.parametrize(("pairing", "variant"), PAIRED)
def test_estimates_are_unbiased_with_the_variance_of_the_formulas(pairing, variant):
    lines, gradients = estimates(pairing, variant, 40, COUNTS)
    # Ten coordinates of t^2 with 39 degrees of freedom: 1e-3 of such sums are above 34.
    assert chi_square(torch.cat(lines, 1), torch.cat([of.mean(0) for of in gradients])) < 34
    for line, expected in zip(lines, formulas(pairing, variant, COUNTS, *gradients), strict=True):
        found, error = trace(line)
        assert error < 0.25 * expected
        assert abs(found - expected) < 4 * error


@pytest.mark.statistical_heavy
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("pairing", "variant"), PAIRED)
def test_the_variance_is_within_five_percent_of_the_formulas(pairing, variant):
    counts = 2 * MANY if variant == "antithetic" else MANY  # as many pairs
    lines, gradients = estimates(pairing, variant, 1600, counts)
    for line, expected in zip(lines, formulas(pairing, variant, counts, *gradients), strict=True):
        found, error = trace(line)
        assert error < 0.03 * expected  # or the next line would fail by chance
        assert found == pytest.approx(expected, rel=0.05)
