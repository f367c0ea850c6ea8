"""A step on a GPU waits for it where docs/gpu.md says, and nowhere else; shown on a GPU that is pretended."""

from collections import Counter
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flops_lightning.allocators import (
    BernoulliAllocator,
    CostAwareAllocator,
    EqualAllocator,
    GaussianAllocator,
    OptimalAllocator,
    TraceSettings,
)
from flops_lightning.network.staging import stage_network
from flops_lightning.noise import generators
from flops_lightning.strategies import SPSA, CoordinateFiniteDifferences, EvolutionStrategies, LikelihoodRatio, MeZO
from flops_lightning.strategies.delta import Variant
from tests.pretended_gpu import CUDA, PretendedKernels, PretendedTensor, noted, pretended_gpu
from tests.reference.networks import tiny_vit

SITES = [
    {"name": "lower", "stages": ["embed", "blocks.1"], "sigma": 0.05, "queries_per_sample": 4},
    {"name": "upper", "stages": ["blocks.2"], "sigma": 0.05, "queries_per_sample": 4},
    {"name": "head", "stages": ["pool", "head"], "sigma": 0.05, "queries_per_sample": 4},
]
SURVIVORS = {"strategies.query_strategy.estimate: to the host": 1}
"""The one transfer of an estimate: which queries survived, and whether there is a gradient to step with."""
STATISTICS = Counter({"protocol.objects.on_cpu: to the host": 1})
"""What an allocator knows of a batch, all at once; and, after the step, what it learns from."""
PREDICTED = TraceSettings(source="prediction")


def row_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(outputs, targets, reduction="none")


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    monkeypatch.setattr(generators, "_kernels", lambda _: PretendedKernels)


def step(strategy: Any, allocator: Any, batch: tuple[Tensor, Tensor]) -> None:
    clean = strategy.clean_pass(*batch)
    settings: dict[str, Any] = {}
    if allocator is not None:
        allocation = allocator.allocate(strategy.sample_statistics(clean, allocator.requests), strategy.budget)
        settings = {"pilot_weight": allocation.pilot_weight, "inclusion": allocation.inclusion}
        settings |= {"counts": allocation.counts, "traces": allocator.learns}
    groups = strategy.update_groups
    for i, sites in enumerate(groups):
        clean = strategy.refresh(clean, groups[i - 1]) if i else clean
        estimate = strategy.estimate(clean, sites=sites or None, **settings)
    if estimate.observation is not None:
        allocator.observe(estimate.observation)


def waits(make: Any, allocator: Any = None, **settings: Any) -> Counter[str]:
    """What waits in a step; those before it look at the network, count costs and fill histories."""
    torch.manual_seed(0)
    with pretended_gpu():
        network = stage_network(tiny_vit().float().to(CUDA))
        strategy = make(seed=0, chunk_rows=12, **settings)
        strategy.bind(network, row_loss)
        batch = PretendedTensor(torch.randn(3, 1, 8, 8)), PretendedTensor(torch.tensor([1, 0, 4]))
        for _ in range(1 if allocator is None else 2):
            step(strategy, allocator, batch)
        noted()
        step(strategy, allocator, batch)
        return noted()


STRATEGIES = {
    **{variant: partial(LikelihoodRatio, variant=variant) for variant in get_args(Variant)},
    "token widths": partial(LikelihoodRatio, token_sigma=True),
    "signs": partial(LikelihoodRatio, noise={"distribution": "rademacher"}),
    "factored": partial(LikelihoodRatio, noise={"layout": "factored"}),
    "orthogonal": partial(LikelihoodRatio, noise={"orthogonal": True}),
    "exact head": partial(LikelihoodRatio, exact_head=True),
    "ES": partial(EvolutionStrategies, layout="factored"),
    **{f"SPSA, {layout}": partial(SPSA, layout=layout) for layout in ("factored", "shared", "flipout", "subspace")},
}


SLOW = ("token widths", "orthogonal", "ES", "SPSA, flipout", "SPSA, subspace")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in STRATEGIES])
def test_a_step_waits_once_for_which_queries_survived(name):
    assert waits(STRATEGIES[name], sites=SITES) == SURVIVORS


def test_a_step_without_triton_waits_once(monkeypatch):
    monkeypatch.setattr(generators, "_kernels", lambda _: None)
    assert waits(LikelihoodRatio, sites=SITES) == SURVIVORS


def test_sites_that_are_updated_one_by_one_wait_once_each():
    assert waits(partial(LikelihoodRatio, update="site_by_site"), sites=SITES) == dict.fromkeys(SURVIVORS, 3)


def test_mezo_waits_once():
    assert waits(MeZO) == {"strategies.mezo._estimate: to the host": 1}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:model.strategy.step:RuntimeWarning")
def test_coordinates_wait_twice():
    expected = {
        "strategies.coordinates._estimate: _local_scalar_dense": 1,
        "strategies.coordinates._estimate: tolist": 1,
    }
    assert waits(CoordinateFiniteDifferences, coordinates=8, grasp_queries=8) == expected


