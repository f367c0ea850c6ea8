import argparse
import math

import pytest
import torch

from benchmarks import language
from benchmarks.harness import CPU
from flops_lightning.strategies import Backprop

OPTIONS = argparse.Namespace(batch=4, queries=6, chunk_rows=8, device=CPU, dtype="float32", rounds=1)


def problem() -> language.Problem:
    pytest.importorskip("transformers")
    return language.Problem.of("0.3M", batch=4, queries=6, chunk_rows=8, device=CPU, dtype=torch.float32)


def test_inference_runs_the_rows_of_the_step_in_its_chunks():
    made = problem()
    shapes = []
    forward = made.loss.llm.forward
    made.loss.llm.forward = lambda **given: shapes.append(tuple(given["inputs_embeds"].shape[:2])) or forward(**given)
    made.infer(made.rows(language.np.full(4, 6)))
    assert shapes == [(8, 13), (8, 18), (8, 24)]
    made.step(made.likelihood_ratio())
    assert [shape for shape in shapes[3:] if shape[0] > 1][-3:] == shapes[:3]


def test_tensors_of_a_step_are_those_of_inference():
    pytest.importorskip("transformers")
    inference, step, backprop = (language.tensors(name, "0.3M", OPTIONS) for name in language.PEAKS[:3])
    assert step < 1.05 * inference  # noise and sums have the width of the model, logits that of the vocabulary
    assert backprop > 1.5 * inference


def test_checkpointed_backprop_has_the_gradient_of_backprop():
    made, gradients = problem(), []
    strategy = made.bound(Backprop())
    made.step(strategy)
    gradients.append(made.adapter[0].weight.grad)
    with made.checkpointed():
        made.step(strategy)
    gradients.append(made.adapter[0].weight.grad)
    torch.testing.assert_close(*gradients)
    assert not made.loss.llm.training


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_times_are_ratios_of_the_step():
    pytest.importorskip("transformers")
    record = language.measure("0.3M", OPTIONS)
    assert record["parameters"] == pytest.approx(0.31, abs=0.01)
    assert 0 < record["of_queries"].median < 1.5
    assert record["over_backprop"].median > 1
    assert math.isfinite(language.allocation("0.3M", OPTIONS)["allocated"].median)
