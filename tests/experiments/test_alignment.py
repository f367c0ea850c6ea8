"""The study of alignment, in small: what is there is not made again, and what is measured is what the table says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="language models need the extra llm")

from experiments import alignment
from experiments.alignment_problem import Photos, Problem
from flops_lightning.language import CaptionLoss
from flops_lightning.suffix_loss import PaddedTargets
from flops_lightning.tasks.adapters import make_adapter
from tests.reference.language import WIDTH, caption_ids, tiny_llama


def test_a_result_that_is_there_is_not_made_again_and_pairs_are_by_photo(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    made = []

    def table(problem: Any, name: str) -> Any:
        made.append((name, problem.seed))
        own = {"prompt": [1.0, 3.0], "bp": [0.5, 2.7]}[name]
        return {"loss": sum(own) / 2, "accuracy": {"prompt": 0.1, "bp": 0.4}[name]}, own

    monkeypatch.setitem(alignment.TABLES, "sees", (table, ("prompt", "bp")))
    given = ["sees", "--llm", "l", "--encoder", "e", "--root", "r", "--output", str(tmp_path), "--seeds"]
    alignment.main([*given, "1"])
    alignment.main([*given, "1", "3"])
    assert made == [("prompt", 1), ("bp", 1), ("prompt", 3), ("bp", 3)]
    assert [json.loads(line)["losses"] for line in (tmp_path / "sees.jsonl").read_text().splitlines()][1] == [0.5, 2.7]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    # Over two photos, -0.5 and -0.3: the t quantile is 12.7, and the standard error 0.1.
    assert ["bp", "2", "1.600 ± 0.000", "0.400 ± 0.000", "1.000 ± 0.000", "-0.400 ± 1.271"] in lines
    with pytest.raises(SystemExit):
        alignment.main(["photos", *given[1:-1]])


def some_photos() -> Photos:
    features = torch.arange(6.0)[:, None].expand(6, 5).clone()
    return Photos(features, caption_ids(3, 4, 2, 5, 3, 3), torch.tensor([0, 1, 2, 3, 3, 7]))


def test_shuffled_photos_keep_captions_and_get_another_photo() -> None:
    photos = some_photos()
    other = photos.shuffled(0)
    assert other.captions is photos.captions
    own = {int(p): float(photos.features[photos.photo == p][0, 0]) for p in photos.photo}
    got = [float(row[0]) for row in other.features]
    assert all(got[i] != own[int(p)] for i, p in enumerate(photos.photo))
    assert got[3] == got[4]  # captions of one photo
    assert {got[i] for i in (0, 1, 2, 3, 5)} == set(own.values())


def problem(monkeypatch: Any) -> Problem:
    made = Problem("", "", "", Path(), seed=1)
    made.__dict__["loss"] = CaptionLoss(tiny_llama().float(), visual_tokens=4)
    train = Photos(torch.nn.functional.normalize(torch.randn(8, 5), dim=1), caption_ids(*[4] * 8), torch.arange(8))
    monkeypatch.setattr(Problem, "part", lambda self, name: train)
    return made


def test_every_method_lowers_the_loss(monkeypatch: Any) -> None:
    made = problem(monkeypatch)
    train = made.part("train")
    for method in ("bp", "lr", "ops", "prompt"):
        adapter, ratios = made.adapter(), []
        start = float(made.loss(adapter(train.features), train.captions).mean())
        exact = method in ("bp", "prompt")
        step = (
            made.backprop_step(adapter)
            if exact
            else made.query_step(adapter, 20, allocated=method == "ops", ratios=ratios)
        )
        made.train(adapter, step, steps=20, lr=0.01, bias=10.0, images=method != "prompt")
        assert float(made.loss(adapter(train.features), train.captions).mean()) < start - 0.5, method
        assert bool(adapter.get_parameter("adapter.0.weight").any()) is (method != "prompt")
        assert len(ratios) == 2 * (method == "ops")


def test_backprop_alone_keeps_what_the_language_model_computes(monkeypatch: Any) -> None:
    made = problem(monkeypatch)
    monkeypatch.setattr(alignment, "BATCH", 8)
    found = {name: alignment.costs(made, name)[0] for name in ("inference", "bp", "lr 2")}
    assert found["bp"]["MiB"] > 2.5 * found["inference"]["MiB"]
    assert found["lr 2"]["MiB"] < 2 * found["inference"]["MiB"]


def test_a_ratio_of_variances_is_1_for_equal_counts_and_least_for_neyman(monkeypatch: Any) -> None:
    made = problem(monkeypatch)
    train = made.part("train")
    vectors = torch.randn(8, 4 * WIDTH)
    equal = made._ratio(vectors.clone(), train.captions, torch.full((8,), 10))
    assert equal["J / J equal"] == pytest.approx(1.0)
    z = vectors.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(made.loss(z, train.captions).sum(), z)
    norms = gradient.norm(dim=1)
    best = made._ratio(vectors.clone(), train.captions, 1000 * norms / norms.sum())
    assert best["J / J equal"] == pytest.approx(best["at best"], rel=1e-4)
    assert best["at best"] < 0.999


def test_the_own_caption_is_the_likeliest_where_its_loss_is_least(monkeypatch: Any) -> None:
    made = problem(monkeypatch)
    classes = caption_ids(3, 5, seed=7)
    index = torch.tensor([0, 1, 1, 0])
    photos = Photos(torch.randn(4, 5), classes.take(index), torch.arange(4))
    monkeypatch.setattr(Problem, "class_captions", classes)
    found = made.held_out(adapter := make_adapter("linear", 5, WIDTH, visual_tokens=4).requires_grad_(False), photos)
    for row, c, right in zip(photos.features, index.tolist(), found["right"].tolist(), strict=True):
        totals = [
            float(made.loss(adapter(row[None]), PaddedTargets(v[None, :n], np.array([n])))) * n
            for v, n in zip(classes.values, classes.lengths.tolist(), strict=True)
        ]
        assert right == float(totals[c] == min(totals))
    assert not torch.equal(found["loss"], found["shuffled"])
