"""The study of prompts, in small: what is there is not made again, and the tables say what was measured."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("open_clip", reason="prompts are for its models")

from experiments import prompts
from experiments.prompt_problem import JointWithSharedText, descend, losses, query_step, rounded
from tests.prompts.test_estimates import DIM, JOINT, drawn, exact, expected_estimate, table, take_gradients, tuner


def test_a_result_that_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    made = []

    def table(make: Any, name: str) -> dict[str, float]:
        made.append((name, make().seed))
        return {"loss": {"lr": 1.0, "bp": 0.5}[name] + make().seed}

    class Asked:
        def __init__(self, clip: Path, root: str, seed: int) -> None:
            self.seed = seed

    monkeypatch.setattr(prompts, "Problem", Asked)
    monkeypatch.setitem(prompts.TABLES, "text", (table, ("lr", "bp")))
    given = ["text", "--clip", "c", "--root", "r", "--output", str(tmp_path), "--seeds"]
    prompts.main([*given, "1"])
    prompts.main([*given, "1", "3"])
    assert made == [("lr", 1), ("bp", 1), ("lr", 3), ("bp", 3)]
    assert len(list(map(json.loads, (tmp_path / "text.jsonl").read_text().splitlines()))) == 4
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert ["bp", "2", "2.500 ± 12.706", "-0.500 ± 0.000"] in lines


def test_losses_of_a_service_have_two_decimals() -> None:
    logits, labels = torch.randn(50, 3), torch.arange(50) % 3
    found = rounded(logits, labels)
    torch.testing.assert_close(found * 100, (found * 100).round())
    assert float((found - losses(logits, labels)).abs().max()) <= 0.005 + 1e-6


def test_a_step_by_queries_goes_down() -> None:
    """On a problem whose gradient is known: one number, the loss its square."""

    class One:
        train, labels = torch.ones(4, 1), torch.zeros(4)
        prompts = (torch.nn.Parameter(torch.tensor([3.0])),)

    class Exact:
        def clean_pass(self, x: Any, y: Any) -> Any:
            return x

        def estimate(self, clean: Any, counts: Any, traces: bool) -> Any:
            (z,) = One.prompts
            z.grad = 2 * z.detach()
            return type("Estimate", (), {"observation": None})

    descend(One(), query_step(One(), Exact()), [torch.arange(4)] * 40)  # type: ignore[arg-type]
    assert abs(float(One.prompts[0].detach())) < 0.5


def test_joint_queries_with_shared_text_draws_move_images_by_their_own() -> None:
    strategy, images, targets = tuner(JointWithSharedText, JOINT, chunk_rows=4)
    counts = [4, 2, 3]
    strategy.estimate(strategy.clean_pass(images, targets), table(strategy, counts))
    image, text = (torch.stack(each) for each in exact(strategy, images, targets))
    (site,) = strategy.sites
    own = [[drawn(strategy, site.name, b, q, 2 * DIM) for q in range(n)] for b, n in enumerate(counts)]
    rows = [[torch.cat([own[0][q][:DIM], v[DIM:]]) for q, v in enumerate(of_sample)] for of_sample in own]
    expected = expected_estimate(torch.cat([text, image], 1), rows, "baseline")
    torch.testing.assert_close(torch.cat(take_gradients(strategy)[::-1]), expected, rtol=1e-3, atol=1e-5)