@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True])
def test_layers_that_are_perturbed_together_wait_once_more(together):
    """An estimate of theirs is repeated where queries were lost."""
    sites = [
        {**SITES[0], "stages": ["embed", "blocks.0"]}, {**SITES[1], "stages": ["blocks.2", "pool"]},
        {**SITES[2], "stages": ["head"], "kind": "linear"},
    ]  # fmt: skip
    layers = {"name": "layers", "stages": ["blocks.1"], "kind": "linear", "sigma": 0.05, "queries_per_sample": 4}
    expected = Counter(SURVIVORS)
    if together:
        layers["together"] = True
        expected["strategies.site_queries._joint_pass: to the host"] = 1
    assert waits(LikelihoodRatio, sites=[*sites, layers]) == expected


def test_a_learned_sigma_waits_once_a_site():
    """It is a number of the host, by which the next step's noise is scaled."""
    expected = Counter(SURVIVORS) + Counter({"strategies.widths.step: to the host": len(SITES)})
    assert waits(partial(LikelihoodRatio, learn_sigma=0.01), sites=SITES) == expected


ALLOCATORS = {
    "bernoulli": partial(BernoulliAllocator, traces=PREDICTED), "cost-aware": CostAwareAllocator,
    "gaussian": partial(GaussianAllocator, traces=PREDICTED), "optimal": partial(OptimalAllocator, traces=PREDICTED),
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in ("bernoulli", "cost-aware"))) for n in ALLOCATORS]
)
def test_an_allocator_takes_one_transfer_before_the_queries_and_one_after_the_step(name):
    assert waits(LikelihoodRatio, ALLOCATORS[name](), sites=SITES) == Counter(SURVIVORS) + STATISTICS + STATISTICS


def test_equal_counts_take_none_and_pilots_one_more():
    assert waits(LikelihoodRatio, EqualAllocator(), sites=SITES) == SURVIVORS
    pilots = {"sites": ["upper", "head"], "queries": 2}
    expected = Counter({"strategies.observing_strategy._observe: to the host": 1}) + STATISTICS + Counter(SURVIVORS)
    assert waits(LikelihoodRatio, GaussianAllocator(), sites=SITES, pilots=pilots) == expected


@pytest.mark.slow
def test_queries_of_parameters_with_an_allocator():
    found = waits(partial(SPSA, layout="factored"), OptimalAllocator(traces=PREDICTED), sites=SITES)
    assert found == Counter(SURVIVORS) + STATISTICS + STATISTICS


def test_the_gradient_is_that_of_a_cpu_with_philox():
    """At the head, whose gradient takes no derivative (they are random there)."""
    sites = [
        {"name": "body", "stages": ["embed", "pool"], "sigma": 0.05, "queries_per_sample": 2},
        {"name": "head", "modules": ["head"], "kind": "linear", "sigma": 0.05, "queries_per_sample": 4},
    ]
    images, labels, found = torch.randn(6, 1, 8, 8), torch.tensor([1, 0, 4, 2, 3, 1]), []
    for device in ("cpu", "cuda"):
        with pretended_gpu():
            torch.manual_seed(0)
            network = stage_network(tiny_vit().float().to(device))
            strategy = LikelihoodRatio(sites=sites, seed=0, generator="philox")
            strategy.bind(network, row_loss)
            strategy.estimate(strategy.clean_pass(images.to(device), labels.to(device)))
            found.append(network.module.head.weight.grad.cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


WAITS = {
    "a number": lambda x: x.sum().item(), "a truth": lambda x: bool(x.any()), "a list": lambda x: x.tolist(),
    "a copy": lambda x: x.cpu(), "a mask": lambda x: x[x > 1], "places": lambda x: x.nonzero(),
    "numbers": lambda x: x.new_tensor([1.0]), "numbers by name": lambda x: torch.tensor([1.0], device=x.device),
    "pageable memory": lambda x: torch.ones(3).to(x.device, non_blocking=True), "a list of places": lambda x: x[[0, 1]],
    "blocking": lambda x: torch.ones(3).pin_memory().to(x.device), "a float": lambda x: x[0].copy_(torch.tensor(1.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", WAITS)
def test_what_waits_is_noted(name):
    with pretended_gpu():
        x = torch.arange(3.0).pin_memory().to("cuda", non_blocking=True)
        noted()
        WAITS[name](x)
        (place,) = noted()
    assert place.startswith("tests.strategies.test_no_wait.<lambda>: ")


def test_what_does_not_wait_is_not_noted_and_two_devices_are_refused():
    with pretended_gpu():
        x = torch.arange(3.0).pin_memory().to("cuda", non_blocking=True)
        noted()
        y = torch.where(x > 1, x, 0.0) + torch.zeros(3, device="cuda") + x.new_full((3,), 2.0)
        y[x > 1] = 0.0
        y += torch.tensor(1.0)  # a number, wherever it is
        assert not noted()
        assert y.device == CUDA
        with pytest.raises(RuntimeError, match="expected all tensors on cuda:0"):
            x + torch.ones(3)
    assert y.held.tolist() == [3.0, 3.0, 1.0]
