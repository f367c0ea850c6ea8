from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from benchmarks.fidelity import Fidelity, main, measure, strategies
from benchmarks.precision import gradient, random_vit_tiny
from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import Backprop, LikelihoodRatio, SiteSpec


def test_the_figures_are_what_their_names_say() -> None:
    found = Fidelity([0.5, 0.7], 20.0)
    assert found.cosine == pytest.approx(0.6)
    assert found.error == pytest.approx(0.1)
    assert found.per_cost == pytest.approx(0.36 / 0.64 / 20)
    assert math.isnan(Fidelity([0.5], 1.0).error)
    assert Fidelity([1.0, 1.0], 3.0).per_cost == math.inf


def test_the_squared_cosine_over_its_complement_grows_with_the_queries() -> None:
    """With the queries alone: the clean pass and the local derivatives, which cost the same, are taken off."""
    torch.manual_seed(0)
    network = stage_network(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)))
    batch = (torch.randn(8, 8), torch.randint(4, (8,)))
    truth = gradient(Backprop(), network, batch)

    def odds(queries: int) -> float:
        def make(seed: int) -> LikelihoodRatio:
            sites = [SiteSpec(stages=["0", "1"], queries_per_sample=queries, sigma=1e-3)]
            return LikelihoodRatio(sites=[*sites, SiteSpec(stages=["2"], sigma=1e-3)], seed=seed)

        square = measure(make, network, batch, truth, draws=40).cosine ** 2
        return square / (1 - square)

    assert odds(8) > 1.2 * odds(2)


def test_every_estimate_is_listed_with_its_cost(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    main(["--draws", "1", "--batch", "2", "--queries", "2", "--rows", "64"])
    lines = capsys.readouterr().out.strip().splitlines()[2:]
    network = random_vit_tiny(1, 0)[0]
    assert [line.split(" | ")[0][2:] for line in lines] == list(strategies(network, 2, 4))
    costs = {line.split(" | ")[0][2:]: float(line.split(" | ")[2]) for line in lines}
    assert costs["MeZO, 2 queries"] == pytest.approx(2, abs=0.1)
    assert costs["LikelihoodRatio, groups"] < costs["ForwardMode, groups"]
    with pytest.raises(SystemExit):
        main(["--names", "nothing"])
