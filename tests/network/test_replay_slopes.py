"""Any architecture by replay: the likelihood ratio against autograd, and parameter noise against the slow reference.

The light tier has three architectures and a standard error of 5 %, the heavy one all of them and the 2 % of
``reference/smoothed.py``.
"""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flops_lightning.network.staging import stage_network
from flops_lightning.strategies import SPSA, EvolutionStrategies, LikelihoodRatio, MeZO, SiteSpec
from flops_lightning.strategies.site_specs import default_specs
from flops_lightning.strategies.sites import has_closed_form
from tests.reference import parameter_perturbation
from tests.reference.architectures import ARCHITECTURES, Problem, exact_gradient
from tests.reference.networks import assert_entries, call, gradients
from tests.reference.smoothed import LARGEST_ERROR, Sampled, assert_unbiased, flat

HEAVY = [pytest.mark.statistical_heavy, pytest.mark.timeout(3000)]
SAMPLES, PAIRS = 4, 128  # of each sample in a round
LEAST_ROUNDS, MOST_ROUNDS = 12, 2000
BLOCKS, LAYERS = 3, 4  # sites of one block or layer, of the many in a network


def sites_of(problem: Problem, kind: str) -> list[SiteSpec]:
    """The default groups, the highest blocks (noise of the lowest hides their gradient), or layers from all heights.

    What they do not train is frozen.
    """
    settings: dict[str, Any] = {"kind": kind, "sigma": 1e-4}
    network = stage_network(problem.module, problem.inputs)
    stages = [stage.name for stage in network.stages]
    if kind == "group":
        return [SiteSpec(stages=spec.stages, **settings) for spec in default_specs(network)]
    if kind == "block":
        trained = [i for i in range(len(stages)) if network.parameters_of(i, i)][-BLOCKS:]
        owned = {name for i in trained for name in network.parameters_of(i, i)}
        keep_training(problem, owned)
        return [SiteSpec(stages=[stages[i]], **settings) for i in trained]
    layers = layers_by_rows(problem)
    layers = layers[:: math.ceil(len(layers) / LAYERS)]
    owned = {name for name, _ in problem.module.named_parameters() if name.rpartition(".")[0] in layers}
    keep_training(problem, owned)
    return [SiteSpec(stages=[stages[0], stages[-1]], modules=layers, **settings)]


def layers_by_rows(problem: Problem) -> list[str]:
    """Trained layers that run once, with one row of the batch in each entry of their first axis."""
    shapes: dict[str, list[int]] = {}
    handles = [
        layer.register_forward_hook(lambda _, __, output, name=name: shapes.setdefault(name, []).append(len(output)))
        for name, layer in problem.module.named_modules()
        if has_closed_form(layer) and any(p.requires_grad for p in layer.parameters())
    ]
    call(problem.module, problem.inputs)
    for handle in handles:
        handle.remove()
    return [name for name, lengths in shapes.items() if lengths == [SAMPLES]]


def keep_training(problem: Problem, owned: set[str]) -> None:
    for name, parameter in problem.module.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in owned)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "largest_error"),
    [
        *(("ConvNeXt", "group", 0.05), ("torchvision's ViT", "block", 0.05), ("Llama", "linear", 0.05)),
        *(
            pytest.param(*each, LARGEST_ERROR, marks=HEAVY)
            for each in itertools.product(ARCHITECTURES, ["group", "block", "linear"])
        ),
    ],
)
def test_likelihood_ratios_are_unbiased(name: str, kind: str, largest_error: float) -> None:
    problem = ARCHITECTURES[name]()
    sites = sites_of(problem, kind)
    strategy = LikelihoodRatio(sites=sites, variant="antithetic", chunk_rows=1024, seed=0)
    strategy.bind(stage_network(problem.module, problem.inputs), problem.loss)
    exact = exact_gradient(problem, strategy.network)
    truth = {site.name: flat([exact[entry] for entry in site.parameters]) for site in strategy.sites}
    draws: dict[str, list[Tensor]] = {site: [] for site in truth}

    def is_noisy(site: str) -> bool:
        slopes = torch.stack(draws[site]) @ truth[site] / truth[site].square().sum()
        return float(slopes.std()) > 0.95 * largest_error * len(slopes) ** 0.5

    for i in range(MOST_ROUNDS):
        noisy = [i < LEAST_ROUNDS or is_noisy(site) for site in truth]
        if not any(noisy):
            break
        counts = torch.tensor([[2 * PAIRS * more] * SAMPLES for more in noisy])
        strategy.estimate(strategy.clean_pass(problem.inputs, problem.targets), counts)
        found = gradients(problem.module)
        for site in itertools.compress(strategy.sites, noisy):
            draws[site.name].append(flat([found[entry] for entry in site.parameters]))
    for site, g in truth.items():
        assert_unbiased(Sampled(torch.stack(draws[site])), Sampled(g.repeat(2, 1)), largest_error=largest_error)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("ConvNeXt", "torchvision's ViT", "Llama") else pytest.param(name, marks=HEAVY)
        for name in ARCHITECTURES
    ],
)
@pytest.mark.parametrize("kind", [MeZO, SPSA, EvolutionStrategies])
def test_perturbed_parameters_equal_the_slow_reference(kind: type[Any], name: str) -> None:
    problem = ARCHITECTURES[name]()
    strategy = kind(seed=7, chunk_rows=6)
    strategy.bind(stage_network(problem.module, problem.inputs), problem.loss)
    x, y, counts = problem.inputs, problem.targets, [2, 2, 2, 2] if kind is MeZO else [2, 0, 4, 2]
    strategy.estimate(strategy.clean_pass(x, y), None if kind is MeZO else torch.tensor(counts))
    for site in strategy.sites:
        slow = parameter_perturbation.reference_gradient(problem.module, strategy, site, x, y, counts)
        assert_entries({n: p.grad for n, p in site.parameters.items()}, slow, rtol=1e-8, atol=1e-10)
