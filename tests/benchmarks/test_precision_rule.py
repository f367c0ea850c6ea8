from __future__ import annotations

import warnings

import pytest
import torch

from benchmarks import precision_rule
from flops_lightning.strategies.precision import Resolution


@pytest.mark.parametrize(
    ("precision", "resolution"),
    [
        ("float32", Resolution.everything(torch.float32)),
        ("bfloat16", Resolution.products("bfloat16", torch.finfo(torch.bfloat16).eps)),
    ],
)
def test_the_width_that_the_warning_names_follows_the_exact_derivatives_and_a_fraction_of_it_does_not(
    precision, resolution
):
    build, size, queries = precision_rule.NETWORKS["digits"]
    network, batch = build(size, 0)
    pair = precision_rule.methods(0)["activations"]
    steps = [resolution.steps / 32, resolution.steps]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        (low, _), (named, _) = precision_rule.line(network, batch, queries, pair, precision=precision, steps=steps)
    assert low < 0.7
    assert named > 0.9


def test_the_table_has_a_line_for_each_precision(capsys):
    precision_rule.main(["--networks", "mlp20", "--methods", "parameters, factored", "--precisions", "float16"])
    header, _, line = capsys.readouterr().out.strip().split("\n")
    assert header.count("|") == line.count("|") == 3 + len(precision_rule.STEPS)
    assert line.startswith("| mlp20, parameters, factored | float16 | ")
