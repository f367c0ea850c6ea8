"""Fidelity, and what a sigma is worth in each precision."""

import math
import re
from pathlib import Path

import pytest
import torch

from benchmarks import fidelity, precision
from benchmarks.precision import gradient, random_vit_tiny
from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import Backprop, LikelihoodRatio, SiteSpec
from flops_lightning.strategies.precision import Resolution


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])


def test_the_worth_of_an_estimate_is_that_of_its_mean_cosine():
    assert fidelity.per_cost([0.5, 0.7], 20.0) == pytest.approx(0.36 / 0.64 / 20)
    assert fidelity.per_cost([1.0, 1.0], 3.0) == math.inf


def test_the_squared_cosine_over_its_complement_grows_with_the_queries():
    torch.manual_seed(0)
    network = stage_network(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4)))
    batch = (torch.randn(8, 8), torch.randint(4, (8,)))
    truth = gradient(Backprop(), network, batch)

    def odds(queries: int) -> float:
        def make(seed: int) -> LikelihoodRatio:
            sites = [SiteSpec(stages=["0", "1"], queries_per_sample=queries, sigma=1e-3)]
            return LikelihoodRatio(sites=[*sites, SiteSpec(stages=["2"], sigma=1e-3)], seed=seed)

        return fidelity.per_cost(fidelity.measure(make, network, batch, truth, draws=40)["cosines"], 1.0)

    assert odds(8) > 1.2 * odds(2)


def test_every_estimate_is_listed_with_its_cost(capsys):
    fidelity.main(["--draws", "1", "--batch", "2", "--queries", "2", "--rows", "64"])
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines()[2:] if line.startswith("|")]
    costs = {name.strip(): float(cost) for _, name, _, cost, *_ in lines}
    assert list(costs) == list(fidelity.strategies(random_vit_tiny(1, 0)[0], 2, 4))
    assert costs["MeZO, 2 queries"] == pytest.approx(2, abs=0.1)
    assert costs["LikelihoodRatio, groups"] < costs["ForwardMode, groups"]
    with pytest.raises(SystemExit):
        fidelity.main(["--names", "nothing"])
    assert "'nothing' is not known; choose from 'LikelihoodRatio, groups'" in capsys.readouterr().err


@pytest.mark.parametrize("method", precision.METHODS)
def test_float32_resolves_what_bfloat16_does_not(method, capsys):
    small = ["--seeds", "1", "--batch", "4", "--queries", "4", "--sigmas", "1e-3", "1e-5"]
    precision.main(["--methods", method, "--precisions", "float32", "bfloat16", *small])
    text = capsys.readouterr().out
    assert text.startswith(f"{method}:")
    float32, _, finer, rounded = (float(along) for along in re.findall(r" ± nan \((-?\d+\.\d+)\)", text))
    assert float32 > 0.98
    assert finer > 0.98
    assert rounded < 0.9


RESOLUTIONS = [Resolution.everything(torch.float32), Resolution.products("bfloat16", torch.finfo(torch.bfloat16).eps)]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("dtype", "resolution"), [*zip(["float32", "bfloat16"], RESOLUTIONS, strict=True)])
def test_the_exact_derivatives_are_followed_at_the_width_that_the_warning_names_but_not_below(dtype, resolution):
    steps = [resolution.steps / 32, resolution.steps]
    (low, _), (named, _) = precision.cosine_ranges("digits", "activations", dtype, steps=steps)
    assert low < 0.7
    assert named > 0.9


def test_the_table_of_the_rule_has_a_line_for_each_precision(capsys, monkeypatch):
    monkeypatch.setattr(precision, "STEPS", (0.5, 2.0))
    precision.main(["rule", "--networks", "mlp20", "--methods", "parameters, factored", "--precisions", "float16"])
    _, _, line = (line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    name, dtype, *cells = (cell.strip() for cell in line.split("|")[1:-1])
    assert (name, dtype) == ("mlp20, parameters, factored", "float16")
    (narrow, _), (low, high) = (map(float, cell.split(" - ")) for cell in cells)
    assert -1 <= narrow < 0.9 < low <= high <= 1
