import argparse
import json
import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from experiments import gradient_fidelity
from experiments.components import Component, batch_gradients
from experiments.fidelity_allocation import ALLOCATORS, Allocators
from experiments.fidelity_tables import COLUMNS, better_and_worse, report
from experiments.predicted_cosine import likelihood_ratio_traces
from experiments.tables import read_csv
from flops_lightning.allocators import gain_optimal
from flops_lightning.network.staging import stage_network
from tests.reference.networks import cross_entropy

DIGITS = ["--config", "configs/vit_tiny_digits.yaml"]


@pytest.mark.slow
def test_tables_of_a_quick_study(tmp_path: Path) -> None:
    gradient_fidelity.main([*DIGITS, "--output", str(tmp_path), "--quick", "--at", "2,start"])
    rows = read_csv(tmp_path / "gradient_fidelity.csv")
    assert tuple(rows[0]) == COLUMNS
    kept = json.loads((tmp_path / "gradient_fidelity.json").read_text())
    assert [row["cosine"] for row in kept["rows"]] == pytest.approx([float(row["cosine"]) for row in rows], rel=1e-5)
    lr, factored, shared = 2 * len(ALLOCATORS), 2 + 2 + 3, 2  # with 4 queries two pairs are no pilots of SPSA
    assert len(rows) == 2 * 2 * (lr + factored + shared)
    assert {row["checkpoint"] for row in rows} == {"0", "2"}
    sizes = {"key": 64 * 64, "fc1": 64 * 128}
    for row in rows:
        assert (row["batches"], row["left_out"], row["noise"]) == ("2", "0", "tensor")
        if row["allocator"] == "equal":
            assert float(row["gain"]) == pytest.approx(1.0)
            assert math.isfinite(float(row["drawn_error"]))
        if row["estimator"] == "spsa":
            pairs = int(row["budget"]) / 2
            expected = math.sqrt(pairs / (pairs + sizes[row["component"]] + 1))
            assert float(row["cosine"]) == pytest.approx(expected, rel=1e-5)
    at_start, later = ([row["cosine"] for row in rows if row["checkpoint"] == step] for step in "02")
    assert at_start != later
    text = (tmp_path / "gradient_fidelity.md").read_text()
    assert text.startswith("The network of configs/vit_tiny_digits.yaml. Noise: tensor. Batches left out")
    if find_spec("matplotlib"):
        assert (tmp_path / "gradient_fidelity.png").read_bytes().startswith(b"\x89PNG")


def test_a_shape_says_that_its_weights_are_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(gradient_fidelity.NETWORKS, "vit_base", "vit_tiny_patch16_224")
    small = ["--layers", "1", "--batch", "1", "--batches", "1", "--budgets", "20", "--allocators", "equal"]
    gradient_fidelity.main(["--network", "vit_base", *small, "--output", str(tmp_path)])
    assert "vit_tiny_patch16_224 with RANDOM weights, normal noise for images" in capsys.readouterr().out
    rows = read_csv(tmp_path / "gradient_fidelity.csv")
    assert len(rows) == 6
    assert {row["cosine_low"] for row in rows} == {""}  # one batch has no interval


OPTIONS = {
    "layers": [1], "components": ["key", "fc1"], "budgets": [20], "estimators": ["lr"], "allocators": ["equal"],
    "noise": "tensor", "seed": 0, "draws": 0,
}  # fmt: skip


class Bar:
    def update(self) -> None:
        pass


def test_batches_without_a_gradient_are_left_out_and_counted(vit: nn.Module, images: tuple[Tensor, Tensor]) -> None:
    options, place = argparse.Namespace(**OPTIONS), (0, stage_network(vit), cross_entropy, [images, images])
    assert [row["left_out"] for row in gradient_fidelity.measure(place, options, Bar())] == [0, 0]
    nn.init.zeros_(vit.head.weight)  # nothing below it has a derivative
    rows = list(gradient_fidelity.measure(place, options, Bar()))
    assert [(row["batches"], row["left_out"], "cosine" in row) for row in rows] == 2 * [(0, 2, False)]
    assert "left out for a zero gradient: 4." in report(rows, "A network.")


def test_exact_traces_gain_what_theory_says_and_no_allocator_more(
    vit: nn.Module, images: tuple[Tensor, Tensor]
) -> None:
    key = Component(2, "key")
    found = batch_gradients(stage_network(vit), cross_entropy, images, [key], noise="module")
    spend = Allocators(ALLOCATORS, seed=0).spend
    spent = {
        each.allocator: each
        for each in spend(key, found, found.rows[key], "lr", [400], np.random.default_rng(0))
    }  # fmt: skip
    assert tuple(spent) == ALLOCATORS
    traces = likelihood_ratio_traces(found.rows[key])
    assert spent["equal"].objective == pytest.approx(float(traces.sum()) / 400)
    gains = {name: each.equal / each.objective for name, each in spent.items()}
    assert gains["exact"] == pytest.approx(float(gain_optimal(traces)), rel=1e-3)
    assert max(gains.values()) < 1.001 * gains["exact"]
    few = spend(key, found, found.rows[key], "spsa_factored", [4], np.random.default_rng(0))
    assert [each.allocator for each in few] == ["equal", "exact"]  # no pilots from two pairs
    shared = spend(key, found, found.rows[key], "spsa", [4], np.random.default_rng(0))
    assert [each.allocator for each in shared] == ["equal"]


def test_cells_count_as_better_only_where_many_tests_leave_them_so() -> None:
    clear, close = [1.0, 1.1, 0.9, 1.0], [0.3, 0.1, 0.2, 0.12]
    assert better_and_worse([clear, [-x for x in clear], [0.0] * 4, [1e-12, 0.0, 0.0, 0.0]]) == (1, 1)
    assert better_and_worse([close]) == (1, 0)  # p = 0.03 alone, but not among twenty
    noise = torch.randn(20, 4, generator=torch.Generator().manual_seed(0)).tolist()
    assert better_and_worse([close, *noise])[0] == 0
    assert better_and_worse([[1.0], [1.0]]) == (0, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "there is no network. Give one of the two."),
        ([*DIGITS, "--network", "vit_base"], "are two networks. Give one of the two."),
        ([*DIGITS, "--pretrained"], "--pretrained = True: belongs to --network."),
        (["--network", "vit_base", "--at", "start,5"], "--at = [0, 5]: goes with a configuration"),
        (["--network", "vit_base", "--", "--seed_everything=1"], "arguments after -- = ('--seed_everything=1',): goes"),
        ([*DIGITS, "--at", "soon"], "'soon' must be steps with commas, for example start,60,240."),
        ([*DIGITS, "--at", "241"], "--at = 241: the run has 240 steps."),
        ([*DIGITS, "--budgets", "5"], "--budgets = 5: is odd, and spsa spends its queries in pairs. Write 6"),
        ([*DIGITS, "--draws", "1"], "--draws = 1: has no standard error."),
        ([*DIGITS, "--sigma", "0"], "--sigma = 0.0: must be a number above 0."),
        ([*DIGITS, "--batch", "700"], "--batches = 4: batches of 700 need 2800 images, and there are 1257."),
        ([*DIGITS, "--layers", "7"], "--layers = 7: is not a layer of this network. Choose from 1 to 6."),
        ([*DIGITS, "--components", "gate"], "Choose from query, key, value, proj, fc1, fc2."),
    ],
)
def test_options_that_do_not_fit(
    given: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        gradient_fidelity.main(["--output", str(tmp_path), *given])
    assert message in capsys.readouterr().err
