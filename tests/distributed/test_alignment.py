"""Two processes that start at once encode photos once, and learn what the same ranks learn one after the other.

So they do where a service scores the captions, which dies in between and comes back.
"""

import threading
import time
from typing import Any

import pytest
import torch

from flops_lightning.datamodules.loading import GlobalBatches, KeyedBatches
from flops_lightning.language import CaptionAnswers
from flops_lightning.optim.optimizers import build_optimizer
from flops_lightning.strategies import LikelihoodRatio, SiteSpec
from tests.aligned import captions, llm_folder, photo_folder
from tests.distributed.alignment_worker import BATCH, HELD_OUT, LIMIT, QUERIES, STEP, STEPS, learner
from tests.processes import run_module
from tests.reference.scoring_server import ScoringServer

RANKS = 2


def batches_of(data: Any, rank: int) -> list[Any]:
    """The batches of a rank in two epochs."""
    images = KeyedBatches(data.train_set, seed=0, mixing=data.mixing, collate=data.collate)
    sampler = GlobalBatches(images, batch_size=BATCH, world_size=RANKS, rank=rank, seed=0)
    found = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        found += [images.__getitems__(keys[i : i + BATCH // RANKS]) for i in range(0, len(keys), BATCH // RANKS)]
    return found[:STEPS]


def simulate(llm: str, photos: Any) -> tuple[dict[str, torch.Tensor], float]:
    task, data = learner(llm), captions(photos, image_size=8, normalization="inception")
    data.tokenizer = task
    data.setup("fit")
    data.keep_features("fit", task.features_of, encoder="", feature="")
    ranks = [batches_of(data, rank) for rank in range(RANKS)]
    with torch.no_grad():
        sigma = 0.1 * float(torch.cat([task(task.split(batches[0])[0]) for batches in ranks]).square().mean().sqrt())
    strategies = [LikelihoodRatio(sites=[SiteSpec(["adapter"], name="adapter", sigma=sigma)], seed=0) for _ in ranks]
    for rank, strategy in enumerate(strategies):
        strategy.bind(task.network, task.loss)
        strategy.rank = rank
    optimizer = build_optimizer(task.adapter, task.optimizer_settings)
    for step in range(STEPS):
        gradients = []
        for strategy, batches in zip(strategies, ranks, strict=True):
            optimizer.zero_grad()
            strategy.estimate(strategy.clean_pass(*task.split(batches[step])))
            gradients.append([p.grad.clone() for p in task.adapter.parameters()])
        for parameter, *own in zip(task.adapter.parameters(), *gradients, strict=True):
            parameter.grad = torch.stack(own).mean(0)
        optimizer.step()
    return task.adapter.state_dict(), sigma


def dies_once(server: ScoringServer, after: int) -> None:
    """Kill the server at a request, and start it again."""

    def restart() -> None:
        server.stop()
        time.sleep(0.5)
        server.start()

    def fault(key: str, attempt: int) -> None:
        if server.received == after:
            threading.Thread(target=restart).start()

    server.fault = fault


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_equal_the_same_ranks_one_after_the_other(tmp_path):
    llm, photos = llm_folder(tmp_path / "llm"), photo_folder(tmp_path / "photos")
    answers = CaptionAnswers(learner(llm).loss, model="words", max_rows=64)
    with ScoringServer(answers) as server:
        dies_once(server, after=60)  # within the steps of the second part
        run_module(
            RANKS, "tests.distributed.alignment_worker", str(RANKS), str(tmp_path), server.url, seconds=500
        )  # fmt: skip
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(RANKS)]
    assert sorted(rank["encoded"] for rank in found) == [0, 18]  # 12 to learn from and 6 to validate with
    expected, sigma = simulate(llm, photos)
    for rank in found:
        assert rank["sigma"] == pytest.approx(sigma, rel=1e-6)
        for name, value in expected.items():
            torch.testing.assert_close(rank["adapter"][name], value, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(rank["later"]["adapter"][name], value, rtol=1e-3, atol=1e-5)
        part, later = rank["part"], rank["later"]
        assert (
            f"max_queries = {LIMIT}: {2 * STEP} are spent and the next step takes {STEP + HELD_OUT}" in part["stopped"]
        )
        assert (part["steps"], later["steps"], later["stopped"]) == (2, STEPS, "")
        assert (later["queries"], later["lost"], later["usage"]["failed"]) == (STEPS * BATCH // RANKS * QUERIES, 0, 0)
    assert all(torch.equal(found[0]["adapter"][name], found[1]["adapter"][name]) for name in expected)
    rows = [sum(rank[part]["usage"]["rows"] for rank in found) for part in ("part", "later")]
    assert rows == [2 * STEP, STEPS * STEP + 2 * HELD_OUT]
    assert sum(rank["later"]["usage"]["retries"] for rank in found) > 0
