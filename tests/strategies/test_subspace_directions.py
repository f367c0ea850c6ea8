"""``layout: subspace``: directions ``P U`` in a subspace that lasts; with Muon, ZO-Muon."""

from typing import Any

import pytest
import torch

from flops_lightning.errors import SettingError
from flops_lightning.optim.optimizers import OptimizerSettings, build_optimizer
from flops_lightning.strategies import SPSA, EvolutionStrategies
from tests.reference import zo_muon
from tests.reference.layouts import SIGMA, VIT_SITES, convolutional
from tests.reference.networks import bound_to, cross_entropy, estimated, squared_error, token_network
from tests.reference.parameter_perturbation import STRATEGIES, assert_equals_reference, basis_of, reference_traces

SUBSPACE: dict[str, Any] = {"layout": "subspace", "rank": 2, "refresh": 3}
WHOLE = [{"stages": ["0", "4"], "sigma": 0.5}]
pytestmark = pytest.mark.filterwarnings("ignore:.*has no effect. derivatives are exact")


def counts(strategy):
    return torch.tensor([4, 0, 6, 2] if strategy == "spsa" else [3, 0, 5, 2])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_vit_over_a_refresh(strategy, vit, images):
    kind, settings = STRATEGIES[strategy]
    chosen = bound_to(kind, vit, cross_entropy, VIT_SITES["group"], chunk_rows=3, **settings, **SUBSPACE)
    for _ in range(4):
        assert_equals_reference(vit, chosen, *images, counts(strategy))


def test_kernels_are_flattened(images):
    net = convolutional()
    chosen = bound_to(SPSA, net, cross_entropy, [{"stages": ["0", "6"], **SIGMA}], chunk_rows=3, **SUBSPACE)
    assert_equals_reference(net, chosen, *images, counts("spsa"))


def test_traces(tokens_net, tokens):
    chosen = bound_to(EvolutionStrategies, tokens_net, squared_error, WHOLE, **SUBSPACE)
    seen = chosen.estimate(chosen.clean_pass(*tokens), counts("baseline"), traces=True).observation
    expected = reference_traces(tokens_net, chosen, chosen.sites[0], *tokens, counts("baseline").tolist())
    torch.testing.assert_close(seen.trace[0], expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def test_a_basis_is_orthonormal_drawn_from_its_key_and_kept(tokens_net, tokens):
    made = [bound_to(SPSA, tokens_net, squared_error, WHOLE, **SUBSPACE) for _ in range(2)]
    for rank, strategy in enumerate(made):
        strategy.rank = rank
    kept = []
    for _ in range(4):
        for strategy in made:
            estimated(strategy, *tokens)
        kept.append(made[0]._bases["0.weight"][1])
        assert torch.equal(kept[-1], made[1]._bases["0.weight"][1]), "ranks move in one subspace"
    assert torch.equal(kept[0], kept[2])
    assert not torch.equal(kept[2], kept[3])
    torch.testing.assert_close(kept[0].mT @ kept[0], torch.eye(2).double(), rtol=0, atol=1e-12)
    assert set(made[0]._bases) == {"0.weight", "2.weight"}, "the head has two rows"
    made[0].seed += 1
    estimated(made[0], *tokens)
    assert not torch.equal(made[0]._bases["0.weight"][1], kept[3])


def test_the_estimate_is_unbiased_for_the_projected_gradient():
    net, generator = token_network(), torch.Generator().manual_seed(3)
    x, y = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 5, 3), (2, 2)))
    sites = [{"stages": ["0", "4"], "sigma": 1e-4, "queries_per_sample": 1000}]
    strategy = bound_to(SPSA, net, squared_error, sites, chunk_rows=2, **SUBSPACE)
    _, found = estimated(strategy, x, y)
    squared_error(net(x), y).mean().backward()
    estimate, truth = [], []
    for name, p in net.named_parameters():
        basis = basis_of(strategy, name, p, 0)
        assert p.grad is not None
        projected = (basis @ basis.mT @ p.grad.flatten(1 if p.ndim > 1 else 0)).view(p.shape)
        outside = found[name].flatten(1 if p.ndim > 1 else 0)
        assert (outside - basis @ basis.mT @ outside).abs().max() < 1e-10
        estimate.append(found[name].flatten())
        truth.append(projected.flatten())
    estimate, truth = torch.cat(estimate), torch.cat(truth)
    assert float(estimate @ truth / truth.square().sum()) == pytest.approx(1.0, abs=4 * (2 / 500) ** 0.5)
    assert (estimate - truth).norm() < 1.5 * (len(truth) / 500) ** 0.5 * truth.norm()


def test_a_subspace_has_uniform_distribution():
    """The mean over subspaces is ``rank / m`` of the gradient: what the docstring says of the bias."""
    strategy = EvolutionStrategies(seed=0, **SUBSPACE)
    p = torch.nn.Parameter(torch.zeros(8, 4, dtype=torch.float64))
    bases = [basis_of(strategy, "w", p, 3 * i) for i in range(2000)]
    mean = torch.stack([basis @ basis.mT for basis in bases]).mean(0)
    torch.testing.assert_close(mean, torch.eye(8).double() / 4, rtol=0, atol=0.03)
    assert abs(float(torch.stack(bases).mean())) < 0.01


def test_with_muon_it_is_zo_muon(vit, images):
    """The first update, and one in the next subspace from there."""
    sites = [{"stages": ["embed", "head"], "sigma": 1e-3, "queries_per_sample": 16}]
    strategy = bound_to(EvolutionStrategies, vit, cross_entropy, sites, layout="subspace", rank=4, refresh=1)
    settings = OptimizerSettings("muon", {"scale": "none"}, lr=0.02)
    for _ in range(2):
        optimizer = build_optimizer(vit, settings)
        expected = zo_muon.updated(vit, strategy, *images, lr=0.02, queries=16)
        before = {name: p.detach().clone() for name, p in vit.named_parameters()}
        _, gradients = estimated(strategy, *images)
        for name, p in vit.named_parameters():
            p.grad = gradients[name]
        optimizer.step()
        optimizer.zero_grad()
        for name, p in vit.named_parameters():
            torch.testing.assert_close(p.detach(), expected[name], rtol=0, atol=1e-5)
            assert (p - before[name]).abs().max() > 1e-4, name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refresh": 5}, r"refresh = 5: has no effect here. Remove it, or write layout: subspace"),
        ({"layout": "subspace", "refresh": 0}, r"refresh = 0: must be 1 or more"),
        ({"layout": "subspace", "rank": 0}, r"rank = 0: must be 1 or more"),
        ({"layout": "subspace", "activation_guided": True}, r"write layout: factored"),
        ({"rank": 2}, r"write layout: factored or subspace"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        EvolutionStrategies(**settings)
