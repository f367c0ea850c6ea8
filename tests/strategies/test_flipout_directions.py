"""``layout: flipout``: one matrix of signs for all samples, turned by signs of each; the rest is in the other layouts'.

That estimates equal the slow reference is tested in ``test_parameter_perturbation.py``.
"""

import pytest
import torch
from torch import nn

from flops_lightning.errors import SettingError
from flops_lightning.strategies import SPSA, EvolutionStrategies
from tests.reference.networks import bound_to, estimated, squared_error
from tests.reference.parameter_perturbation import direction_of

WHOLE = [{"stages": ["0", "4"], "sigma": 0.5}]


def test_estimates_are_unbiased_and_those_of_two_samples_uncorrelated():
    """Samples with one gradient show it: the variance of their mean falls with their number, as theorem 1 says."""
    generator, batch, draws = torch.Generator().manual_seed(0), 8, 500
    net, (x, y) = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(2, 1, 4, generator=generator).double()
    x, y = x.expand(batch, -1), y[:, :3].expand(batch, -1)
    site = [{"stages": ["0"], "sigma": 0.1, "queries_per_sample": 2}]
    strategy = bound_to(SPSA, net, lambda output, target: (output * target).sum(1), site, layout="flipout")
    exact = torch.cat([(y[0, :, None] * x[0]).flatten(), y[0]])
    found = []
    for _ in range(draws):
        _, gradients = estimated(strategy, x, y)
        found.append(torch.cat([gradients["0.weight"].flatten(), gradients["0.bias"]]))
    slopes = torch.stack(found) @ exact / exact.square().sum()
    squares = (torch.stack(found) - exact).square().sum(1) / exact.square().sum()
    assert abs(slopes.mean() - 1) < 4 * slopes.std() / draws**0.5
    expected = (len(exact) - 1) / batch  # shared Gaussian directions: len(exact) + 1
    assert abs(squares.mean() - expected) < 4 * squares.std() / draws**0.5
    assert squares.std() / draws**0.5 < 0.05 * expected
    seen = strategy.observe_traces(strategy.clean_pass(x, y), torch.full((batch,), 400), first_query=2)
    traces = seen.trace[0] / 2 / exact.square().sum()  # of a pair
    assert abs(traces.mean() - (len(exact) - 1)) < 4 * traces.std() / batch**0.5
    assert traces.std() / batch**0.5 < 0.05 * len(exact)


def test_samples_share_a_matrix_up_to_signs_of_rows_and_columns(tokens_net, tokens):
    strategy = bound_to(SPSA, tokens_net, squared_error, WHOLE, layout="flipout")
    (site,) = strategy.sites
    places = ((0, 0), (1, 0), (1, 1))  # of samples and directions
    found = [direction_of(tokens_net, strategy, site, tokens[0], *place, 0)["0.weight"] for place in places]
    first, second, later = found
    assert first.abs().eq(1).all()
    assert not torch.equal(first, second)
    assert torch.linalg.matrix_rank(first * second) == 1
    assert torch.linalg.matrix_rank(first * later) > 1


@pytest.mark.parametrize(
    ("chunk_rows", "shapes"), [(16, [8, 8, 4, 4, 2]), (6, [6, 6, 4, 4, 2]), (5, [4, 2, 4, 2, 4, 4, 2])]
)
def test_a_compiled_network_gets_few_shapes(chunk_rows, shapes, tokens_net, tokens, monkeypatch):
    """Directions of few samples are filled up to a power of two, or to a whole chunk."""
    seen, sites, counts = (
        [],
        [{"stages": s, "sigma": 0.5} for s in (["0", "1"], ["2", "4"])],
        torch.tensor([10, 4, 8, 0]),
    )
    settings = {"layout": "flipout", "chunk_rows": chunk_rows}

    def compiled(module):
        return lambda x: seen.append(len(x)) or module(x)

    _, expected = estimated(bound_to(SPSA, tokens_net, squared_error, sites, **settings), *tokens, counts)
    monkeypatch.setattr("flops_lightning.network.compilation._compiled", compiled)
    strategy = bound_to(SPSA, tokens_net, squared_error, sites, compile_suffixes=True, **settings)
    _, found = estimated(strategy, *tokens, counts)
    assert seen == shapes  # of 6, 6, 4, 4 and 2 rows
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 2}, r"rank = 2: has no effect here. Remove it, or write layout: factored or subspace"),
        ({"exchange": "losses"}, r"exchange = 'losses': has no effect here. .* layout: shared or subspace"),
        ({"activation_guided": True}, r"activation_guided = True: has no effect here"),
        ({"refresh": 2}, r"refresh = 2: has no effect here"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(SettingError, match=message):
        EvolutionStrategies(layout="flipout", **settings)


def test_a_layer_that_it_cannot_move_is_refused():
    inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    inner[2].weight = inner[0].weight
    tied = nn.Sequential(inner, nn.Linear(3, 2)).double()
    with pytest.raises(SettingError, match=r"layout = 'flipout': perturbs layers one by one, but .* two modules"):
        bound_to(SPSA, tied, squared_error, [{"stages": ["0", "1"], "sigma": 0.1}], layout="flipout")
