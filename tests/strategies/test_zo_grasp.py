import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flops_lightning.network.functional import FunctionalStages
from flops_lightning.network.staging import stage_network
from flops_lightning.queries import clean_pass
from flops_lightning.strategies import CoordinateFiniteDifferences
from flops_lightning.strategies.coordinate_probes import CoordinateProbes
from flops_lightning.strategies.zo_grasp import GraspScores, Values, kept_ratios, zo_grasp_scores
from tests.reference.networks import TokenMean, shaken, squared_error

PARAMETERS = {"a": torch.tensor([[0.5, -1.0]], dtype=torch.float64), "b": torch.tensor([2.0], dtype=torch.float64)}
# The Hessians of three samples; symmetric.
CURVATURE = torch.tensor(
    [
        [[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.2]],
        [[1.0, 0.0, 0.4], [0.0, 3.0, 0.0], [0.4, 0.0, 0.1]],
        [[0.5, 0.2, 0.0], [0.2, 0.5, 0.2], [0.0, 0.2, 0.5]],
    ],
    dtype=torch.float64,
)


def quadratic(curvature: Tensor) -> Callable[[Values], Tensor]:
    """``(b,)`` losses ``theta^T A_b theta / 2``."""

    def losses(values: Values) -> Tensor:
        theta = torch.cat([values(name).flatten() for name in PARAMETERS])
        return torch.einsum("i,bij,j->b", theta, curvature, theta) / 2

    return losses


def scored(losses: Callable[[Values], Tensor], **settings: float) -> GraspScores:
    clean = losses(PARAMETERS.__getitem__)
    return zo_grasp_scores(losses, PARAMETERS, clean, **{"queries": 4, "step": 1e-3, "seed": 0, **settings})


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()])


def test_scores_have_the_expectation_of_shared_directions():
    """With ``S = 1/Q sum_q u u^T`` the estimate is ``S H S g``, whose mean is ``(1 + 1/Q) H g + tr(H)/Q g``."""
    queries, hessian, theta = 4, CURVATURE.mean(0), flat(PARAMETERS)
    gradient = hessian @ theta
    product = (1 + 1 / queries) * hessian @ gradient + hessian.trace() / queries * gradient
    found = torch.stack([flat(scored(quadratic(CURVATURE), seed=seed).scores) for seed in range(800)])
    error = found.std(0) / math.sqrt(len(found))
    assert ((found.mean(0) + theta * product).abs() < 4 * error).all()
    assert (error < 0.1 * (theta * product).norm()).all()


def test_the_same_seed_gives_the_same_scores_and_another_others():
    state = torch.get_rng_state()
    first, again, other = (flat(scored(quadratic(CURVATURE), seed=seed).scores) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.isclose(first, other).any()
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_lost_row_has_weight_zero(bad):
    """Both the gradient and its change are those of the other rows, less by their share of the batch."""
    losses = quadratic(CURVATURE)

    def brittle(values: Values) -> Tensor:
        found = losses(values)
        moved = any(not torch.equal(values(name), p) for name, p in PARAMETERS.items())
        return torch.cat([found[:1] * (bad if moved else 1), found[1:]])

    found, rest = scored(brittle), scored(quadratic(CURVATURE[1:]))
    torch.testing.assert_close(flat(found.scores), flat(rest.scores) * (2 / 3) ** 2, rtol=1e-4, atol=1e-6)
    assert (found.lost, found.queries, rest.lost) == (2 * 4 + 1, 3 * (2 * 4 + 1), 0)


def test_a_flat_loss_scores_nothing():
    assert not flat(scored(lambda values: torch.ones(3, dtype=torch.float64)).scores).any()


def test_kept_ratios_prune_the_largest_scores_of_all_tensors():
    scores = {"a": torch.tensor([[-3.0, 5.0], [-1.0, 2.0]]), "b": torch.tensor([-2.0, 7.0]), "c": torch.tensor([9.0])}
    assert kept_ratios(scores, 3) == {"a": 2 / 4, "b": 1 / 2, "c": 1.0}
    assert kept_ratios(scores, 7) == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_ties_are_kept_in_equal_parts_and_no_tensor_is_left_out():
    zeros = {"a": torch.zeros(8), "b": torch.zeros(4), "c": torch.zeros(1)}
    assert kept_ratios(zeros, 6) == pytest.approx({"a": 6 / 13, "b": 6 / 13, "c": 1.0})
    kept = kept_ratios({"a": torch.tensor([-1.0, -2.0, 0.0, 0.0]), "b": torch.tensor([0.0, 0.0, 4.0, 5.0])}, 4)
    assert kept == {"a": 3 / 4, "b": 1 / 4}
    assert kept_ratios({"a": -torch.ones(10), "b": torch.ones(10)}, 5) == {"a": 1 / 2, "b": 1 / 10}


class Bystander(nn.Linear):
    """Has weights and does not use them."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def exact_scores(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """GraSP's own scores, from second derivatives."""
    parameters = list(module.parameters())
    gradient = torch.autograd.grad(squared_error(module(x), y).mean(), parameters, create_graph=True)
    products = torch.autograd.grad(sum((g * g.detach()).sum() for g in gradient), parameters)
    return torch.cat([(-p * hg).flatten() for p, hg in zip(parameters, products, strict=True)]).detach()


def test_scores_of_a_network_are_grasp_s(tokens_net, tokens):
    network = stage_network(tokens_net)
    stage_of = {name: int(name[0]) for name, _ in tokens_net.named_parameters()}
    probes = CoordinateProbes(network, squared_error, FunctionalStages(network), stage_of, chunk_rows=3)
    clean = clean_pass(network, squared_error, *tokens, keep=[0], draw=0, rows=4)
    found = zo_grasp_scores(
        lambda values: probes.losses_at(clean, values), dict(tokens_net.named_parameters()), clean.loss,
        queries=1000, step=1e-3, seed=0,
    )  # fmt: skip
    both = torch.stack([flat(found.scores), exact_scores(tokens_net, *tokens)])
    assert float(torch.corrcoef(both)[0, 1]) > 0.95


def test_a_layer_that_matters_is_measured_more_densely(tokens):
    torch.manual_seed(0)
    net = shaken(nn.Sequential(nn.Linear(3, 3), Bystander(3, 3), nn.Tanh(), TokenMean(), nn.Linear(3, 3, bias=False)))
    strategy = CoordinateFiniteDifferences(coordinates=4, keep=0.3, grasp_queries=1000, seed=0)
    strategy.bind(stage_network(net), lambda output, target: squared_error(output[:, :2], target))
    strategy.estimate(strategy.clean_pass(*tokens))
    ratios = strategy.state_dict()["ratios"]
    assert ratios["4.weight"] > 3 * ratios["1.weight"]
    assert ratios["1.weight"] == 1 / 9  # none but the one that every tensor keeps
